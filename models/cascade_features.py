"""What the cascade's ranker looks at: item statistics, user histories, and the features of (user, item) pairs.

Everything is computed as of a moment from events strictly before it, by the same code for training rows and for
requests. Left out: user profile attributes and cross features learned by embedding.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from models.baselines import EngagementLog, KNNConfig, decayed_popularity, item_index, knn_queries
from models.tokenizer.interactions import DAY_MS

FEATURES = (
    "knn", "knn_share", "popularity", "impressions", "item_long_view", "item_play", "item_play_ratio",
    "author_long_view", "author_play", "tag_long_view", "tag_play", "user_tag_seen", "user_tag_liked",
    "user_tag_rate", "user_author_liked", "user_views", "user_long_view", "user_play", "duration",
    "duration_beyond_liked", "item_age", "hour",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Items:
    """What the cascade knows of its items, row by row."""

    ids: pd.Index
    duration_s: np.ndarray  # float64 [n]
    upload_ms: np.ndarray  # float64 [n], nan = unknown
    tags: sparse.csr_matrix  # [n, tags], rows sum to 1 (0 for untagged)
    authors: sparse.csr_matrix  # [n, authors]

    @classmethod
    def of(cls, items: pa.Table) -> "Items":
        uploaded = items.column("upload_time").cast(pa.int64()).to_pandas().to_numpy(np.float64, na_value=np.nan)
        return cls(
            item_index(items),
            items.column("duration_ms").to_numpy() / 1000,
            uploaded,
            _multi_hot([names or [] for names in items.column("tags").to_pylist()]),
            _multi_hot([[name] if name else [] for name in items.column("author_id").to_pylist()]),
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Item statistics from the events before ``now_ms``."""

    now_ms: int
    similarity: sparse.csr_matrix
    popularity: np.ndarray
    impressions: np.ndarray
    columns: dict[str, np.ndarray]  # smoothed rates of the item, its author and its tags, float [n]

    @classmethod
    def of(
        cls, log: EngagementLog, items: Items, now_ms: int, half_life_days: float, similarity: sparse.csr_matrix
    ) -> "Statistics":
        n = len(items.ids)
        decay = 0.5 ** ((now_ms - log.times) / (half_life_days * DAY_MS))
        play = np.log1p(log.play_s)
        ratio = np.minimum(log.play_s / np.maximum(items.duration_s[log.items], 1e-3), 2)
        seen = np.bincount(log.items, decay, n)
        columns = {}
        for name, value in (("long_view", log.positive), ("play", play), ("play_ratio", ratio)):
            total = np.bincount(log.items, value * decay, n)
            mean = total.sum() / max(seen.sum(), 1e-9)
            tag = _pooled(items.tags, total, seen, mean)
            author = _pooled(items.authors, total, seen, tag)
            columns[f"tag_{name}"], columns[f"author_{name}"] = tag, author
            columns[f"item_{name}"] = (total + 10 * author) / (seen + 10)
        popular = decayed_popularity(log, n, now_ms, half_life_days)
        return cls(now_ms, similarity, popular, np.bincount(log.items, minlength=n).astype(float), columns)


