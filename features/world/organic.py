"""The log before day 0: a logging policy that mixes popularity, a noisy idea of taste, and chance.

The scale of affinities is relative to this log, and the log's length depends on the scale (bored users leave): the two
are solved by a short fixed-point iteration. Left out: exploration by uncertainty, position effects.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from features.schema import EXPOSURE, FLAGS, TIME, conform, exposure_id
from features.world.population import Videos
from features.world.responses import AffinityScale, bucket_of
from features.world.sessions import DAY_MS, REST_MS, Scrolled, Sessions

LIST_LENGTH = 10
_POPULARITY, _TASTE, _CHANCE = 0.65, 0.31, 0.04
"""Shares of the mixed logging policy."""
_TASTE_SHARPNESS = 3.0

Affinity = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class _Round:
    """Shown views of one round of requests, one entry per view."""

    day: int
    user: np.ndarray
    slot: np.ndarray
    item: np.ndarray
    position: np.ndarray
    time_ms: np.ndarray
    play_ms: np.ndarray
    affinity: np.ndarray
    flags: np.ndarray


def organic_log(
    *,
    days: range,
    rng: Callable[[int], np.random.Generator],
    videos: Videos,
    tastes: np.ndarray,
    affinity: Affinity,
    sessions: Callable[[], Sessions],
    user_ids: np.ndarray,
) -> tuple[pa.Table, AffinityScale, Sessions]:
    """EXPOSURE rows of organic traffic over ``days``, the affinity scale they define, and the visitors' state after."""
    scale = AffinityScale.fit(np.random.default_rng(0).normal(size=10_000), np.zeros(10_000, np.int64))
    for _ in range(3):
        visitors = sessions()
        policy = _Policy(videos, tastes)
        traffic = _Traffic(visitors=visitors, policy=policy, affinity=affinity, scale=scale)
        rounds = [r for day in days for r in traffic.day(day, rng(day))]
        item = np.concatenate([r.item for r in rounds])
        scale = AffinityScale.fit(np.concatenate([r.affinity for r in rounds]), bucket_of(videos.duration_ms[item]))
    return _table(rounds, videos, user_ids, visitors.start_ms), scale, visitors


class _Policy:
    """Ranks videos anew for every user and day, without repeats."""

    def __init__(self, videos: Videos, tastes: np.ndarray) -> None:
        self.videos = videos
        popular = np.exp(videos.popularity)
        taste = np.exp(_TASTE_SHARPNESS * tastes @ videos.topics.T + 0.5 * videos.popularity)
        mixture = _POPULARITY * popular / popular.sum() + _TASTE * taste / taste.sum(axis=1, keepdims=True)
        self._logits = np.log(mixture + _CHANCE / len(popular)).astype(np.float32)
        self.seen = np.zeros(taste.shape, bool)

    def rank(self, rng: np.random.Generator, users: np.ndarray, day: int, count: int) -> np.ndarray:
        """The first ``count`` item rows [V, count] of a Plackett-Luce draw over unseen videos that are uploaded."""
        available = np.flatnonzero(self.videos.upload_day <= day)
        # Gumbel noise makes the sorted order a draw without replacement, proportional to the policy.
        drawn = rng.standard_exponential((len(users), len(available)), dtype=np.float32)
        noise = -np.log(np.maximum(drawn, 1e-30))
        keys = self._logits[np.ix_(users, available)] + noise
        keys[self.seen[np.ix_(users, available)]] = -np.inf
        count = min(count, len(available))
        top = np.argpartition(-keys, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(keys, top, axis=1), axis=1)
        return available[np.take_along_axis(top, order, axis=1)]


