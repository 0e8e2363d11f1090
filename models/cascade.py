"""The recommender OneRec replaces: recall, then a learned ranker (V1, arXiv 2506.13695, section 1, figure 2).

Recall joins item-to-item neighbours, the user's favourite tags and authors, popular and fresh items. A
gradient-boosted ranker orders them by expected play time (or the chance of a long view). It learns from logged
exposures in time slices: item statistics from before the slice, the user's history from before each request,
labels from the slice itself, so nothing from the future is ever a feature. Left out: pre-ranking (candidates
are few), user profile features, re-ranking for diversity.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from features.schema import ITEM, conform
from models.baselines import EngagementLog, KNNConfig, Ranked, similarities, top, unavailable
from models.cascade_features import Items, Queries, Statistics, features
from models.tokenizer.interactions import DAY_MS


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """Sizes of the recall sources and the ranker; the values are ours."""

    objective: Literal["play_time", "long_view"] = "play_time"
    neighbours: int = 150  # candidates by item-to-item similarity
    liked: int = 60  # candidates by the user's tags and authors
    popular: int = 60
    fresh: int = 40
    fresh_days: float = 3.0
    history: int = 64  # latest exposures of a user that features see
    half_life_days: float = 5.0  # of item statistics
    slices: int = 3  # training slices, of the newest ``trained_share`` of the log
    trained_share: float = 0.6
    rows: int = 120_000  # at most this many training exposures, the newest
    trees: int = 150
    seed: int = 0
    knn: KNNConfig = field(default_factory=KNNConfig)


class Cascade:
    """A fitted cascade with the user histories it has seen; ``observe`` adds newer events, ``add_items`` uploads."""

    def __init__(
        self,
        config: CascadeConfig,
        table: pa.Table,
        log: EngagementLog,
        ranker: HistGradientBoostingClassifier | HistGradientBoostingRegressor,
        statistics: Statistics,
    ) -> None:
        self.config = config
        self.ranker = ranker
        self._table = table
        self._items = Items.of(table)
        self._log = log
        self._statistics = statistics

    @classmethod
    def fit(
        cls, exposures: pa.Table, items: pa.Table, *, now_ms: int, config: CascadeConfig | None = None
    ) -> "Cascade":
        """Learns from EXPOSURE rows before ``now_ms`` (UTC ms); raises ValueError when they are fewer than 100."""
        config = config or CascadeConfig()
        table = conform(items, ITEM)
        known = Items.of(table)
        log = EngagementLog.of(exposures, known.ids).before(now_ms)
        if len(log) < 100:
            raise ValueError(f"{len(log)} exposures of known items before {now_ms}; the ranker needs at least 100")
        with threadpool_limits(limits=1):  # OpenMP spins: beside busy services, more threads are many times slower
            ranker = _train(log, known, config)
        similarity = similarities(log, len(known.ids), now_ms, config.knn)
        return cls(config, table, log, ranker, Statistics.of(log, known, now_ms, config.half_life_days, similarity))

    def observe(self, exposures: pa.Table) -> None:
        """Adds events newer than the fit: histories and item statistics follow, similarities and ranker stay."""
        self._log = self._log.extended(EngagementLog.of(exposures, self._items.ids))
        self._refresh()

    def add_items(self, items: pa.Table) -> None:
        """Adds ITEM rows not yet known; they are recalled as fresh and by tag and author until the next fit."""
        items = conform(items, ITEM)
        unknown = self._items.ids.get_indexer(pd.Index(items.column("item_id").to_pylist(), dtype=object)) < 0
        self._table = pa.concat_tables([self._table, items.filter(pa.array(unknown, pa.bool_()))])
        self._items = Items.of(self._table)
        self._refresh()

    def recommend(
        self, user_ids: Sequence[str], now_ms: int, num_items: int, exclude: Sequence[set[str]] | None = None
    ) -> Ranked:
        """For each user ``num_items`` unseen items with their predicted value (seconds of play, or P(long view))."""
        if not len(user_ids):
            return []
        n = len(self._items.ids)
        moments = np.full(len(user_ids), now_ms, np.int64)
        similarity = self._statistics.similarity
        users = self._log.rows_of(user_ids)
        queries = Queries.of(self._log, users, moments, self._items, similarity, self.config.history, self.config.knn)
        blocked = unavailable(self._log, self._items.ids, user_ids, now_ms, exclude)
        query, item = self._recall(queries, blocked, now_ms, num_items)
        scores = np.full((len(user_ids), n), -np.inf)
        scores[query, item] = self._value(features(queries, query, item, self._items, self._statistics))
        return top(scores, self._items.ids, num_items)

    def _recall(
        self, queries: Queries, blocked: np.ndarray, now_ms: int, num_items: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(query, item) pairs of the candidates of every query, none of them blocked."""
        config, items, statistics = self.config, self._items, self._statistics
        quality = statistics.columns["item_long_view"]
        neighbours = queries.neighbours.toarray()
        # Liked tags spread over many items, so an author's own items come first.
        affinity = (queries.tags_liked @ items.tags.T).toarray() + 5 * (
            queries.authors_liked @ items.authors.T
        ).toarray()
        popular = np.broadcast_to(statistics.popularity + 1e-9 * quality, neighbours.shape)
        age = now_ms - items.upload_ms
        young = (age >= 0) & (age < config.fresh_days * DAY_MS)
        fresh = np.broadcast_to(np.where(young, 1 / (1 + statistics.impressions), 0), neighbours.shape)
        chosen = np.zeros_like(blocked)
        for scores, limit in (
            (neighbours, config.neighbours),
            (affinity * quality, config.liked),
            (popular, max(config.popular, 2 * num_items)),
            (fresh + 1e-3 * fresh * affinity, config.fresh),
        ):
            allowed = np.where(blocked | (scores <= 0), -np.inf, scores)
            best = np.argpartition(-allowed, min(limit, allowed.shape[1]) - 1, axis=1)[:, :limit]
            np.put_along_axis(chosen, best, True, axis=1)
        query, item = np.nonzero(chosen & ~blocked)
        return query, item

    def _value(self, inputs: np.ndarray) -> np.ndarray:
        if not len(inputs):
            return np.zeros(0)
        with threadpool_limits(limits=1):
            if isinstance(self.ranker, HistGradientBoostingClassifier):
                return self.ranker.predict_proba(inputs)[:, 1]
            return self.ranker.predict(inputs)

    def _refresh(self) -> None:
        n = len(self._items.ids)
        now_ms = max(self._statistics.now_ms, int(self._log.times.max(initial=0)) + 1)
        similarity = self._statistics.similarity.copy()
        similarity.resize((n, n))
        self._statistics = Statistics.of(self._log, self._items, now_ms, self.config.half_life_days, similarity)


