import numpy as np
import pytest

from models.tokenizer.balance import capacity_of
from models.tokenizer.kmeans import distances, kmeans, mse
from models.tokenizer.residual import ResidualQuantizer


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(8, 12))[rng.integers(0, 8, 500)] * 2 + rng.normal(size=(500, 12))).astype(np.float32)


@pytest.fixture(scope="module")
def quantizer(x: np.ndarray) -> ResidualQuantizer:
    return ResidualQuantizer.fit(x, levels=3, codes=16, seed=0)


def error(quantizer: ResidualQuantizer, x: np.ndarray, sids: np.ndarray) -> float:
    return mse(x, quantizer.reconstruct(sids), np.arange(len(x)))


def test_every_level_lowers_the_error(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    sids = quantizer.assign(x)
    errors = [error(quantizer, x, sids[:, :length]) for length in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[1]


def test_balanced_levels_hold_at_most_their_share(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    for unique in (False, True):
        for column in quantizer.assign(x, unique=unique).T:
            assert np.bincount(column, minlength=16).max() <= capacity_of(500, 16)
    exact = ResidualQuantizer.fit(x, levels=3, codes=16, slack=0)
    for column in exact.assign(x).T:
        assert np.bincount(column, minlength=16).max() <= -(-500 // 16)


def test_sweeps_lower_the_error_to_about_that_of_plain_levels(x: np.ndarray) -> None:
    def fitted(**options: object) -> float:
        quantizer = ResidualQuantizer.fit(x, levels=3, codes=16, **options)
        return error(quantizer, x, quantizer.assign(x, balanced=bool(options.get("balanced", True))))

    assert fitted() < fitted(sweeps=0)
    assert fitted() < 1.05 * fitted(balanced=False)


def test_one_level_is_just_kmeans(x: np.ndarray) -> None:
    quantizer = ResidualQuantizer.fit(x, levels=1, codes=16)
    assert (quantizer.codebooks[0] == kmeans(x, 16)[0]).all()


def test_the_version_names_the_codebooks(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    assert quantizer.version == ResidualQuantizer(quantizer.codebooks.copy()).version
    assert quantizer.version != ResidualQuantizer.fit(x, levels=3, codes=16, seed=1).version


def test_rows_of_another_embedder_are_refused(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    with pytest.raises(ValueError, match=f"codebook {quantizer.version} encodes"):
        quantizer.encode(x[:, :5])
    with pytest.raises(ValueError, match="1 of 500 rows hold NaN"):
        quantizer.assign(np.where(np.arange(500)[:, None] == 3, np.nan, x))
    with pytest.raises(ValueError, match="make 3 levels"):
        quantizer.encode_beside(x, np.zeros((4, 2), np.int32))
    with pytest.raises(ValueError, match="slack is 2"):
        ResidualQuantizer(quantizer.codebooks, slack=2)


def test_encode_is_the_nearest_code_at_each_level(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    for row, sid in zip(x[:20], quantizer.encode(x[:20]), strict=True):
        residual = row
        for level, code in enumerate(sid):
            gaps = ((residual - quantizer.codebooks[level]) ** 2).sum(1)
            assert gaps[code] <= gaps.min() + 1e-5
            residual = residual - quantizer.codebooks[level][code]


def test_unique_sids_cost_little(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    shared, unique = quantizer.assign(x), quantizer.assign(x, unique=True)
    assert len(np.unique(shared, axis=0)) < len(np.unique(unique, axis=0)) == len(x)
    assert error(quantizer, x, unique) < 1.03 * error(quantizer, x, shared)


def test_unbalanced_unique_sids_keep_their_prefixes(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    nearest, unique = quantizer.encode(x), quantizer.assign(x, balanced=False, unique=True)
    assert (nearest[:, :2] == unique[:, :2]).all()
    assert len(np.unique(nearest, axis=0)) < len(np.unique(unique, axis=0)) == len(x)


def test_more_twins_than_codes_share_the_codes_evenly(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    sids = quantizer.assign(np.vstack([x, np.repeat(x[:1], 40, axis=0)]), balanced=False, unique=True)
    family = (sids[:, :2] == sids[-1, :2]).all(1)
    counts = np.bincount(sids[family, 2], minlength=16)
    assert counts.max() - counts.min() <= 1


def test_new_rows_take_the_nearest_free_code(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    taken = quantizer.assign(x, unique=True)
    new = x[:30] + 0.01
    sids = quantizer.encode_beside(new, taken)
    assert (sids[:, :2] == quantizer.encode(new)[:, :2]).all()
    used, moved = {tuple(sid) for sid in taken.tolist()}, 0
    gaps = distances(new - quantizer.reconstruct(sids[:, :2]), quantizer.codebooks[2])
    for (*prefix, last), gap in zip(sids.tolist(), gaps, strict=True):
        free = [code for code in range(16) if (*prefix, code) not in used]
        assert gap[last] <= gap[free or range(16)].min() + 1e-5
        moved += bool(free) and gap[last] > gap.min() + 1e-5
        used.add((*prefix, last))
    assert moved


def test_a_full_prefix_shares_its_nearest_code(quantizer: ResidualQuantizer, x: np.ndarray) -> None:
    nearest = quantizer.encode(x[:1])
    taken = np.array([[*nearest[0, :2], code] for code in range(16)], np.int32)
    assert (quantizer.encode_beside(x[:1], taken) == nearest).all()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_fewer_distinct_rows_than_codes_is_no_trap() -> None:
    x = np.repeat(np.random.default_rng(0).normal(size=(5, 4)), 8, axis=0).astype(np.float32)
    quantizer = ResidualQuantizer.fit(x, levels=3, codes=8)
    assert len(np.unique(quantizer.assign(x, unique=True), axis=0)) == 40


def test_codebooks_with_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="expected finite"):
        ResidualQuantizer(np.full((3, 4, 2), np.nan))
