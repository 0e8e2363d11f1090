"""Hierarchical K-means of one user's views: up to 100 000 items become at most ``limit`` clusters.

OneRec technical report (arXiv 2506.13695), section 2.2: split a set D into floor(cube root of |D|) clusters by K-means
on item embeddings and recurse until a cluster holds at most M items; the item nearest the centre stands for the
cluster, sparse features (item, labels) are taken from it, continuous ones (time, play, duration) averaged. M is not
published: the largest clusters are split first until ``limit`` are reached, so M is whatever fits. Equal items are one
point. Numpy only, and without luck: K-means starts from points evenly spaced in time, so equal views give equal
clusters. Left out: balanced clusters, and embeddings other than the published ones.

Shapes: n points (distinct items) of d dimensions, k clusters.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from features.histories.windows import Window, concat_windows

ITERATIONS = 8
SAMPLE = 256
"""Points per cluster that K-means looks at while it moves centres; all of them are assigned in the end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemVectors:
    """Vectors of items, as the tokenizer of ``version`` published them."""

    item_ids: np.ndarray
    """object [n], strings."""
    vectors: np.ndarray
    """float32 [n, d]"""
    version: str

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.item_ids) != len(self.vectors):
            raise ValueError(
                f"{len(self.item_ids)} item ids and vectors of shape {self.vectors.shape}; expected one row an item"
            )
        if not np.isfinite(self.vectors).all():
            raise ValueError(f"the vectors of version {self.version!r} are not all finite; publish them again")

    @cached_property
    def index(self) -> pd.Index:
        """Item ids in row order, for look-ups."""
        return pd.Index(self.item_ids, dtype=object)

    def rows(self, item_ids: np.ndarray) -> np.ndarray:
        """Row of each id, int64; -1 where the item has no vector."""
        return self.index.get_indexer(pd.Index(item_ids, dtype=object)).astype(np.int64)


