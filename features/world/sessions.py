"""Visits: who comes, how far each list is scrolled, what is remembered. Shared by the simulator and the user model.

Three effects close the loop: bored people leave earlier, satisfied people come back more often, and a video seen before
is worth less. All luck is ``chance.uniforms`` of (seed, user, day, slot, item, position), so the same request has the
same outcome whenever it is asked. Left out: notifications, sharing between users, a daily time budget.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import poisson

from features.schema import FLAGS
from features.world.chance import uniforms
from features.world.responses import DRAWS, Responses, Views
from features.world.world import Visit, Watched

DAY_MS = 24 * 3600 * 1000
_VIEW, _LEAVE, _VISIT, _TIME, _LENGTH = range(5)
"""First key of every random number: what it decides."""
REST_MS = 60_000
"""A visit begins at least so long after the user's former one has ended, be it before midnight."""


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """Habits of the visitors; defaults give sessions of five to ten organic videos."""

    leave: float = 0.11
    """Chance of leaving after an organic view of middling interest."""
    boredom_weight: float = 2.5
    boredom_memory: float = 0.7
    extra_visits: float = 1.7
    """Mean number of visits of an active day beyond the first."""
    max_requests: int = 3
    return_weight: float = 4.0
    """Logit added to the chance of a visit per unit of satisfaction (mean view percentile, organic = 0.5)."""
    satisfaction_rate: float = 0.35
    repeat_penalty: float = 1.5
    """What a video seen before loses, in standard deviations of organic affinity."""
    swipe_ms: int = 700
    visit_gap_ms: int = 45 * 60 * 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Visits of one day as arrays, sorted by time: user row, UTC ms, number of the visit that day, request limit."""

    user: np.ndarray
    time_ms: np.ndarray
    number: np.ndarray
    max_requests: np.ndarray

    def visits(self, user_ids: pd.Index) -> list[Visit]:
        """The same as ``Visit`` records."""
        columns = (user_ids[self.user], self.time_ms.tolist(), self.max_requests.tolist())
        return [Visit(user_id=u, time_ms=t, max_requests=m) for u, t, m in zip(*columns, strict=True)]


def find_rows(index: pd.Index, ids: list[str], kind: str) -> np.ndarray:
    """Rows of ``ids`` in ``index``; raises ValueError naming the first id of this ``kind`` that is unknown."""
    rows = index.get_indexer(pd.Index(ids, dtype=object))
    if (rows < 0).any():
        raise ValueError(
            f"unknown {kind} {ids[int(np.argmin(rows))]!r}: the world has {len(index)} {kind}s, such as {index[0]!r}; "
            "take ids from history(), visitors() and new_items()"
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Scrolled:
    """Responses [V, P] to V lists; row v was shown as far as ``shown[v]``, then the user ``left`` or not."""

    views: Views
    shown: np.ndarray
    left: np.ndarray


class Sessions:
    """The state of all visitors.

    ``activity`` [U] is each one's share of active days under organic traffic, ``hour_share`` [24] when in the day (UTC)
    they come, ``start_ms`` midnight of day 0.
    """

    def __init__(
        self,
        *,
        seed: int,
        start_ms: int,
        activity: np.ndarray,
        hour_share: np.ndarray,
        responses: Responses,
        config: SessionConfig,
    ) -> None:
        self.config = config
        self.start_ms = start_ms
        self._seed = seed
        self.activity = np.clip(activity, 0.01, 0.99)
        self._hours = np.r_[0, np.cumsum(hour_share) / hour_share.sum()]
        self._responses = responses
        self._seen: list[dict[int, tuple[int, int]]] = [{} for _ in activity]
        self._enjoyed: dict[int, dict[int, dict[int, tuple[float, int]]]] = {}
        self._through: dict[int, dict[int, int]] = {}

    def satisfaction(self, day: int) -> np.ndarray:
        """Each user's moving average of view percentiles over the active days before ``day``; 0.5 = as organic."""
        level = np.full(len(self.activity), 0.5)
        for past in sorted(d for d in self._enjoyed if d < day):
            for user, slots in self._enjoyed[past].items():
                mean = sum(total for total, _ in slots.values()) / sum(views for _, views in slots.values())
                level[user] += self.config.satisfaction_rate * (mean - level[user])
        return level

    def plan(self, day: int) -> Plan:
        """The visits of ``day``."""
        users = np.arange(len(self.activity))
        chance = expit(logit(self.activity) + self.config.return_weight * (self.satisfaction(day) - 0.5))
        users = users[uniforms(_VISIT, self._seed, users, day) < chance]
        extra = poisson.ppf(uniforms(_LENGTH, self._seed, users, day), self.config.extra_visits)
        count = 1 + np.minimum(extra, 9).astype(np.int64)
        slots = np.arange(10)
        luck = np.where(slots < count[:, None], uniforms(_TIME, self._seed, users[:, None], day, slots), np.nan)
        times = np.interp(np.sort(luck, axis=1), self._hours, np.arange(25) * DAY_MS / 24)
        times[:, 0] = np.maximum(times[:, 0], self._busy_until(users, day))
        for k in slots[1:]:
            times[:, k] = np.maximum(times[:, k], times[:, k - 1] + self.config.visit_gap_ms)
        row, number = np.nonzero(times < DAY_MS - 60_000)
        order = np.lexsort((users[row], times[row, number]))
        row, number = row[order], number[order]
        draws = uniforms(_LENGTH, self._seed, users[row], day, number + 1)
        return Plan(
            user=users[row],
            time_ms=self.start_ms + day * DAY_MS + times[row, number].astype(np.int64),
            number=number,
            max_requests=1 + (draws * self.config.max_requests).astype(np.int64),
        )

    def through(self, users: np.ndarray, day: int, ends_ms: np.ndarray) -> None:
        """Notes when requests of ``day`` were through: a visit begun before midnight delays the next day's first."""
        ends = self._through.setdefault(day, {})
        for user, end in zip(users.tolist(), ends_ms.tolist(), strict=True):
            ends[user] = max(ends.get(user, 0), end)

    def _busy_until(self, users: np.ndarray, day: int) -> np.ndarray:
        """When each user may come at the earliest, in ms of ``day``."""
        ends, midnight = self._through.get(day - 1, {}), self.start_ms + day * DAY_MS
        return np.array([max(ends.get(user, 0) + REST_MS - midnight, 0) for user in users.tolist()], float)

    def scroll(
        self, users: np.ndarray, items: np.ndarray, z: np.ndarray, durations: np.ndarray, day: int, slots: np.ndarray
    ) -> Scrolled:
        """V users [V] go through their lists of item rows [V, P] with affinity scores ``z`` [V, P]; remembers it."""
        position = np.arange(items.shape[1])
        keys = (self._seed, users[:, None], day, slots[:, None], items, position)
        draws = uniforms(_VIEW, *keys, np.arange(DRAWS)[:, None, None])
        repeated = np.array([self._repeats(u, row, (day, s)) for u, row, s in zip(users, items, slots, strict=True)])
        views = self._responses.views(z - self.config.repeat_penalty * repeated, durations, draws)
        leaves = uniforms(_LEAVE, *keys) < self.leaving(views.percentile)
        left = np.asarray(leaves.any(axis=1))
        shown = np.where(left, leaves.argmax(axis=1) + 1, items.shape[1])
        for v, (user, slot) in enumerate(zip(users.tolist(), slots.tolist(), strict=True)):
            seen = self._seen[user]
            for item in items[v, : shown[v]].tolist():
                seen.setdefault(item, (day, slot))
            enjoyed = float(views.percentile[v, : shown[v]].sum())
            self._enjoyed.setdefault(day, {}).setdefault(user, {})[slot] = (enjoyed, int(shown[v]))
        return Scrolled(views=views, shown=shown, left=left)

    def watch(
        self, user: int, items: np.ndarray, z: np.ndarray, durations: np.ndarray, day: int, slot: int, time_ms: int
    ) -> Watched:
        """One user goes through one list of item rows [P] from ``time_ms``; an empty list makes the user leave."""
        if not len(items):
            none = np.zeros(0, np.int64)
            flags = {f: np.zeros(0, bool) for f in FLAGS}
            return Watched(positions=none, times_ms=none, play_ms=none, flags=flags, end_ms=time_ms, left=True)
        done = self.scroll(np.array([user]), items[None], z[None], durations[None], day, np.array([slot]))
        shown = int(done.shown[0])
        play = done.views.play_ms[0, :shown]
        ends = time_ms + np.cumsum(play + self.config.swipe_ms)
        self.through(np.array([user]), day, ends[-1:])
        return Watched(
            positions=np.arange(shown),
            times_ms=np.r_[time_ms, ends[:-1]],
            play_ms=play,
            flags={f: values[0, :shown] for f, values in done.views.flags.items()},
            end_ms=int(ends[-1]),
            left=bool(done.left[0]),
        )

    def remember(self, users: np.ndarray, items: np.ndarray) -> None:
        """Marks the item rows as seen by the users [n] before day 0."""
        for user, item in zip(users.tolist(), items.tolist(), strict=True):
            self._seen[user].setdefault(item, (-1, 0))

    def _repeats(self, user: int, items: np.ndarray, now: tuple[int, int]) -> list[bool]:
        seen = self._seen[user]
        return [seen.get(i, now) < now for i in items.tolist()] if seen else [False] * len(items)

    def leaving(self, percentile: np.ndarray) -> np.ndarray:
        """Chance of leaving after each view [V, P], from an exponential average of the boredom in this list."""
        memory = self.config.boredom_memory
        position = np.arange(percentile.shape[1])
        lag = position - position[:, None]
        kernel = np.where(lag >= 0, (1 - memory) * memory ** np.maximum(lag, 0), 0.0)
        boredom = 0.5 * memory ** (position + 1) + (1 - percentile) @ kernel
        return np.minimum(self.config.leave * np.exp(self.config.boredom_weight * (boredom - 0.5)), 0.9)
