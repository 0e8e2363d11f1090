"""Users in the loop learned from a real log: the second world, for people who have data.

History is the log itself. The visitors are its most active users; how they respond is ``taste`` (affinity) put through
``responses`` whose quantile functions, correlations and logistic feedback are fitted to the log, and they come and go
as ``sessions`` says. On ``drift_day`` a share of them exchange their tastes, and videos that the log knows but never
showed arrive. ``calibration()`` reports how well it predicts days it has not seen. Left out: causal correction of the
logging policy: affinities of videos a user was never shown are extrapolated.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import ndtr
from sklearn.linear_model import LogisticRegression

from features.datasets.dataset import Dataset
from features.schema import ITEM, TIME
from features.world import heldout
from features.world.expectation import expected
from features.world.responses import BUCKETS, DRAWN_FLAGS, AffinityScale, Responses, bucket_of
from features.world.sessions import DAY_MS, SessionConfig, Sessions, find_rows
from features.world.taste import Content, Rows, Taste, fit_taste, play_score
from features.world.world import Visit, Watched

MINIMUM_ROWS = 200
_PROBABILITIES = np.r_[0.0, np.linspace(0.02, 0.98, 49), 0.99, 0.998, 1.0]


@dataclass(frozen=True, kw_only=True)
class UserModelConfig:
    """Size and behaviour of the fitted world; ``drift_day`` None means tastes never change."""

    users: int = 900
    drift_day: int | None = 3
    drift_share: float = 0.6
    drift_items: int = 200
    new_items_per_day: int = 10
    seed: int = 0
    holdout_days: int = 2
    sessions: SessionConfig = field(default_factory=SessionConfig)

    def __post_init__(self) -> None:
        if self.users < 2:
            raise ValueError(f"users={self.users}: a world needs at least 2 users; raise `users`")
        if min(self.new_items_per_day, self.drift_items) < 0:
            raise ValueError("new_items_per_day and drift_items must not be negative")
        if self.holdout_days < 1 or not 0 <= self.drift_share <= 1:
            raise ValueError(
                f"holdout_days={self.holdout_days}, drift_share={self.drift_share}: "
                "expected holdout_days >= 1, 0 <= drift_share <= 1"
            )


@dataclass(frozen=True, kw_only=True)
class _Log:
    """The log as arrays [n] over the dense rows of its users and items."""

    user: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray
    play_ms: np.ndarray
    duration_ms: np.ndarray
    flags: dict[str, np.ndarray]
    users: pd.Index
    items: pd.Index

    @property
    def bucket(self) -> np.ndarray:
        return bucket_of(self.duration_ms)

    def take(self, rows: np.ndarray) -> "_Log":
        arrays = {n: getattr(self, n)[rows] for n in ("user", "item", "time_ms", "play_ms", "duration_ms")}
        return _Log(**arrays, flags={f: v[rows] for f, v in self.flags.items()}, users=self.users, items=self.items)


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    taste: Taste
    scale: AffinityScale
    responses: Responses


class UserModel:
    """A world of users fitted on a log; implements ``features.world.world.World``. Make one with ``fit``."""

    def __init__(self, dataset: Dataset, config: UserModelConfig, log: _Log, fitted: _Fitted) -> None:
        self.name = f"user model fitted on {dataset.name}"
        self.config = config
        self._dataset, self._log, self._fitted = dataset, log, fitted
        self._start_ms = int(-(-(log.time_ms.max() + 1) // DAY_MS) * DAY_MS)
        views = np.bincount(log.user, minlength=len(log.users))
        self._population = np.argsort(-views, kind="stable")[: config.users]
        self._users = log.users[self._population]
        self._durations = dataset.items["duration_ms"].to_numpy()
        self._release_day = _release_days(log, config)
        rng = np.random.default_rng([config.seed, 1])
        moved = rng.permutation(len(self._population))[: round(config.drift_share * len(self._population))]
        self._tastes = fitted.taste.sampled(self._population, np.random.default_rng([config.seed, 3]))
        self._tastes_after = self._tastes.copy()
        self._tastes_after[moved] = self._tastes[np.roll(moved, 1)]
        self._sessions = self._make_sessions()

    @classmethod
    def fit(cls, dataset: Dataset, config: UserModelConfig | None = None) -> "UserModel":
        """Fits on the whole log; raises ValueError when it has fewer than 2 users, 2 items or 200 exposures."""
        config = config or UserModelConfig()
        log = _read_log(dataset)
        return cls(dataset, config, log, _fit(log, Content.of(dataset.items), config))

    def history(self) -> Dataset:
        """The log itself, with all its users, and the items uploaded by its end."""
        known = pa.array(self._release_day < 0)
        data = self._dataset
        return Dataset(
            name=data.name,
            items=data.items.filter(known),
            users=data.users,
            exposures=data.exposures,
            rejected=data.rejected,
            duplicates=data.duplicates,
        )

    def start(self) -> datetime:
        """Midnight UTC of day 0, the first after the log's last event."""
        return datetime.fromtimestamp(self._start_ms / 1000, UTC)

    def drifts_on(self, day: int) -> bool:
        """Whether tastes change at the beginning of ``day``."""
        return day == self.config.drift_day

    def feedback_arrives(self, day: int) -> bool:
        """Always: the user model has no outages."""
        return True

    def new_items(self, day: int) -> pa.Table:
        """ITEM rows of videos the log never showed, uploaded at the beginning of ``day``; a batch on the drift day."""
        items = self._dataset.items.filter(pa.array(self._release_day == day))
        times = pa.array(np.full(items.num_rows, self._start_ms + day * DAY_MS)).cast(TIME)
        return items.set_column(ITEM.get_field_index("upload_time"), ITEM.field("upload_time"), times)

    def population(self) -> list[str]:
        """Ids of the users who may visit."""
        return [str(user) for user in self._users]

    def visitors(self, day: int) -> list[Visit]:
        """Who opens the app on ``day``, sorted by time."""
        return self._sessions.plan(day).visits(self._users)

    def watch(self, day: int, user_id: str, item_ids: list[str], time_ms: int, slot: int) -> Watched:
        """The user scrolls through the list from ``time_ms``; see ``World.watch``."""
        users, items = self._rows([user_id], item_ids, day)
        z = self._z(users, items, day)[0]
        return self._sessions.watch(int(users[0]), items, z, self._durations[items], day, slot, time_ms)

    def true_affinity(self, user_ids: list[str], item_ids: list[str], day: int) -> np.ndarray:
        """How well items suit users on ``day``, [U, I], in standard deviations of the log's views: for oracles only."""
        users, items = self._rows(user_ids, item_ids, day)
        return self._z(users, items, day)

    def expected_play_ms(self, user_ids: list[str], item_ids: list[str], day: int) -> np.ndarray:
        """Mean play time (ms) of first views, [U, I]: for oracles only."""
        users, items = self._rows(user_ids, item_ids, day)
        return self._fitted.responses.expected_play_ms(self._z(users, items, day), self._durations[items])

    def expected(self, user_ids: list[str], lists: list[list[str]], day: int) -> dict[str, np.ndarray]:
        """What equally long lists of unseen items are worth to each user on ``day``, [U] each: for oracles only.

        The measures are those of ``features.world.expectation``.
        """
        users, items = self._rows(user_ids, [item for each in lists for item in each], day)
        rows = items.reshape(len(lists), -1)
        # One user at a time: everybody's affinity to everybody's list would be many times as much.
        pairs = zip(users, rows, strict=True)
        z = np.concatenate([self._z(users=user[None], items=own, day=day) for user, own in pairs])
        return expected(self._fitted.responses, self._sessions, users, z, self._durations[rows], day)

    def calibration(self) -> dict[str, object]:
        """Predicted against observed on the log's last days, by a model fitted on the days before.

        ``deciles`` of predicted affinity, duration ``buckets`` and ``returns`` as ``features.world.heldout`` has them,
        the ``correlation`` of predicted and observed play, and the mean gaps of deciles and of long views.
        """
        last_day = self._log.time_ms >= self._start_ms - self.config.holdout_days * DAY_MS
        train, test = self._log.take(~last_day), self._log.take(last_day)
        if len(train.user) < MINIMUM_ROWS or not len(test.user):
            raise ValueError(
                f"{len(train.user)} exposures before the last {self.config.holdout_days} days and {len(test.user)} in "
                f"them: calibration needs {MINIMUM_ROWS} and 1; lower `holdout_days`"
            )
        fitted = _fit(train, Content.of(self._dataset.items), self.config)
        taste, responses = fitted.taste, fitted.responses
        z = fitted.scale.z(taste.features(test.user, test.item) @ taste.weights, test.bucket)
        rho = responses.rho[test.bucket]
        expected = ndtr(rho * z / np.sqrt(2 - rho**2))
        score = play_score(test.play_ms, test.duration_ms, test.bucket)
        views, long_view = heldout.drawn(responses, z, test.duration_ms), test.flags["long_view"]
        deciles = heldout.deciles(expected, views, score, long_view)
        gaps = [abs(d["predicted_percentile"] - d["observed_percentile"]) * d["rows"] for d in deciles]
        first_day = self._start_ms // DAY_MS - self.config.holdout_days
        return {
            "rows": len(z),
            "correlation": _correlation(z, score, np.ones(len(z), bool)),
            "mean_absolute_gap": sum(gaps) / len(z),
            "deciles": deciles,
            "buckets": heldout.buckets(views, test.play_ms, test.duration_ms, long_view),
            "long_view": {"predicted": float(views.flags["long_view"].mean()), "observed": float(long_view.mean())},
            "returns": heldout.returns(_activity(train), self._log.user, self._log.time_ms // DAY_MS, first_day),
        }

    def _z(self, users: np.ndarray, items: np.ndarray, day: int) -> np.ndarray:
        """Affinity scores [U, I] of population rows and item rows."""
        taste, own = self._fitted.taste, self._population[users]
        drifted = self.config.drift_day is not None and day >= self.config.drift_day
        tastes = (self._tastes_after if drifted else self._tastes)[users]
        weights = taste.weights
        bias = weights[0] * taste.user_bias[own][:, None] + weights[1] * taste.item_bias[items]
        affinity = bias + weights[2] * np.asarray(taste.traits[items] @ tastes.T).T
        return self._fitted.scale.z(affinity, bucket_of(self._durations[items]))

    def _rows(self, user_ids: list[str], item_ids: list[str], day: int) -> tuple[np.ndarray, np.ndarray]:
        users, items = find_rows(self._users, user_ids, "user"), find_rows(self._log.items, item_ids, "item")
        late = self._release_day[items] > day
        if late.any():
            raise ValueError(f"item {item_ids[int(np.argmax(late))]!r} is not uploaded yet on day {day}")
        return users, items

    def _make_sessions(self) -> Sessions:
        log = self._log
        activity = _activity(log)[self._population]
        hours = np.bincount(log.time_ms % DAY_MS // 3_600_000, minlength=24) + 1.0
        sessions = Sessions(
            seed=self.config.seed,
            start_ms=self._start_ms,
            activity=activity,
            hour_share=hours,
            responses=self._fitted.responses,
            config=self.config.sessions,
        )
        row = np.full(len(log.users), -1)
        row[self._population] = np.arange(len(self._population))
        views = np.flatnonzero(row[log.user] >= 0)
        sessions.remember(row[log.user[views]], log.item[views])
        return sessions


def _activity(log: _Log) -> np.ndarray:
    """Share of days on which each user comes [U]; two pseudo-days of the mean user: nobody comes for certain."""
    days = log.time_ms // DAY_MS
    active = pd.DataFrame({"user": log.user, "day": days}).drop_duplicates().groupby("user").size()
    length, mean = days.max() - days.min() + 1, active.mean()
    shrunk: np.ndarray = (active.reindex(np.arange(len(log.users)), fill_value=0).to_numpy() + 2 * mean / length) / (
        length + 2
    )
    return shrunk


def _read_log(dataset: Dataset) -> _Log:
    table = dataset.exposures
    users = pd.Index(pc.unique(table["user_id"]).to_pylist(), dtype=object)
    items = pd.Index(dataset.items["item_id"].to_pylist(), dtype=object)
    if len(users) < 2:
        raise ValueError(f"the log {dataset.name!r} has {len(users)} users; a user model needs at least 2 users")
    if table.num_rows < MINIMUM_ROWS or len(items) < 2:
        raise ValueError(
            f"the log {dataset.name!r} has {table.num_rows} exposures and {len(items)} items; a user model needs at "
            f"least {MINIMUM_ROWS} exposures and 2 items: give a longer log, or use the simulator"
        )
    return _Log(
        user=find_rows(users, table["user_id"].to_pylist(), "user"),
        item=find_rows(items, table["item_id"].to_pylist(), "item"),
        time_ms=table["event_time"].cast(pa.int64()).to_numpy(),
        play_ms=table["play_ms"].to_numpy(),
        duration_ms=table["duration_ms"].to_numpy(),
        flags={f: table[f].to_numpy() for f in (*DRAWN_FLAGS, "long_view")},
        users=users,
        items=items,
    )


def _release_days(log: _Log, config: UserModelConfig) -> np.ndarray:
    """Day on which each item is uploaded, -1 for what the log has shown; what is left over never is (a huge day)."""
    days = np.full(len(log.items), np.iinfo(np.int64).max)
    days[log.item] = -1
    held = np.random.default_rng([config.seed, 2]).permutation(np.flatnonzero(days >= 0))
    day = 0
    while len(held) and (config.new_items_per_day or (config.drift_day is not None and day <= config.drift_day)):
        count = config.drift_items if day == config.drift_day else config.new_items_per_day
        # The drift's batch is reserved: the days before it must not use it up.
        before = config.drift_day is not None and day < config.drift_day
        count = min(count, max(len(held) - config.drift_items, 0)) if before else count
        days[held[:count]] = day
        held, day = held[count:], day + 1
    return days


def _fit(log: _Log, content: Content, config: UserModelConfig) -> _Fitted:
    score = play_score(log.play_ms, log.duration_ms, log.bucket)
    rows = Rows(user=log.user, item=log.item, score=score)
    taste, affinity = fit_taste(rows, len(log.users), content, config.seed)
    scale = AffinityScale.fit(affinity, log.bucket)
    z = scale.z(affinity, log.bucket)
    rho = np.clip([_correlation(z, score, log.bucket == b) for b in range(BUCKETS)], 0.0, 0.95)
    ratio = log.play_ms / log.duration_ms
    ratios = np.empty((BUCKETS, len(_PROBABILITIES)))
    for b in range(BUCKETS):
        own = ratio[log.bucket == b]
        ratios[b] = np.quantile(own if len(own) >= 20 else ratio, _PROBABILITIES)
    logits = [_logistic(log.flags[f], score, z, log.bucket) for f in DRAWN_FLAGS]
    responses = Responses(
        probabilities=_PROBABILITIES,
        ratios=ratios,
        rho=rho,
        intercepts=np.stack([intercept for intercept, _, _ in logits]),
        play_weights=np.array([play for _, play, _ in logits]),
        affinity_weights=np.array([affinity for _, _, affinity in logits]),
    )
    return _Fitted(taste=taste, scale=scale, responses=responses)


def _correlation(z: np.ndarray, score: np.ndarray, where: np.ndarray) -> float:
    """Correlation within a bucket; that of all rows when the bucket is too small to tell."""
    if where.sum() < 100:
        where = np.ones(len(z), bool)
    a, b = z[where] - z[where].mean(), score[where] - score[where].mean()
    return float(a @ b / max(np.sqrt((a @ a) * (b @ b)), 1e-9))


def _logistic(
    flag: np.ndarray, score: np.ndarray, z: np.ndarray, bucket: np.ndarray
) -> tuple[np.ndarray, float, float]:
    """Intercepts [B] and the weights of play score and affinity; a flag the log never shows stays impossible."""
    if not flag.any() or flag.all():
        return np.full(BUCKETS, 50.0 if flag.any() else -50.0), 0.0, 0.0
    inputs = np.column_stack([score, z, np.eye(BUCKETS)[bucket]])
    model = LogisticRegression(C=10.0, max_iter=300).fit(inputs, flag)
    play, affinity, *offsets = model.coef_[0]
    return model.intercept_[0] + np.array(offsets), float(play), float(affinity)