def clusters(x: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of each point [n] of ``x`` [n, d], numbered from 0, and the point nearest each centre [k <= limit].

    Points in a meaningful order (oldest first) give spread-out starts; raises ValueError for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least one cluster")
    x = np.ascontiguousarray(x, np.float32)
    leaves = [np.arange(len(x))] if len(x) else []
    done: list[np.ndarray] = []
    while leaves and len(leaves) + len(done) < limit:
        leaves.sort(key=len, reverse=True)
        largest = len(leaves[0])
        # The children of the largest are about this big: whatever is larger is split in the same round.
        floor = max(1.0, largest / parts(largest))
        room, grown = limit - len(leaves) - len(done), []
        for points in leaves:
            if len(points) <= floor or room <= 0:
                grown.append(points)
                continue
            children = _split(x, points, min(parts(len(points)), room + 1))
            # Points that cannot be told apart stay together for good.
            (done if len(children) == 1 else grown).extend(children)
            room -= len(children) - 1
        if largest <= 1:
            break
        leaves = grown
    return _numbered(x, done + leaves)


def parts(count: int) -> int:
    """Into how many clusters a set of ``count`` is split: floor(cube root), at least two."""
    return max(2, int(np.floor(np.cbrt(count) + 1e-9)))


def _split(x: np.ndarray, points: np.ndarray, k: int) -> list[np.ndarray]:
    """The points of each non-empty cluster, ascending."""
    if k >= len(points):
        return [points[row : row + 1] for row in range(len(points))]
    own = x[points]
    assigned = _kmeans(own, k)
    order = np.argsort(assigned, kind="stable")
    bounds = np.flatnonzero(np.diff(assigned[order])) + 1
    return [points[rows] for rows in np.split(order, bounds)]


def _kmeans(x: np.ndarray, k: int) -> np.ndarray:
    """Lloyd's algorithm: the cluster [n] of each point; a cluster that loses all its points may stay empty."""
    sample = x if len(x) <= SAMPLE * k else x[np.linspace(0, len(x) - 1, SAMPLE * k).astype(np.int64)]
    centres = sample[((np.arange(k) + 0.5) * len(sample) / k).astype(np.int64)]
    assigned = np.full(len(sample), -1)
    for _ in range(ITERATIONS):
        before, assigned = assigned, _nearest(sample, centres)
        if np.array_equal(before, assigned):
            break
        # One-hot times points: a matrix product sums faster than any scatter.
        members = (assigned[:, None] == np.arange(k)).astype(np.float32)
        counts = members.sum(0)
        centres = np.where(counts[:, None] > 0, members.T @ sample / np.maximum(counts, 1)[:, None], centres)
    return assigned if sample is x else _nearest(x, centres)


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    # argmin |x - c|^2 = argmax x.c - |c|^2 / 2
    return np.asarray((x @ centres.T - 0.5 * (centres**2).sum(1)).argmax(1))


def _numbered(x: np.ndarray, leaves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of every point, and the point nearest each cluster's mean."""
    sizes = np.array([len(points) for points in leaves], np.int64)
    points = np.concatenate(leaves) if leaves else np.empty(0, np.int64)
    group = np.repeat(np.arange(len(leaves)), sizes)
    number = np.empty(len(x), np.int64)
    number[points] = group
    starts = np.cumsum(sizes) - sizes
    means = np.add.reduceat(x[points], starts, axis=0) / sizes[:, None] if len(leaves) else np.empty((0, x.shape[1]))
    distance = ((x[points] - means[group]) ** 2).sum(1)
    nearest = np.lexsort((points, distance, group))[starts] if len(leaves) else starts
    return number, points[nearest]


def compress(events: Window, counts: np.ndarray, vectors: ItemVectors, limit: int) -> tuple[Window, np.ndarray]:
    """At most ``limit`` clusters of ``events`` [n] (oldest first) that stand for ``counts`` [n] views each.

    Returns the clusters in order of their mean time, and how many views each stands for. Items without a vector cannot
    be compared: they stay on their own, the newest of them, in at most half the places.
    """
    if len(events) <= limit:
        return events, counts
    row = vectors.rows(events.item_ids)
    alone = np.flatnonzero(row < 0)[-max(limit // 2, 1) :]
    known = np.flatnonzero(row >= 0)
    if not len(known):
        keep = np.flatnonzero(row < 0)[-limit:]
        return events.take(keep), counts[keep]
    places = max(limit - len(alone), 1)
    # One point an item; in the order of first views, which is that of time.
    point, items = pd.factorize(row[known])
    number, central = clusters(vectors.vectors[items], places)
    group = number[point]
    window, size = _averaged(events.take(known), counts[known], point, group, central)
    if not len(alone):
        return window, size
    return _by_time(concat_windows([window, events.take(alone)]), np.r_[size, counts[alone]])


def _averaged(
    events: Window, counts: np.ndarray, point: np.ndarray, group: np.ndarray, central: np.ndarray
) -> tuple[Window, np.ndarray]:
    """One event a cluster: sparse fields of the newest view of its central item, means of the continuous ones."""
    newest = np.empty(int(point.max()) + 1, np.int64)
    newest[point] = np.arange(len(point))  # the last write wins, and views stand in order of time
    chosen = events.take(newest[central])
    size = np.bincount(group, counts, len(central))

    def mean(values: np.ndarray) -> np.ndarray:
        # Around the first value: times in ms times counts would leave the doubles' exact range.
        origin = int(values[0])
        total = np.bincount(group, (values - origin) * counts.astype(np.float64), len(central))
        return origin + np.floor(total / size).astype(np.int64)

    window = Window(
        ids=chosen.ids,
        item_ids=chosen.item_ids,
        times=mean(events.times),
        play_ms=mean(events.play_ms),
        duration_ms=mean(events.duration_ms),
        labels=chosen.labels,
    )
    return _by_time(window, size.astype(np.int64))


def _by_time(window: Window, counts: np.ndarray) -> tuple[Window, np.ndarray]:
    order = np.lexsort((window.ids, window.times))
    return window.take(order), counts[order]
