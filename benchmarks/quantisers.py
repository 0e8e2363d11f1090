"""Residual quantisers side by side: ours, plain, the first paper's greedy, scikit-learn's and faiss's K-means.

Every rival fits the same levels on the same residuals and gives codebooks and SIDs, which one function measures.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans

from models.tokenizer.balance import capacity_of, greedy_assign
from models.tokenizer.kmeans import distances, means
from models.tokenizer.quality import codebook_report
from models.tokenizer.residual import ResidualQuantizer
from models.tokenizer.separate import separate

GREEDY_ROUNDS = 10

Level = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
"""``level(residual, codes, seed)`` -> centroids and assignment."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A rival's codebooks [levels, codes, dim] and SIDs int32 [n, levels], and the seconds of its fit alone."""

    codebooks: np.ndarray
    sids: np.ndarray
    seconds: float


def ours(slack: float = 0.05, balanced: bool = True, **options: Any) -> Callable[..., Fitted]:
    """This project's; ``balanced=False`` is the plain residual K-means of the papers."""

    def fit(x: np.ndarray, levels: int, codes: int, seed: int = 0) -> Fitted:
        start = time.perf_counter()
        quantizer = ResidualQuantizer.fit(
            x, levels=levels, codes=codes, balanced=balanced, slack=slack, seed=seed, **options
        )
        seconds = time.perf_counter() - start
        return Fitted(codebooks=quantizer.codebooks, sids=quantizer.assign(x, balanced=balanced), seconds=seconds)

    return fit


def level_by_level(level: Level) -> Callable[..., Fitted]:
    """Residual quantisation with any K-means of one level."""

    def fit(x: np.ndarray, levels: int, codes: int, seed: int = 0) -> Fitted:
        start = time.perf_counter()
        residual, codebooks, sids = x.copy(), [], []
        for number in range(levels):
            centroids, assignment = level(residual, codes, seed + number)
            codebooks.append(centroids.astype(np.float32))
            sids.append(assignment.astype(np.int32))
            residual -= codebooks[-1][sids[-1]]
        return Fitted(codebooks=np.stack(codebooks), sids=np.stack(sids, axis=1), seconds=time.perf_counter() - start)

    return fit


def _greedy(x: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """O1's Algorithm 1: random centroids, then rounds of the sequential greedy, exact ceil(n / k)."""
    centroids = x[np.random.default_rng(seed).choice(len(x), k, replace=False)]
    capacity = capacity_of(len(x), k, slack=0)
    assignment = np.zeros(len(x), np.int32)
    for _ in range(GREEDY_ROUNDS):
        assignment = greedy_assign(distances(x, centroids), capacity)
        centroids = means(x, assignment, centroids)
    return centroids, assignment


def _kmeans(x: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    fitted = KMeans(k, n_init=1, random_state=seed).fit(x)
    return fitted.cluster_centers_, fitted.labels_


def _minibatch(x: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    fitted = MiniBatchKMeans(k, n_init=1, random_state=seed).fit(x)
    return fitted.cluster_centers_, fitted.predict(x)


def _faiss(x: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    fitted = faiss.Kmeans(x.shape[1], k, niter=25, seed=seed, min_points_per_centroid=1)
    fitted.train(np.ascontiguousarray(x))
    _, nearest = fitted.index.search(np.ascontiguousarray(x), 1)
    return np.asarray(fitted.centroids), nearest[:, 0]


def rivals() -> dict[str, Callable[..., Fitted]]:
    """All by name; faiss only where it is installed."""
    named = {
        "balanced": ours(),
        "balanced_exact": ours(slack=0.0),
        "balanced_no_sweeps": ours(sweeps=0),
        "plain": ours(balanced=False),
        "greedy": level_by_level(_greedy),
        "sklearn_kmeans": level_by_level(_kmeans),
        "sklearn_minibatch": level_by_level(_minibatch),
    }
    if importlib.util.find_spec("faiss") is not None:
        named["faiss"] = level_by_level(_faiss)
    return named


def measured(x: np.ndarray, fitted: Fitted, pairs: np.ndarray) -> dict[str, Any]:
    """Quality of a rival's SIDs, and what separating the colliding ones costs it."""
    report = codebook_report(x, fitted.sids, fitted.codebooks, pairs=pairs)
    codes = fitted.codebooks.shape[1]
    capacity = max(capacity_of(len(x), codes), int(np.bincount(fitted.sids[:, -1]).max()))
    rest = x.copy()
    for level in range(fitted.sids.shape[1] - 1):
        rest -= fitted.codebooks[level][fitted.sids[:, level]]
    unique = separate(fitted.sids, rest, fitted.codebooks[-1], capacity)
    after = codebook_report(x, unique, fitted.codebooks)
    kept: tuple[str, ...] = (
        "mse",
        "mse_share_of_variance",
        "unique_sid_share",
        "largest_collision",
        "perplexity",
        "entropy_nats",
    )
    kept += ("utilisation", "gini", "dead_codes", "largest_cluster", "neighbour_hit_rate")
    return {name: report[name] for name in kept} | {
        "unique_after_separation": after["unique_sid_share"],
        "mse_after_separation": after["mse"],
        "largest_cluster_after_separation": after["largest_cluster"],
        "fit_seconds": fitted.seconds,
    }