def _train(
    log: EngagementLog, items: Items, config: CascadeConfig
) -> HistGradientBoostingClassifier | HistGradientBoostingRegressor:
    """The ranker, fitted on slices of the log whose statistics come from before each slice."""
    edges = np.quantile(log.times, np.linspace(1 - config.trained_share, 1, config.slices + 1)).astype(np.int64)
    edges[-1] += 1
    inputs, play, liked = [], [], []
    for start, end in itertools.pairwise(edges):
        rows = np.flatnonzero((log.times >= start) & (log.times < end))
        rows = np.sort(rows[np.argsort(-log.times[rows], kind="stable")][: config.rows // config.slices])
        past = log.before(int(start))
        similarity = similarities(past, len(items.ids), int(start), config.knn)
        statistics = Statistics.of(past, items, int(start), config.half_life_days, similarity)
        inputs.append(_logged_features(log, rows, items, statistics, config))
        play.append(log.play_s[rows])
        liked.append(log.positive[rows])
    x, seconds, y = np.concatenate(inputs), np.concatenate(play), np.concatenate(liked)
    settings = {"max_iter": config.trees, "learning_rate": 0.06, "max_leaf_nodes": 31, "min_samples_leaf": 40}
    if config.objective == "long_view" and len(np.unique(y)) > 1:
        return HistGradientBoostingClassifier(**settings, l2_regularization=1.0, random_state=config.seed).fit(x, y)
    capped = np.minimum(seconds, np.quantile(seconds, 0.995))  # a few abandoned players would rule the loss
    ranker = HistGradientBoostingRegressor(loss="poisson", **settings, l2_regularization=1.0, random_state=config.seed)
    return ranker.fit(x, capped + 1e-3)


def _logged_features(
    log: EngagementLog, rows: np.ndarray, items: Items, statistics: Statistics, config: CascadeConfig
) -> np.ndarray:
    """Features [rows, FEATURES] of logged exposures, each with its user's history as it was just before."""
    blocks = []
    for part in np.array_split(rows, max(1, len(rows) // 8192)):
        queries = Queries.of(
            log, log.users[part], log.times[part], items, statistics.similarity, config.history, config.knn
        )
        blocks.append(features(queries, np.arange(len(part)), log.items[part], items, statistics))
    return np.concatenate(blocks)
