import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from models.tokenizer import balance, nearest
from models.tokenizer import kmeans as module
from models.tokenizer.balance import balanced_assign, balanced_nearest, capacity_of, greedy_assign
from models.tokenizer.kmeans import distances, kmeans, means, mse


def blobs(n: int, d: int, seed: int) -> np.ndarray:
    """Rows around 12 centres of very unequal weight, which is what balancing has to fight."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, d)) * 2
    return (centres[rng.choice(12, n, p=rng.dirichlet(np.full(12, 0.4)))] + rng.normal(size=(n, d))).astype(np.float32)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=60)
def test_balanced_assignment_is_nearly_the_cheapest_within_capacity(n: int, k: int, spare: int, seed: int) -> None:
    cost = np.random.default_rng(seed).random((n, k))
    capacity = -(-n // k) + spare
    assignment = balanced_assign(cost, capacity, tolerance=1e-3)
    assert np.bincount(assignment, minlength=k).max() <= capacity
    rows, places = linear_sum_assignment(np.repeat(cost, capacity, axis=1))
    best = cost[rows, places // capacity].sum()
    assert best - 1e-9 <= cost[np.arange(n), assignment].sum() <= best * 1.02 + 1e-3


@pytest.mark.parametrize("k", [7, 32])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_balanced_clusters_beat_the_greedy_of_the_paper(k: int, seed: int) -> None:
    x = blobs(1000, 8, seed)
    capacity = capacity_of(len(x), k, slack=0)
    centroids, assignment = kmeans(x, k, slack=0, seed=seed)
    assert np.bincount(assignment, minlength=k).max() <= capacity
    greedy, _ = kmeans(x, k, balanced=False, seed=seed)
    errors = []
    for _ in range(10):
        filled = greedy_assign(distances(x, greedy), capacity)
        assert np.bincount(filled).max() <= capacity
        greedy = means(x, filled, greedy)
        errors.append(mse(x, greedy, filled))
    assert mse(x, centroids, assignment) < min(errors)


def test_plain_kmeans_has_the_least_error_and_nearest_assignments() -> None:
    x = blobs(800, 8, 0)
    centroids, assignment = kmeans(x, 16, balanced=False)
    nearest = distances(x, centroids).argmin(1)
    assert (assignment == nearest).mean() > 0.99
    assert mse(x, centroids, assignment) < mse(x, *kmeans(x, 16))


def test_equal_seeds_give_equal_codebooks() -> None:
    x = blobs(600, 8, 0)
    first, second, other = kmeans(x, 16, seed=3), kmeans(x, 16, seed=3), kmeans(x, 16, seed=4)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert (first[0] != other[0]).any()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_repeated_rows_still_balance() -> None:
    x = np.repeat(blobs(20, 4, 0), 30, axis=0)
    _, assignment = kmeans(x, 32, slack=0)
    assert np.bincount(assignment, minlength=32).max() <= -(-600 // 32)


def test_capacity_is_five_per_cent_over_the_even_share_or_exact() -> None:
    assert capacity_of(12_101, 256) == 50
    assert capacity_of(12_101, 256, slack=0) == 48
    assert capacity_of(10, 10) == 2
    assert capacity_of(10, 10, slack=0) == 1


@given(st.integers(1, 80), st.integers(1, 30), st.sampled_from([0.0, 0.05, 0.5]), st.integers(0, 1000))
@settings(max_examples=40)
def test_short_lists_find_what_the_whole_matrix_finds(n: int, k: int, slack: float, seed: int) -> None:
    x, centroids = np.split(np.random.default_rng(seed).normal(size=(n + k, 3)).astype(np.float32), [n])
    capacity = capacity_of(n, k, slack)
    assignment = balanced_nearest(x, centroids, capacity, tolerance=1e-3)
    assert np.bincount(assignment, minlength=k).max() <= capacity
    cost = distances(x, centroids)
    rows, places = linear_sum_assignment(np.repeat(cost, capacity, axis=1))
    best = cost[rows, places // capacity].sum()
    assert best - 1e-4 <= cost[np.arange(n), assignment].sum() <= best * 1.02 + 1e-2


def test_rows_without_a_place_after_all_rounds_are_housed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(500, 8, 0)
    centroids, _ = kmeans(x, 32, balanced=False)
    patient = balanced_nearest(x, centroids, 16)
    monkeypatch.setattr(balance, "ROUNDS", 2)
    hasty = balanced_nearest(x, centroids, 16)
    for assignment in (patient, hasty):
        assert np.bincount(assignment, minlength=32).max() <= 16
    assert mse(x, centroids, patient) <= mse(x, centroids, hasty)


def test_chunks_and_workers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(900, 8, 0)
    whole = kmeans(x, 64)
    monkeypatch.setattr(nearest, "CHUNK_CELLS", 64 * 50)
    monkeypatch.setattr(nearest, "workers", lambda: 3)
    assert all((a == b).all() for a, b in zip(kmeans(x, 64), whole, strict=True))


@pytest.mark.parametrize("balanced", [True, False])
def test_batches_come_near_to_taking_all_rows_at_once(monkeypatch: pytest.MonkeyPatch, balanced: bool) -> None:
    x = blobs(3000, 8, 0)
    whole = mse(x, *kmeans(x, 32, balanced=balanced))
    monkeypatch.setattr(module, "BATCH", 500)
    centroids, assignment = kmeans(x, 32, balanced=balanced)
    assert mse(x, centroids, assignment) < 1.15 * whole
    if balanced:
        assert np.bincount(assignment, minlength=32).max() <= capacity_of(3000, 32)


def test_a_cluster_left_empty_takes_a_far_row() -> None:
    x = np.vstack([np.zeros((50, 2)), np.full((3, 2), 9.0), np.full((3, 2), -9.0)]).astype(np.float32)
    centroids, assignment = kmeans(x, 3, balanced=False)
    assert mse(x, centroids, assignment) == 0
    assert len(np.unique(assignment)) == 3


def test_rows_far_from_zero_lose_no_precision() -> None:
    x = blobs(300, 8, 0)
    near, far = (kmeans(x + offset, 16, balanced=False)[1] for offset in (0, 1000))
    assert (near == far).mean() > 0.95


def test_one_cluster_and_one_row_each() -> None:
    x = blobs(9, 3, 0)
    assert (kmeans(x, 1)[1] == 0).all()
    assert sorted(kmeans(x, 9)[1]) == list(range(9))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((3, 2)), "3 rows for 4 clusters"),
        (np.zeros((8, 2)), "all 8 rows are equal"),
        (np.array([[0.0, np.nan]] * 5), "5 of 5 rows hold NaN"),
        (np.zeros(8), "expected rows and columns"),
    ],
)
def test_bad_rows_are_refused(x: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(x, 4)


def test_too_little_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="hold 4 rows; 5 were given"):
        balanced_assign(np.zeros((5, 2)), 2)
