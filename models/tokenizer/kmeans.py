"""K-means, plain and balanced (OneRec, arXiv 2502.18965, Algorithm 1; spec of the tokenizer: V1 2.1.2).

Balanced means: no cluster holds more than ceil(n / k) rows, so every code carries about the same number of
items and a level's token entropy is near its maximum. The paper fills cluster after cluster with its nearest
unassigned rows, which leaves the last clusters with leftovers; ``greedy_assign`` is that rule, kept as the
baseline. ``balanced_assign`` is an auction (Bertsekas, "The auction algorithm for assignment with similar
objects"): rows bid for places in clusters, a full cluster's price rises, and the result is near
(within n bid increments of) the cheapest assignment that respects the capacities. Left out: sparse candidate lists and
several machines; n x k distances are held in memory.
"""

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

_BALANCED_ROUNDS = 8  # ours: later rounds change the error by about 0.1 %
_COARSE = 0.1  # bid increment while centroids still move; finer ones end at the same error, several times later


def kmeans(
    x: np.ndarray, k: int, *, balanced: bool = True, iters: int = 30, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids float32 [k, d] and the assignment int32 [n] of rows ``x`` [n, d]; equal seeds give equal results.

    Raises ValueError when there are fewer rows than clusters, when all rows are equal or any is not finite.
    """
    x = _checked(x, k)
    with threadpool_limits(limits=1):  # several threads add the same numbers in another order
        lloyd = KMeans(k, n_init=1, max_iter=iters, random_state=seed, algorithm="lloyd").fit(x)
        centroids, assignment = lloyd.cluster_centers_.astype(np.float32), lloyd.labels_.astype(np.int32)
        if balanced:
            centroids, assignment = _balance(x, centroids)
    return centroids, assignment


def _balance(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Alternates the capacity-constrained assignment and the means until the error stops falling."""
    capacity = -(-len(x) // len(centroids))
    best = np.inf
    assignment = np.zeros(len(x), np.int32)
    for _ in range(_BALANCED_ROUNDS):
        proposal = balanced_assign(distances(x, centroids), capacity, tolerance=_COARSE)
        moved = means(x, proposal, centroids)
        error = mse(x, moved, proposal)
        if error >= best:
            break
        best, centroids, assignment = error, moved, proposal
    return centroids, assignment


def balanced_assign(cost: np.ndarray, capacity: int, *, tolerance: float = 5e-3) -> np.ndarray:
    """Cluster int32 [n] of each row of ``cost`` [n, k], at most ``capacity`` a cluster, at nearly least total cost.

    ``tolerance`` is the bid increment, as a share of a row's typical cost: smaller is slower and nearer to the
    optimum. Raises ValueError when the clusters cannot hold all rows.
    """
    n, k = cost.shape
    _check_capacity(n, k, capacity)
    cost = cost.astype(np.float64)
    if k == 1:
        return np.zeros(n, np.int32)
    # The second term keeps repeated rows, whose nearest cost may be 0, from outbidding each other by nothing.
    epsilon = tolerance * max(float(cost.min(1).mean()), 0.1 * float(cost.mean()), 1e-12)
    assignment = np.full(n, -1, np.int32)
    bids = np.zeros(n)
    prices = np.zeros(k)
    homeless = np.arange(n)
    while len(homeless):
        values = cost[homeless] + prices
        nearest = values.argmin(1)
        best = values[np.arange(len(homeless)), nearest]
        values[np.arange(len(homeless)), nearest] = np.inf
        # A row bids up to the point where its second choice would be as good, plus epsilon.
        bids[homeless] = prices[nearest] + values.min(1) - best + epsilon
        assignment[homeless] = nearest
        _settle(assignment, bids, prices, np.unique(nearest), capacity)
        homeless = np.flatnonzero(assignment < 0)
    return assignment


def _settle(assignment: np.ndarray, bids: np.ndarray, prices: np.ndarray, clusters: np.ndarray, capacity: int) -> None:
    """Keeps the highest bids of each over-full cluster, in place; a full cluster's price is its lowest kept bid."""
    touched = np.zeros(len(prices) + 1, bool)  # the last entry stands for "no cluster", -1
    touched[clusters] = True
    members = np.flatnonzero(touched[assignment])
    members = members[np.lexsort((members, -bids[members], assignment[members]))]
    owners = assignment[members]
    starts = np.searchsorted(owners, clusters)
    counts = np.diff(np.append(starts, len(owners)))
    rank = np.arange(len(members)) - np.repeat(starts, counts)
    assignment[members[rank >= capacity]] = -1
    full = counts >= capacity
    prices[clusters[full]] = bids[members[starts[full] + capacity - 1]]


def greedy_assign(cost: np.ndarray, capacity: int) -> np.ndarray:
    """O1's Algorithm 1: cluster after cluster takes its ``capacity`` nearest rows of those left; int32 [n]."""
    n, k = cost.shape
    _check_capacity(n, k, capacity)
    assignment = np.full(n, -1, np.int32)
    left = np.arange(n)
    for cluster in range(k):
        order = np.argsort(cost[left, cluster], kind="stable")
        assignment[left[order[:capacity]]] = cluster
        left = np.sort(left[order[capacity:]])
    return assignment


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances float64 [n, k], never negative."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    squared = (x**2).sum(1)[:, None] - 2 * x @ centroids.T + (centroids**2).sum(1)
    return np.maximum(squared, 0)


def means(x: np.ndarray, assignment: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Mean row of each cluster, float32 [k, d]; an empty cluster keeps its ``fallback`` centroid."""
    k = len(fallback)
    counts = np.bincount(assignment, minlength=k)
    sums = np.stack([np.bincount(assignment, weights=column, minlength=k) for column in x.T.astype(np.float64)], axis=1)
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], fallback).astype(np.float32)


def mse(x: np.ndarray, centroids: np.ndarray, assignment: np.ndarray) -> float:
    """Mean squared distance of the rows to their centroid, summed over the d dimensions."""
    return float(((x - centroids[assignment]).astype(np.float64) ** 2).sum(1).mean())


def _checked(x: np.ndarray, k: int) -> np.ndarray:
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


def _check_capacity(n: int, k: int, capacity: int) -> None:
    if n > k * capacity:
        raise ValueError(f"{k} clusters of at most {capacity} hold {k * capacity} rows; {n} were given")
