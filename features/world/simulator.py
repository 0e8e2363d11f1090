"""The default world: a simulated short-video app whose organic traffic has the marginals of KuaiRand.

What a user feels for a video is ``taste . topics + quality + freshness - duration mismatch``; ``responses`` turns it
into play time and feedback calibrated to KuaiRand (Gao et al., CIKM 2022), ``sessions`` into leaving and returning. On
``drift_day`` most users turn to trending topics, videos about them arrive, and older videos of other topics go stale,
so that a model trained before is measurably worse than one trained after. What else may happen (uploads, longer videos
in fashion, bots, lost feedback) is in the configuration, and in ``scenarios`` by name. Left out: social effects,
creators who react.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from features.datasets.dataset import Dataset
from features.world import scenarios
from features.world.bots import bot_visits, bot_watched
from features.world.calibration import HOUR_SHARE, kuairand_responses
from features.world.expectation import expected
from features.world.organic import organic_log
from features.world.population import NAMES, Videos, draw_tastes, make_people, make_videos
from features.world.responses import bucket_of
from features.world.sessions import DAY_MS, SessionConfig, Sessions, find_rows
from features.world.world import Visit, Watched

_PEOPLE, _VIDEOS, _DRIFT, _LOG, _BOTS = range(5)
_MODEL = 2
"""Raised when equal configurations begin to mean other worlds."""
_TRENDING = 6


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """Size and behaviour of the simulated world; ``drift_day`` None means tastes never change."""

    users: int = 900
    items: int = 2000
    history_days: int = 10
    drift_day: int | None = 3
    drift_share: float = 0.6
    drift_items: int = 200
    new_items_per_day: int = 10
    seed: int = 0
    first_day: datetime = datetime(2026, 1, 5, tzinfo=UTC)
    rho: float = 0.6
    """Correlation of affinity and play: 0 = play is luck, 1 = play is affinity."""
    taste_weight: float = 2.0
    quality_weight: float = 0.35
    freshness_weight: float = 0.4
    duration_weight: float = 0.15
    stale_weight: float = 0.2
    """What videos of the topics that fall out of fashion lose by and by after the drift."""
    duration_drift_day: int | None = None
    duration_drift: float = 1.0
    """By what factor the duration people prefer changes on that day."""
    bots: float = 0.0
    """Share of the accounts that are programs from ``bot_day`` on."""
    bot_day: int = 0
    outage_days: tuple[int, ...] = ()
    """Days whose feedback never arrives."""
    sessions: SessionConfig = field(default_factory=SessionConfig)

    @classmethod
    def scenario(cls, name: str, **overrides: Any) -> "SimulatorConfig":
        """The world of a scenario file (``features.world.scenarios``) with ``overrides`` of its fields.

        Raises ValueError for an unknown scenario or field.
        """
        _, given = scenarios.load(name)
        unknown = sorted({*given, *overrides} - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"the world has no field {', '.join(unknown)}; it has {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**{**given, **overrides})

    def __post_init__(self) -> None:
        if self.users < 2:
            raise ValueError(f"users={self.users}: a world needs at least 2 users; raise `users`")
        if self.items < 100:
            raise ValueError(f"items={self.items}: a world needs at least 100 items to scroll through; raise `items`")
        if min(self.new_items_per_day, self.drift_items) < 0:
            raise ValueError("new_items_per_day and drift_items must not be negative")
        if self.history_days < 1:
            raise ValueError(f"history_days={self.history_days}: a world needs at least 1 day of history")
        if not 0 <= self.rho < 1 or not 0 <= self.drift_share <= 1:
            raise ValueError(f"rho={self.rho}, drift_share={self.drift_share}: expected 0 <= rho < 1, 0 <= share <= 1")
        if not 0 <= self.bots < 1 or self.duration_drift <= 0:
            raise ValueError(
                f"bots={self.bots}, duration_drift={self.duration_drift}: expected 0 <= bots < 1, a factor above 0"
            )


def world_hash(config: SimulatorConfig) -> str:
    """Sixteen hexadecimal digits that name the world: equal configurations and code give equal worlds."""
    document = json.dumps([_MODEL, asdict(config)], sort_keys=True, default=str)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


class Simulator:
    """A world of simulated users; implements ``features.world.world.World``."""

    name = "simulator"

    def __init__(self, config: SimulatorConfig | None = None) -> None:
        self.config = config = config or SimulatorConfig()
        self._start_ms = int((config.first_day + timedelta(days=config.history_days)).timestamp() * 1000)
        topic_rng = self._rng(_PEOPLE, 1)
        self._topic_share = topic_rng.dirichlet(np.full(len(NAMES), 3.0))
        self._trending = np.argsort(self._topic_share)[4 : 4 + 2 * _TRENDING : 2]
        self._people = make_people(self._rng(_PEOPLE, 0), config.users, self._topic_share)
        self._tastes_after = self._drifted_tastes()
        self._videos = self._first_videos()
        self._released = 0
        self._index = pd.Index(self._videos.table["item_id"].to_pylist())
        self._users = pd.Index(self._people.table["user_id"].to_pylist())
        self._responses = kuairand_responses(config.rho)
        self._bots = np.sort(self._rng(_BOTS, 0).permutation(config.users)[: round(config.bots * config.users)])
        self._exposures, self._scale, self._sessions = organic_log(
            days=range(-config.history_days, 0),
            rng=lambda day: self._rng(_LOG, -day),
            videos=self._videos,
            tastes=self._people.tastes,
            affinity=self._affinity,
            sessions=self._new_sessions,
            user_ids=self._users.to_numpy(),
        )

    def history(self) -> Dataset:
        """The organic log before day 0 with the items uploaded by then."""
        items = self._videos.table.slice(0, self.config.items)
        return Dataset(name=self.name, items=items, users=self._people.table, exposures=self._exposures)

    def start(self) -> datetime:
        """Midnight UTC of day 0."""
        return self.config.first_day + timedelta(days=self.config.history_days)

    def drifts_on(self, day: int) -> bool:
        """Whether tastes change at the beginning of ``day``."""
        return day in (self.config.drift_day, self.config.duration_drift_day)

    def feedback_arrives(self, day: int) -> bool:
        """Whether what people did on ``day`` is reported."""
        return day not in self.config.outage_days

    def new_items(self, day: int) -> pa.Table:
        """ITEM rows uploaded at the beginning of ``day``; a large batch of trending topics on the drift day."""
        self._release(day)
        where = np.flatnonzero(self._videos.upload_day[self.config.items :] == day) + self.config.items
        return self._videos.table.take(pa.array(where))

    def population(self) -> list[str]:
        """Ids of the users who may visit."""
        return [str(user) for user in self._users]

    def visitors(self, day: int) -> list[Visit]:
        """Who opens the app on ``day``, sorted by time."""
        visits = self._sessions.plan(day).visits(self._users)
        if not self._are_bots(day):
            return visits
        names = [str(self._users[row]) for row in self._bots]
        programs = set(names)
        people = [visit for visit in visits if visit.user_id not in programs]
        bots = bot_visits(self._bots, names, self.config.seed, day, self._start_ms)
        return sorted([*people, *bots], key=lambda visit: (visit.time_ms, visit.user_id))

    def watch(self, day: int, user_id: str, item_ids: list[str], time_ms: int, slot: int) -> Watched:
        """The user scrolls through the list from ``time_ms``; see ``World.watch``."""
        users, items = self._rows([user_id], item_ids, day)
        if self._are_bots(day) and users[0] in self._bots:
            swipe_ms = self.config.sessions.swipe_ms
            return bot_watched(int(users[0]), items, self.config.seed, day, slot, time_ms, swipe_ms)
        z = self._z(users, items[None], day)[0]
        return self._sessions.watch(int(users[0]), items, z, self._videos.duration_ms[items], day, slot, time_ms)

    def true_affinity(self, user_ids: list[str], item_ids: list[str], day: int) -> np.ndarray:
        """How well items suit users on ``day``, [U, I], in standard deviations of organic traffic: for oracles only."""
        users, items = self._rows(user_ids, item_ids, day)
        return self._z(users, np.broadcast_to(items, (len(users), len(items))), day)

    def expected_play_ms(self, user_ids: list[str], item_ids: list[str], day: int) -> np.ndarray:
        """Mean play time (ms) of first views, [U, I]: for oracles only."""
        _, items = self._rows(user_ids, item_ids, day)
        duration = self._videos.duration_ms[items]
        return self._responses.expected_play_ms(self.true_affinity(user_ids, item_ids, day), duration)

    def expected(self, user_ids: list[str], lists: list[list[str]], day: int) -> dict[str, np.ndarray]:
        """What equally long lists of unseen items are worth to each user on ``day``, [U] each: for oracles only.

        The measures are those of ``features.world.expectation``.
        """
        users, items = self._rows(user_ids, [item for each in lists for item in each], day)
        rows = items.reshape(len(lists), -1)
        z, duration = self._z(users, rows, day), self._videos.duration_ms[rows]
        return expected(self._responses, self._sessions, users, z, duration, day)

    def _are_bots(self, day: int) -> bool:
        return bool(len(self._bots)) and day >= self.config.bot_day

    def _z(self, users: np.ndarray, items: np.ndarray, day: int) -> np.ndarray:
        return self._scale.z(self._affinity(users, items, day), bucket_of(self._videos.duration_ms[items]))

    def _affinity(self, users: np.ndarray, items: np.ndarray, day: int) -> np.ndarray:
        """Raw affinity [V, P] of users [V] to item rows [V, P]."""
        config, videos = self.config, self._videos
        drifted = config.drift_day is not None and day >= config.drift_day
        tastes = (self._tastes_after if drifted else self._people.tastes)[users]
        value = config.taste_weight * np.einsum("vt,vpt->vp", tastes, videos.topics[items])
        value += config.quality_weight * videos.quality[items]
        value += config.freshness_weight * np.exp(-np.maximum(day - videos.upload_day[items], 0) / 10)
        longer = config.duration_drift_day is not None and day >= config.duration_drift_day
        liked = self._people.log_duration[users][:, None] + (np.log(config.duration_drift) if longer else 0.0)
        mismatch = np.abs(np.log(videos.duration_ms[items] / 1000) - liked)
        value -= config.duration_weight * mismatch
        if config.drift_day is not None and drifted:
            stale = ~np.isin(videos.main[items], self._trending) & (videos.upload_day[items] < config.drift_day)
            value -= config.stale_weight * stale * (1 - np.exp(-(day - config.drift_day + 1)))
        return value

    def _drifted_tastes(self) -> np.ndarray:
        config, rng = self.config, self._rng(_DRIFT, 0)
        share = np.full(len(NAMES), 0.2 / (len(NAMES) - _TRENDING))
        share[self._trending] = 0.8 / _TRENDING
        moved = rng.permutation(config.users)[: round(config.drift_share * config.users)]
        tastes = self._people.tastes.copy()
        tastes[moved] = 0.35 * tastes[moved] + 0.65 * draw_tastes(rng, len(moved), share)
        return tastes / np.linalg.norm(tastes, axis=1, keepdims=True)

    def _first_videos(self) -> Videos:
        rng, config = self._rng(_VIDEOS, 0), self.config
        ages = np.where(rng.random(config.items) < 0.8, rng.uniform(config.history_days, 40, config.items), 0)
        ages = np.where(ages == 0, rng.uniform(0, config.history_days, config.items), ages)
        return make_videos(rng, self._topic_share, self._start_ms - ages * DAY_MS, self._start_ms, 0)

    def _release(self, day: int) -> None:
        """Makes the uploads of every day up to ``day``: each from its own generator, whoever asks first."""
        for new in range(self._released, day + 1):
            drift = new == self.config.drift_day
            count = self.config.drift_items if drift else self.config.new_items_per_day
            share = self._topic_share
            if drift:
                share = np.bincount(self._trending, minlength=len(NAMES)) / _TRENDING
            upload_ms = np.full(count, self._start_ms + new * DAY_MS)
            first = len(self._videos.main)
            videos = make_videos(self._rng(_VIDEOS, new + 1), share, upload_ms, self._start_ms, first)
            self._videos = self._videos.extend(videos)
            self._index = self._index.append(pd.Index(videos.table["item_id"].to_pylist()))
            self._released = new + 1

    def _rows(self, user_ids: list[str], item_ids: list[str], day: int) -> tuple[np.ndarray, np.ndarray]:
        self._release(day)
        users, items = find_rows(self._users, user_ids, "user"), find_rows(self._index, item_ids, "item")
        late = self._videos.upload_day[items] > day
        if late.any():
            raise ValueError(f"item {item_ids[int(np.argmax(late))]!r} is not uploaded yet on day {day}")
        return users, items

    def _new_sessions(self) -> Sessions:
        return Sessions(
            seed=self.config.seed,
            start_ms=self._start_ms,
            activity=self._people.activity,
            hour_share=HOUR_SHARE,
            responses=self._responses,
            config=self.config.sessions,
        )

    def _rng(self, part: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, part, number])
