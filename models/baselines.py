"""Popularity and item-based collaborative filtering: what every recommender has to beat (spec, section 8).

``ItemKNN`` is the strong form: cosine over engagement-weighted, time-decayed histories with shrinkage, queried
with the user's recent history where newer and stronger engagement counts more (Deshpande and Karypis 2004; the
decay after Ding and Li 2005). ``EngagementLog`` holds who saw what and is shared with the cascade. Left out:
matrix factorisation and learned similarities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from models.tokenizer.interactions import DAY_MS, item_rows, positive, strength, times, user_item

Ranked = list[list[tuple[str, float]]]
"""For each user: (item_id, score), best first."""

_TIME_BITS = 42  # milliseconds since 1970 fit until the year 2109


@dataclass(frozen=True, kw_only=True, eq=False)
class EngagementLog:
    """Exposures of known items as equally long arrays, sorted by user and time."""

    user_ids: pd.Index
    users: np.ndarray  # int64, row in user_ids
    items: np.ndarray  # int64, row in the item table
    times: np.ndarray  # int64, UTC ms
    weight: np.ndarray  # float32, engagement strength
    positive: np.ndarray  # bool
    play_s: np.ndarray  # float32, seconds

    @classmethod
    def of(cls, exposures: pa.Table, item_ids: pd.Index) -> "EngagementLog":
        """The log of the EXPOSURE rows whose item is listed."""
        rows = item_rows(exposures, item_ids)
        codes, user_ids = pd.factorize(np.asarray(exposures.column("user_id").to_pylist(), object))
        return cls._sorted(
            pd.Index(user_ids, dtype=object),
            rows >= 0,
            users=codes.astype(np.int64),
            items=rows,
            times=times(exposures),
            weight=strength(exposures),
            positive=positive(exposures),
            play_s=(exposures.column("play_ms").to_numpy() / 1000).astype(np.float32),
        )

    @classmethod
    def _sorted(cls, user_ids: pd.Index, kept: np.ndarray, **columns: np.ndarray) -> "EngagementLog":
        columns = {name: column[kept] for name, column in columns.items()}
        order = np.lexsort((columns["items"], columns["times"], columns["users"]))
        moves = [np.diff(columns[name][order], prepend=-1) != 0 for name in ("users", "times", "items")]
        order = order[np.logical_or.reduce(moves)]  # the same view delivered twice counts once
        return cls(user_ids=user_ids, **{name: column[order] for name, column in columns.items()})

    def __len__(self) -> int:
        return len(self.users)

    def extended(self, other: "EngagementLog") -> "EngagementLog":
        """Both logs as one; their items must be rows of the same item table."""
        user_ids = self.user_ids.append(other.user_ids.difference(self.user_ids, sort=False))
        moved = replace(other, users=user_ids.get_indexer(other.user_ids)[other.users].astype(np.int64))
        names = ("users", "items", "times", "weight", "positive", "play_s")
        columns = {name: np.concatenate([getattr(self, name), getattr(moved, name)]) for name in names}
        return self._sorted(user_ids, np.ones(len(columns["users"]), bool), **columns)

    def before(self, time_ms: int) -> "EngagementLog":
        """The part strictly earlier than ``time_ms``."""
        return self._take(self.times < time_ms)

    def _take(self, kept: np.ndarray) -> "EngagementLog":
        names = ("users", "items", "times", "weight", "positive", "play_s")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def rows_of(self, user_ids: Sequence[str]) -> np.ndarray:
        """Row of each user, int64; -1 where unknown."""
        return self.user_ids.get_indexer(pd.Index(user_ids, dtype=object)).astype(np.int64)

    def histories(
        self, users: np.ndarray, times_ms: np.ndarray, limit: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The latest ``limit`` events of each (user, time) strictly before the time.

        Returns (query, event, rank): for every event found its query number, its row here, and its place
        counted from the newest (0).
        """
        key = (self.users << _TIME_BITS) | self.times
        end = np.searchsorted(key, (np.maximum(users, 0) << _TIME_BITS) | times_ms)
        start = np.maximum(np.searchsorted(self.users, np.maximum(users, 0)), end - limit)
        counts = np.where(users >= 0, np.maximum(end - start, 0), 0)
        query = np.repeat(np.arange(len(users)), counts)
        rank = np.repeat(np.cumsum(counts), counts) - np.arange(len(query)) - 1
        return query, end[query] - 1 - rank, rank


