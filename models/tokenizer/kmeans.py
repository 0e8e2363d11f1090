"""K-means, plain and balanced (OneRec, arXiv 2502.18965, Algorithm 1; the technical report, arXiv 2506.13695, 2.1.2).

Balanced means: no cluster holds more than its capacity, so every code carries about the same number of items and
a level's token entropy is near its maximum. Both start from random rows. Up to ``BATCH`` rows are taken whole in each
iteration, first with prices that rise on crowded clusters (as cheap as plain K-means), then with strict capacities.
More rows are first seen in random batches, each centroid moving by 1 / (rows it has had) of the way (Sculley,
"Web-scale k-means clustering"). The batches of the last pass are balanced too: centroids that already lie where equal
clusters want them make the auction over all rows several times shorter. Nothing of size n x k is held (``nearest``).
Left out: k-means++, which costs more than it gains once clusters are balanced.
"""

import numpy as np

from models.tokenizer.balance import balanced_nearest, capacity_of
from models.tokenizer.nearest import nearest

BATCH = 50_000
"""Rows of one step; as many rows or fewer are clustered whole."""
PASSES = 2
"""How often the batches go over all rows, where there are more than ``BATCH``."""
PRICED = 20
"""Iterations with a price on crowded clusters, before capacities are kept strictly; for rows taken whole."""
PRICE_STEP = 0.1
"""How far an iteration moves a price, as a share of the mean error, for a cluster of twice its capacity. Twice the step
is no nearer to balance on the last level, and prices that may not fall below 0 leave it codes of one item."""
ROUNDS = 2
"""Iterations that keep capacities strictly, at the end; one after batches, of which the last pass was balanced."""
TOLERANCE = 0.2
"""Bid increment while centroids still move; finer ones end at the same error, several times later."""


def kmeans(
    x: np.ndarray, k: int, *, balanced: bool = True, slack: float = 0.05, iters: int = 30, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids float32 [k, d] and the assignment int32 [n] of rows ``x`` [n, d]; equal seeds give equal results.

    Balanced: at most ceil(n / k x (1 + slack)) rows a cluster. ``iters`` bounds the iterations of the plain one.
    Raises ValueError when there are fewer rows than clusters, when all rows are equal or any is not finite.
    """
    x = checked(x, k)
    rng = np.random.default_rng(seed)
    centroids = x[np.sort(rng.choice(len(x), k, replace=False))]
    if len(x) > BATCH:
        centroids = _in_batches(x, centroids, slack if balanced else None, rng)
    if not balanced:
        return _lloyd(x, centroids, 1 if len(x) > BATCH else iters)
    capacity = capacity_of(len(x), k, slack)
    if len(x) <= BATCH:
        centroids = _even_out(x, centroids, capacity)
    return _balance(x, centroids, capacity, ROUNDS if len(x) <= BATCH else 1)


def _lloyd(x: np.ndarray, centroids: np.ndarray, iters: int) -> tuple[np.ndarray, np.ndarray]:
    """Alternates nearest centroids and means until nothing moves; a cluster left empty takes a far row."""
    assignment = nearest(x, centroids)
    for _ in range(iters):
        centroids = _refilled(x, means(x, assignment, centroids), assignment)
        before, assignment = assignment, nearest(x, centroids)
        if (before == assignment).all():
            break
    return centroids, assignment


def _refilled(x: np.ndarray, centroids: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """``centroids`` with those of empty clusters moved onto the rows that are farthest from their own."""
    empty = np.flatnonzero(np.bincount(assignment, minlength=len(centroids)) == 0)
    if len(empty):
        far = ((x - centroids[assignment]) ** 2).sum(1)
        centroids[empty] = x[np.argsort(-far, kind="stable")[: len(empty)]]
    return centroids


def _in_batches(x: np.ndarray, centroids: np.ndarray, slack: float | None, rng: np.random.Generator) -> np.ndarray:
    """Centroids after ``PASSES`` over the rows in random batches, the last one balanced unless ``slack`` is None."""
    k = len(centroids)
    seen = np.ones(k)
    for left in reversed(range(PASSES)):
        order = rng.permutation(len(x))
        for first in range(0, len(x), BATCH):
            rows = x[np.sort(order[first : first + BATCH])]
            if left or slack is None:
                assignment = nearest(rows, centroids)
            else:
                assignment = balanced_nearest(rows, centroids, capacity_of(len(rows), k, slack), tolerance=TOLERANCE)
            count = np.bincount(assignment, minlength=k)
            seen += count
            # c <- c + (sum of its rows - count c) / rows seen so far
            moves = (means(rows, assignment, centroids) - centroids) * (count / seen)[:, None]
            centroids = (centroids + moves).astype(np.float32)
        seen /= 2  # the next pass starts from better places: it may move them further
    return centroids


def _even_out(x: np.ndarray, centroids: np.ndarray, capacity: int) -> np.ndarray:
    """Centroids after K-means in which a cluster's price rises while it holds more than ``capacity``, else falls."""
    prices, scale = np.zeros(len(centroids)), 0.0
    for _ in range(PRICED):
        assignment = nearest(x, centroids, prices)
        centroids = means(x, assignment, centroids)
        scale = scale or mse(x, centroids, assignment)
        loads = np.bincount(assignment, minlength=len(centroids))
        prices += PRICE_STEP * scale * (loads / capacity - 1)  # below 0 a sparse cluster attracts rows
    return centroids


def _balance(x: np.ndarray, centroids: np.ndarray, capacity: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids and assignment after ``rounds`` of capacity-constrained assignment and means."""
    assignment = np.zeros(len(x), np.int32)
    for _ in range(rounds):
        assignment = balanced_nearest(x, centroids, capacity, tolerance=TOLERANCE)
        centroids = means(x, assignment, centroids)
    return centroids, assignment


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances float64 [n, k], never negative: for few rows, all cells are held."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    squared = (x**2).sum(1)[:, None] - 2 * x @ centroids.T + (centroids**2).sum(1)
    return np.maximum(squared, 0)


def means(x: np.ndarray, assignment: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Mean row of each cluster, float32 [k, d]; an empty cluster keeps its ``fallback`` centroid."""
    k = len(fallback)
    counts = np.bincount(assignment, minlength=k)
    sums = np.stack([np.bincount(assignment, weights=column, minlength=k) for column in x.T], axis=1)
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], fallback).astype(np.float32)


def mse(x: np.ndarray, centroids: np.ndarray, assignment: np.ndarray) -> float:
    """Mean squared distance of the rows to their centroid, summed over the d dimensions."""
    total = 0.0
    for first in range(0, len(x), BATCH):
        rows = slice(first, first + BATCH)
        total += float(((x[rows] - centroids[assignment[rows]]).astype(np.float64) ** 2).sum())
    return total / len(x)


def checked(x: np.ndarray, k: int) -> np.ndarray:
    """``x`` as float32 [n, d]; raises ValueError when it cannot make ``k`` clusters."""
    x = np.asarray(x, np.float32)
    if x.ndim != 2:
        raise ValueError(f"K-means got an array of shape {x.shape}; expected rows and columns [n, d]")
    if not 1 <= k <= len(x):
        raise ValueError(f"K-means got {len(x)} rows for {k} clusters; give at least as many rows, or fewer codes")
    if not np.isfinite(x).all():
        raise ValueError(
            f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} rows hold NaN or infinity; clean them first"
        )
    if k > 1 and (x == x[0]).all():
        raise ValueError(f"all {len(x)} rows are equal; nothing separates them into {k} clusters: check the embeddings")
    return x
