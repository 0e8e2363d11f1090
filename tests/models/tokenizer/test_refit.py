import numpy as np
import pyarrow as pa
import pytest

from features.schema import ITEM, conform
from models.tokenizer.refit import appended_drift, matching, refit, renamed, usage_drift
from models.tokenizer.residual import ResidualQuantizer
from models.tokenizer.vocabulary import Catalogue


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(12, 10))[rng.integers(0, 12, 400)] * 2 + rng.normal(size=(400, 10))).astype(np.float32)


@pytest.fixture(scope="module")
def old(x: np.ndarray) -> ResidualQuantizer:
    return ResidualQuantizer.fit(x, levels=2, codes=16, seed=0)


def test_no_drift_between_samples_of_one_distribution() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 8, (2000, 3)), rng.integers(0, 8, (3000, 3))
    drift = usage_drift(left, right, 8)
    assert all(js < 2 * noise for js, noise in zip(drift["js"], drift["js_noise"], strict=True))
    assert max(drift["psi"]) < 0.05
    assert usage_drift(left, left, 8)["js"] == pytest.approx([0, 0, 0])


def test_drift_shows_at_the_level_where_it_happens() -> None:
    rng = np.random.default_rng(0)
    left = rng.integers(0, 8, (2000, 2))
    right = np.stack([rng.integers(0, 8, 2000), rng.integers(0, 4, 2000)], axis=1)
    drift = usage_drift(left, right, 8)
    assert drift["js"][1] > 0.4 > 0.1 > drift["js"][0]
    assert drift["psi"][1] > 1 > drift["psi"][0]
    assert usage_drift(np.zeros((5, 1), int), np.ones((5, 1), int), 2)["js"] == pytest.approx([1])


def test_items_of_one_code_are_drift_of_what_was_appended() -> None:
    def catalogue(sids: np.ndarray) -> Catalogue:
        table = pa.table({"item_id": [f"i{k}" for k in range(len(sids))], "duration_ms": [0] * len(sids)})
        return Catalogue.from_items(table, sids=sids.astype(np.int32), codes=8)

    rng = np.random.default_rng(0)
    old = rng.integers(0, 8, (500, 2))
    new = np.stack([np.full(100, 3), rng.integers(0, 8, 100)], axis=1)
    drift = appended_drift(catalogue(old), catalogue(np.concatenate([old, new])))["usage_drift"]
    assert drift["js"][0] > 5 * drift["js_noise"][0]
    assert drift["js"][1] < 2 * drift["js_noise"][1]
    assert appended_drift(catalogue(old), catalogue(old)) == {}


def test_sides_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="expected rows on both sides"):
        usage_drift(np.zeros((0, 2), int), np.zeros((3, 2), int), 4)
    with pytest.raises(ValueError, match="equal levels"):
        usage_drift(np.zeros((3, 3), int), np.zeros((3, 2), int), 4)


def test_renaming_codes_is_undone_and_changes_no_reconstruction(old: ResidualQuantizer, x: np.ndarray) -> None:
    sids = old.assign(x)
    name = np.random.default_rng(1).permutation(16)
    books, renamed_sids = old.codebooks.copy(), sids.copy()
    for level in range(2):
        books[level][name] = old.codebooks[level]
        renamed_sids[:, level] = name[sids[:, level]]
    shuffled = ResidualQuantizer(books)
    back, again = renamed(shuffled, renamed_sids, matching(shuffled, renamed_sids, old, sids))
    assert (again == sids).all()
    assert (back.codebooks == old.codebooks).all()
    assert np.allclose(back.reconstruct(again), shuffled.reconstruct(renamed_sids))


def catalogue_of(ids: list[str], sids: np.ndarray) -> Catalogue:
    items = conform(pa.table({"item_id": ids, "duration_ms": [1] * len(ids)}), ITEM)
    return Catalogue.from_items(items, sids=sids, codes=16)


def test_a_refit_keeps_more_codes_than_numbering_anew(old: ResidualQuantizer, x: np.ndarray) -> None:
    """Items that only one catalogue knows take no part in the matching, but get the new names too."""
    sids = old.assign(x, unique=True)
    moved = x + np.random.default_rng(2).normal(size=x.shape).astype(np.float32) * 0.2
    ids = [f"i{k}" for k in range(len(x))]
    anew = ResidualQuantizer.fit(moved, levels=2, codes=16, seed=5)
    careless = anew.assign(moved, unique=True)
    known = len(x) - 20
    before = catalogue_of([*ids[:known], "gone"], np.r_[sids[:known], sids[known : known + 1]])
    result = refit(anew, catalogue_of(ids, careless), old, before)
    assert result.kept["codes"][0] > 0.3 > 2 * (careless[:, 0] == sids[:, 0]).mean()
    assert result.mapping.column("item_id").to_pylist() == ids[:known]
    assert result.mapping.column("old_sid").to_pylist() == sids[:known].tolist()
    assert result.mapping.column("new_sid").to_pylist() == result.sids[:known].tolist()
    assert 0 < result.kept["moved"] < 1
    assert result.quantizer.version not in (old.version, anew.version)
    assert np.array_equal(result.quantizer.reconstruct(result.sids), anew.reconstruct(careless))


def test_other_shapes_keep_no_names_and_other_items_are_refused(old: ResidualQuantizer, x: np.ndarray) -> None:
    sids, ids = old.assign(x), [f"i{k}" for k in range(len(x))]
    catalogue, strangers = catalogue_of(ids, sids), catalogue_of([f"other{k}" for k in range(len(x))], sids)
    with pytest.raises(ValueError, match="have none in common"):
        refit(old, catalogue, old, strangers)
    smaller = ResidualQuantizer.fit(x, levels=2, codes=8, seed=0)
    made = refit(smaller, catalogue_of(ids, smaller.assign(x)), old, catalogue)
    assert (made.quantizer.version, made.kept) == (smaller.version, {})
    assert made.mapping["new_sid"].to_pylist() == smaller.assign(x).tolist()