@dataclass(frozen=True, kw_only=True)
class KNNConfig:
    """Settings of ItemKNN; the values are ours, tried on KuaiRand-Pure."""

    neighbours: int = 300
    target_norm: float = 0.25  # 0.5 is the cosine; less keeps more of the recommended item's popularity
    shrinkage: float = 10.0  # co-engagement added to the denominator: distrusts rare pairs
    impression: float = 0.5  # a mere impression relative to a long view, in similarities
    half_life_days: float = 14.0  # of an event, in similarities and in queries
    history: int = 64  # latest exposures of the user in a query
    rank_decay: float = 0.95  # from one exposure of the query to the one before

    def __post_init__(self) -> None:
        if min(self.neighbours, self.history) < 1 or self.half_life_days <= 0 or not 0 < self.rank_decay <= 1:
            raise ValueError(f"got {self}; neighbours and history must be positive, decays in (0, 1]")


class Popularity:
    """Everyone gets the items with most recent engagement that they have not seen."""

    def __init__(self, item_ids: pd.Index, log: EngagementLog, scores: np.ndarray) -> None:
        self.item_ids = item_ids
        self.log = log
        self.scores = scores

    @classmethod
    def fit(cls, exposures: pa.Table, items: pa.Table, *, now_ms: int, half_life_days: float = 3.0) -> "Popularity":
        """Counts the engagement before ``now_ms``, halved every ``half_life_days``."""
        item_ids = item_index(items)
        log = EngagementLog.of(exposures, item_ids).before(now_ms)
        return cls(item_ids, log, decayed_popularity(log, len(item_ids), now_ms, half_life_days))

    def recommend(
        self, user_ids: Sequence[str], now_ms: int, num_items: int, exclude: Sequence[set[str]] | None = None
    ) -> Ranked:
        """For each user the best ``num_items`` unseen items with their scores; fewer when items run out."""
        scores = np.tile(self.scores, (len(user_ids), 1))
        scores[unavailable(self.log, self.item_ids, user_ids, now_ms, exclude)] = -np.inf
        return top(scores, self.item_ids, num_items)


class ItemKNN:
    """Scores items by their similarity to the user's recent history; unknown users get popular items."""

    def __init__(
        self,
        item_ids: pd.Index,
        log: EngagementLog,
        similarity: sparse.csr_matrix,
        config: KNNConfig,
        popular: np.ndarray,
    ) -> None:
        self.item_ids = item_ids
        self.log = log
        self.similarity = similarity
        self.config = config
        self.popular = popular

    @classmethod
    def fit(cls, exposures: pa.Table, items: pa.Table, *, now_ms: int, config: KNNConfig | None = None) -> "ItemKNN":
        """Similarities from the engagement before ``now_ms``."""
        config = config or KNNConfig()
        item_ids = item_index(items)
        log = EngagementLog.of(exposures, item_ids).before(now_ms)
        popular = decayed_popularity(log, len(item_ids), now_ms, config.half_life_days)
        return cls(item_ids, log, similarities(log, len(item_ids), now_ms, config), config, popular)

    def recommend(
        self, user_ids: Sequence[str], now_ms: int, num_items: int, exclude: Sequence[set[str]] | None = None
    ) -> Ranked:
        """For each user the best ``num_items`` unseen items with their scores; fewer when items run out."""
        moments = np.full(len(user_ids), now_ms, np.int64)
        queries = knn_queries(self.log, self.log.rows_of(user_ids), moments, len(self.item_ids), self.config)
        # Popularity only breaks ties, and ranks what no neighbour reaches.
        scores = (queries @ self.similarity).toarray() + 1e-6 * self.popular / max(float(self.popular.max()), 1e-9)
        scores[unavailable(self.log, self.item_ids, user_ids, now_ms, exclude)] = -np.inf
        return top(scores, self.item_ids, num_items)