@dataclass(frozen=True, eq=False)
class Queries:
    """Users at moments: their recent histories as matrices with one row a query."""

    times_ms: np.ndarray
    knn: sparse.csr_matrix  # [queries, items], weighted history
    neighbours: sparse.csr_matrix  # [queries, items], similarity to the history
    tags_seen: sparse.csr_matrix  # [queries, tags]
    tags_liked: sparse.csr_matrix
    authors_liked: sparse.csr_matrix
    views: np.ndarray
    likes: np.ndarray
    play: np.ndarray  # mean log1p(seconds) of a view
    liked_duration: np.ndarray  # mean log1p(seconds) of liked items, nan without any

    @classmethod
    def of(
        cls,
        log: EngagementLog,
        users: np.ndarray,
        times_ms: np.ndarray,
        items: Items,
        similarity: sparse.csr_matrix,
        history: int,
        knn_config: KNNConfig,
    ) -> "Queries":
        n, b = len(items.ids), len(users)
        query, event, _ = log.histories(users, times_ms, history)
        seen = sparse.csr_matrix((np.ones(len(query), np.float32), (query, log.items[event])), shape=(b, n))
        good = log.positive[event]
        liked = sparse.csr_matrix((good.astype(np.float32), (query, log.items[event])), shape=(b, n))
        liked.eliminate_zeros()
        views, likes = np.bincount(query, minlength=b), np.bincount(query[good], minlength=b)
        knn = knn_queries(log, users, times_ms, n, knn_config)
        with np.errstate(invalid="ignore", divide="ignore"):
            play = np.bincount(query, np.log1p(log.play_s[event]), b) / views
            duration = (liked @ np.log1p(items.duration_s)) / likes
        return cls(
            times_ms=times_ms,
            knn=knn,
            neighbours=sparse.csr_matrix(knn @ similarity),
            tags_seen=sparse.csr_matrix(seen @ items.tags),
            tags_liked=sparse.csr_matrix(liked @ items.tags),
            authors_liked=sparse.csr_matrix(liked @ items.authors),
            views=views.astype(float),
            likes=likes.astype(float),
            play=play,
            liked_duration=duration,
        )


def features(queries: Queries, query: np.ndarray, item: np.ndarray, items: Items, statistics: Statistics) -> np.ndarray:
    """float32 [pairs, FEATURES] of (query, item) pairs."""
    columns = statistics.columns
    tags = items.tags[item]
    seen, liked = (_row_products(taste[query], tags) for taste in (queries.tags_seen, queries.tags_liked))
    rate = (queries.likes[query] + 3) / (queries.views[query] + 10)
    similar = np.asarray(queries.neighbours[query, item]).ravel()
    length = np.log1p(items.duration_s[item])
    table = {
        "knn": similar,
        "knn_share": similar / (np.asarray(queries.knn.sum(1)).ravel()[query] + 1e-3),
        "popularity": np.log1p(statistics.popularity[item]),
        "impressions": np.log1p(statistics.impressions[item]),
        **{name: columns[name][item] for name in FEATURES if name in columns},
        "user_tag_seen": seen,
        "user_tag_liked": liked,
        "user_tag_rate": (liked + 5 * rate) / (seen + 5),
        "user_author_liked": _row_products(queries.authors_liked[query], items.authors[item]),
        "user_views": queries.views[query],
        "user_long_view": rate,
        "user_play": queries.play[query],
        "duration": length,
        "duration_beyond_liked": length - queries.liked_duration[query],
        "item_age": np.log1p(np.maximum(queries.times_ms[query] - items.upload_ms[item], 0) / DAY_MS),
        "hour": (queries.times_ms[query] // 3_600_000) % 24,
    }
    return np.stack([table[name] for name in FEATURES], axis=1).astype(np.float32)


def _row_products(left: sparse.csr_matrix, right: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(left.multiply(right).sum(1)).ravel()


def _pooled(groups: sparse.csr_matrix, total: np.ndarray, seen: np.ndarray, prior: np.ndarray | float) -> np.ndarray:
    """Mean of a statistic over the groups (tags, author) of each item, shrunk towards ``prior``; float [n]."""
    totals, counts = groups @ (groups.T @ total), groups @ (groups.T @ seen)
    return (totals + 20 * prior) / (counts + 20)


def _multi_hot(names: list[list[str]]) -> sparse.csr_matrix:
    """float32 [n, vocabulary] with each row's names sharing weight 1."""
    vocabulary = {name: column for column, name in enumerate(sorted({name for row in names for name in row}))}
    rows = np.repeat(np.arange(len(names)), [len(row) for row in names])
    columns = [vocabulary[name] for row in names for name in row]
    weights = np.repeat([1 / max(len(row), 1) for row in names], [len(row) for row in names])
    shape = (len(names), max(len(vocabulary), 1))
    return sparse.csr_matrix((weights.astype(np.float32), (rows, columns)), shape=shape)