@dataclass(frozen=True, kw_only=True)
class _Traffic:
    """Serves visitors by the policy; ``affinity`` and ``scale`` give their scores."""

    visitors: Sessions
    policy: _Policy
    affinity: Affinity
    scale: AffinityScale

    def day(self, day: int, rng: np.random.Generator) -> list[_Round]:
        """All requests of one day; users are independent, so their n-th requests are served together."""
        plan = self.visitors.plan(day)
        users, visits = np.unique(plan.user), int(plan.number.max(initial=-1)) + 1
        limit = self.visitors.config.max_requests
        ranked = self.policy.rank(rng, users, day, LIST_LENGTH * limit * visits)
        offset, free = np.zeros(len(users), np.int64), np.zeros(len(users), np.int64)
        rounds = []
        for number in range(visits):
            here = plan.number == number
            user, left = plan.user[here], np.zeros(here.sum(), bool)
            clock = np.maximum(plan.time_ms[here], free[np.searchsorted(users, user)])
            for request in range(limit):
                going = np.flatnonzero(~left & (plan.max_requests[here] > request))
                if not len(going):
                    break
                row = np.searchsorted(users, user[going])
                places = np.minimum(offset[row][:, None] + np.arange(LIST_LENGTH), ranked.shape[1] - 1)
                items = ranked[row[:, None], places]
                views, done, ends = self._serve(day, user[going], items, clock[going], number * limit + request)
                rounds.append(views)
                offset[row] += done.shown
                clock[going], left[going] = ends, done.left
                free[row] = ends + REST_MS
                self.visitors.through(user[going], day, ends)
        return rounds

    def _serve(
        self, day: int, user: np.ndarray, items: np.ndarray, clock: np.ndarray, slot: int
    ) -> tuple[_Round, Scrolled, np.ndarray]:
        """One request of each of V users: the views, how each list was scrolled, and when each user was through."""
        duration = self.policy.videos.duration_ms[items]
        raw = self.affinity(user, items, day)
        slots = np.full(len(user), slot)
        done = self.visitors.scroll(user, items, self.scale.z(raw, bucket_of(duration)), duration, day, slots)
        ends = clock[:, None] + np.cumsum(done.views.play_ms + self.visitors.config.swipe_ms, axis=1)
        starts = np.concatenate([clock[:, None], ends[:, :-1]], axis=1)
        v, p = np.nonzero(np.arange(items.shape[1]) < done.shown[:, None])
        self.policy.seen[user[v], items[v, p]] = True
        views = _Round(
            day=day,
            user=user[v],
            slot=slots[v],
            item=items[v, p],
            position=p,
            time_ms=starts[v, p],
            play_ms=done.views.play_ms[v, p],
            affinity=raw[v, p],
            flags=np.stack([done.views.flags[f][v, p] for f in FLAGS]),
        )
        return views, done, ends[np.arange(len(user)), done.shown - 1]


def _table(rounds: list[_Round], videos: Videos, user_ids: np.ndarray, start_ms: int) -> pa.Table:
    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(r, name) for r in rounds], axis=-1)

    time, user, item, position = column("time_ms"), column("user"), column("item"), column("position")
    day = np.concatenate([np.full(len(r.user), start_ms // DAY_MS + r.day) for r in rounds])
    triples = zip(user_ids[user], day, column("slot"), strict=True)
    request = np.array([f"{u}-{d}-{s}" for u, d, s in triples], object)
    item_ids = np.array(videos.table["item_id"].to_pylist(), object)
    table = pa.table(
        {
            "exposure_id": [exposure_id(r, "organic", int(p)) for r, p in zip(request, position, strict=True)],
            "request_id": request,
            "user_id": user_ids[user],
            "item_id": item_ids[item],
            "position": pa.array(position, pa.int32()),
            "event_time": pa.array(time).cast(TIME),
            "source": ["organic"] * len(user),
            "duration_ms": videos.duration_ms[item],
            "play_ms": column("play_ms"),
            **dict(zip(FLAGS, column("flags"), strict=True)),
        }
    )
    # A last view may begin after midnight; the history ends where day 0 begins.
    order = np.lexsort((position, time))
    return conform(table.take(pa.array(order[time[order] < start_ms])), EXPOSURE)
