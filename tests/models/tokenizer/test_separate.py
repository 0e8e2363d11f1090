import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tokenizer.balance import capacity_of
from models.tokenizer.kmeans import distances
from models.tokenizer.separate import free_last_codes, separate


def spent(residual: np.ndarray, centroids: np.ndarray, sids: np.ndarray) -> float:
    return float(distances(residual, centroids)[np.arange(len(sids)), sids[:, -1]].sum())


@given(st.integers(1, 60), st.integers(0, 1000))
@settings(max_examples=40)
def test_sids_differ_within_capacity_and_prefixes_stay(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    residual, centroids = rng.normal(size=(n, 3)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    sids = np.column_stack([np.sort(rng.integers(0, max(n // 4, 1), n)), rng.integers(0, 8, n)]).astype(np.int32)
    capacity = max(capacity_of(n, 8, 0.5), int(np.bincount(sids[:, 1]).max()))
    result = separate(sids, residual, centroids, capacity)
    assert (result[:, 0] == sids[:, 0]).all()
    sizes = np.bincount(sids[:, 0])
    distinct = np.array([len(np.unique(result[result[:, 0] == prefix, 1])) for prefix in range(len(sizes))])
    assert (distinct == np.minimum(sizes, 8)).all()


def test_what_does_not_collide_stays_and_the_rest_is_cheapest() -> None:
    rng = np.random.default_rng(0)
    residual, centroids = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32)
    sids = np.array([[0, 1], [0, 1], [0, 2], [1, 0], [2, 0]], np.int32)
    result = separate(sids, residual, centroids, None)
    assert (result[3:] == sids[3:]).all()
    orders = [np.array(p) for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))]
    best = min(distances(residual[:3], centroids)[np.arange(3), order].sum() for order in orders)
    assert spent(residual[:3], centroids, result[:3]) == pytest.approx(best)


def test_a_last_code_that_separation_overloads_is_relieved() -> None:
    """Pairs of twins in 10 prefixes: the second of each would flock to the second-nearest code."""
    centroids = np.array([[0.0], [1.0], [5.0], [6.0]], np.float32)
    residual = np.zeros((20, 1), np.float32)
    sids = np.column_stack([np.repeat(np.arange(10), 2), np.zeros(20)]).astype(np.int32)
    free = separate(sids, residual, centroids, None)
    assert np.bincount(free[:, 1], minlength=4).tolist() == [10, 10, 0, 0]
    held = separate(sids, residual, centroids, 6)
    assert np.bincount(held[:, 1], minlength=4).max() <= 6
    assert len(np.unique(held, axis=0)) == 20


def test_a_new_row_does_not_touch_those_of_other_prefixes() -> None:
    centroids = np.array([[0.0], [1.0], [3.0]], np.float32)
    sids = np.array([[0, 0], [0, 0], [1, 0]], np.int32)
    taken = np.array([[0, 0], [2, 0]], np.int32)
    result = free_last_codes(sids, np.zeros((3, 1), np.float32), centroids, taken)
    assert result.tolist() == [[0, 1], [0, 2], [1, 0]]
