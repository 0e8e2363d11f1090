"""Nearest centroids of many rows: exact, in chunks of bounded memory, on all cores, and the same on any number of them.

``argmin_k |x - c_k|^2 + price_k`` is one matrix product, because |x|^2 is the same for every k. Each chunk is computed
by one thread with one BLAS thread, so how the work is shared out does not touch a single bit of the result. Left out:
approximate search; at 64 dimensions of noise it misses the nearest centroid too often to be worth its index.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

CHUNK_CELLS = 2_000_000
"""Distances held at a time by each thread: 8 MB."""


def nearest(x: np.ndarray, centroids: np.ndarray, prices: np.ndarray | None = None) -> np.ndarray:
    """Cheapest centroid int32 [n] of rows ``x`` [n, d]: least squared distance plus price (prices default to 0)."""
    result = np.empty(len(x), np.int32)

    def choose(rows: slice, costs: np.ndarray) -> None:
        result[rows] = costs.argmin(1)

    _each_chunk(x, centroids, prices, choose)
    return result


def shortlist(
    x: np.ndarray, centroids: np.ndarray, count: int, prices: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` cheapest centroids of each row, int32 [n, count] in no order, and their squared distances."""
    result = np.empty((len(x), count), np.int32)

    def choose(rows: slice, costs: np.ndarray) -> None:
        if count == costs.shape[1]:
            result[rows] = np.arange(count)
        else:
            result[rows] = np.argpartition(costs, count - 1, axis=1)[:, :count]

    _each_chunk(x, centroids, prices, choose)
    return result, listed_distances(x, centroids, result)


def listed_distances(x: np.ndarray, centroids: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Squared distances float32 [n, m] of each row to its ``listed`` [n, m] centroids."""
    result = np.empty(listed.shape, np.float32)
    for rows in _chunks(len(x), listed.shape[1] * x.shape[1]):
        gaps = centroids[listed[rows]] - x[rows, None, :]
        np.einsum("nmd,nmd->nm", gaps, gaps, out=result[rows])
    return result


def workers() -> int:
    """Cores this process may use; OMP_NUM_THREADS lowers it, as for BLAS."""
    cores = len(os.sched_getaffinity(0))
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(wanted))) if wanted.isdigit() else cores


def _each_chunk(
    x: np.ndarray,
    centroids: np.ndarray,
    prices: np.ndarray | None,
    use: Callable[[slice, np.ndarray], None],
) -> None:
    """Calls ``use(rows, costs)`` for every chunk; ``costs`` are (|x - c|^2 + price - |x|^2) / 2."""
    middle = centroids.mean(0, dtype=np.float64).astype(np.float32)  # far from 0, float32 loses small differences
    moved = centroids - middle
    half = 0.5 * (moved.astype(np.float64) ** 2).sum(1)
    if prices is not None:
        half = half + 0.5 * prices
    turned = np.ascontiguousarray(np.vstack([-moved.T, half[None]]).astype(np.float32))

    def work(rows: slice) -> None:
        part = np.empty((rows.stop - rows.start, x.shape[1] + 1), np.float32)
        np.subtract(x[rows], middle, out=part[:, :-1])
        part[:, -1] = 1
        use(rows, part @ turned)

    chunks = list(_chunks(len(x), len(centroids)))
    with _blas().limit(limits=1, user_api="blas"):
        if len(chunks) < 2 or workers() == 1:
            for rows in chunks:
                work(rows)
        else:
            with ThreadPoolExecutor(workers()) as pool:
                list(pool.map(work, chunks))


@cache
def _blas() -> ThreadpoolController:
    """Finding the loaded BLAS takes milliseconds: done once."""
    return ThreadpoolController()


def _chunks(n: int, width: int) -> Iterator[slice]:
    size = max(1, CHUNK_CELLS // max(width, 1))
    return (slice(first, min(first + size, n)) for first in range(0, n, size))