def item_index(items: pa.Table) -> pd.Index:
    """Item ids in row order; raises ValueError when there are none or one is repeated."""
    index = pd.Index(items.column("item_id").to_pylist(), dtype=object)
    if not len(index) or not index.is_unique:
        raise ValueError(f"got {len(index)} item rows of {index.nunique()} ids; expected one row an item, and some")
    return index


def similarities(log: EngagementLog, n_items: int, now_ms: int, config: KNNConfig) -> sparse.csr_matrix:
    """Shrunk cosine [items, items] of co-engagement (see ``target_norm``): each row's ``neighbours`` largest."""
    liked = np.where(log.weight > 0, np.maximum(log.weight, config.impression), 0)
    weight = (liked * 0.5 ** ((now_ms - log.times) / (config.half_life_days * DAY_MS))).astype(np.float32)
    engaged = user_item(log.users, log.items, weight, (len(log.user_ids), n_items))
    together = sparse.csr_matrix(engaged.T @ engaged)
    length = np.sqrt(together.diagonal())
    together.setdiag(0)
    together.eliminate_zeros()
    pairs = together.tocoo()
    source, target = length[pairs.row] ** (2 - 2 * config.target_norm), length[pairs.col] ** (2 * config.target_norm)
    cosine = pairs.data / (source * target + config.shrinkage)
    order = np.lexsort((-cosine, pairs.row))
    place = np.arange(len(order)) - np.repeat(*_starts(np.bincount(pairs.row, minlength=n_items)))
    kept = order[place < config.neighbours]
    return sparse.csr_matrix(
        (cosine[kept].astype(np.float32), (pairs.row[kept], pairs.col[kept])), shape=(n_items,) * 2
    )


def _starts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum(counts) - counts, counts


def knn_queries(
    log: EngagementLog, users: np.ndarray, times_ms: np.ndarray, n_items: int, config: KNNConfig
) -> sparse.csr_matrix:
    """Recency-weighted engagement [queries, items] of each (user, time) strictly before the time."""
    query, event, rank = log.histories(users, times_ms, config.history)
    age = (times_ms[query] - log.times[event]) / (config.half_life_days * DAY_MS)
    weight = log.weight[event] * config.rank_decay**rank * 0.5**age
    return sparse.csr_matrix((weight.astype(np.float32), (query, log.items[event])), shape=(len(users), n_items))


def decayed_popularity(log: EngagementLog, n_items: int, now_ms: int, half_life_days: float) -> np.ndarray:
    """Sum of engagement weights float32 [items], halved every ``half_life_days`` before ``now_ms``."""
    decay = 0.5 ** ((now_ms - log.times) / (half_life_days * DAY_MS))
    return np.bincount(log.items, log.weight * decay, n_items).astype(np.float32)


def unavailable(
    log: EngagementLog,
    item_ids: pd.Index,
    user_ids: Sequence[str],
    now_ms: int,
    exclude: Sequence[set[str]] | None,
) -> np.ndarray:
    """bool [users, items]: what the user has seen, or the caller excludes.

    Raises ValueError when ``exclude`` is not one set a user.
    """
    if exclude is not None and len(exclude) != len(user_ids):
        raise ValueError(f"exclude has {len(exclude)} sets for {len(user_ids)} users; give one set a user")
    blocked = np.zeros((len(user_ids), len(item_ids)), bool)
    moments = np.full(len(user_ids), now_ms, np.int64)
    query, event, _ = log.histories(log.rows_of(user_ids), moments, len(log) + 1)
    blocked[query, log.items[event]] = True
    for row, names in enumerate(exclude or ()):
        found = item_ids.get_indexer(pd.Index(sorted(names), dtype=object)) if names else np.zeros(0, int)
        blocked[row, found[found >= 0]] = True
    return blocked


def top(scores: np.ndarray, item_ids: pd.Index, num_items: int) -> Ranked:
    """The ``num_items`` best finite scores of each row of ``scores`` [users, items], ties by row order."""
    if num_items < 1:
        raise ValueError(f"num_items is {num_items}; ask for at least one item")
    ranked: Ranked = []
    for row in scores:
        best = np.argsort(-row, kind="stable")[:num_items]
        ranked.append([(item_ids[item], float(row[item])) for item in best if np.isfinite(row[item])])
    return ranked
