"""Many simulated users under policies of a chosen quality: what gate and canary are tried on, seed after seed.

A policy ranks by true affinity blurred with noise; a share of its places is filled by chance, which is how a loss or a
gain of a wanted size is planted: the share is found by a secant on stay time and what was really planted is measured on
everybody. All policies of a world meet the same luck (``features.world.chance``), so a user's outcome under either
policy is known, and every seed draws anew who is in the canary. Left out: models; those are trained end to end
elsewhere (``benchmarks.operations_platform``).
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from features.schema import FLAGS
from features.world.calibration import HOUR_SHARE, kuairand_responses
from features.world.sessions import DAY_MS, SessionConfig, Sessions
from features.world.simulator import Simulator, SimulatorConfig

LIST = 10
BLUR = 1.0
"""Noise of a policy's idea of affinity, in standard deviations of organic affinity."""
RHO = 0.6
FIRST_SLOPE = -1.05
"""Relative change of stay time by the share of chance, as first guessed."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Who ranks: ``chance`` is the share of places that are filled at random."""

    name: str
    chance: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Played:
    """The exposures [n] of some days under one policy: rows of users and items, and what was done."""

    user: np.ndarray
    item: np.ndarray
    day: np.ndarray
    play_ms: np.ndarray
    duration_ms: np.ndarray
    flags: dict[str, np.ndarray] = field(repr=False)

    def table(self, users: np.ndarray, days: range) -> pa.Table:
        """EXPOSURE columns of the rows whose user [U] (bool) and day are wanted."""
        chosen = users[self.user] & np.isin(self.day, list(days))
        return pa.table(
            {
                "user_id": [user_id(row) for row in self.user[chosen]],
                "event_time": pa.array(self.day[chosen] * DAY_MS, pa.timestamp("ms", "UTC")),
                "play_ms": self.play_ms[chosen],
                "duration_ms": self.duration_ms[chosen],
                **{name: values[chosen] for name, values in self.flags.items()},
            }
        )

    def stay_minutes(self, days: range) -> float:
        """Minutes watched over ``days``, of all users together."""
        return float(self.play_ms[np.isin(self.day, list(days))].sum() / 60_000)


def user_id(row: int) -> str:
    """The id of the user in a row."""
    return f"u{row:05d}"


@dataclass(frozen=True, kw_only=True)
class Users:
    """A world of ``users`` people and ``items`` videos."""

    users: int
    items: int
    seed: int

    @cached_property
    def _world(self) -> Simulator:
        return Simulator(
            SimulatorConfig(users=self.users, items=self.items, history_days=1, drift_day=None, seed=self.seed)
        )

    @cached_property
    def durations(self) -> np.ndarray:
        """Duration in ms, [I]."""
        return np.asarray(self._world.history().items["duration_ms"].to_numpy())

    @cached_property
    def z(self) -> np.ndarray:
        """True affinity float32 [U, I], in standard deviations of organic traffic."""
        items = self._world.history().items["item_id"].to_pylist()
        people = self._world.population()
        blocks = [self._world.true_affinity(people[k : k + 500], items, 0) for k in range(0, len(people), 500)]
        return np.concatenate(blocks).astype(np.float32)

    def ranking(self, policy: Policy) -> np.ndarray:
        """Item rows [U, I], best first, as the policy sees it; equal shares of chance meet equal luck."""
        rng = np.random.default_rng([self.seed, 1])
        order = np.argsort(-(self.z + BLUR * rng.normal(size=self.z.shape).astype(np.float32)), axis=1)
        by_chance = rng.random(order.shape, np.float32) < policy.chance
        return np.where(by_chance, rng.integers(0, self.items, order.shape), order)

    def play(self, *parts: tuple[Policy, range]) -> Played:
        """Everybody under one policy after the other, each for its days, from the same beginning."""
        rng = np.random.default_rng([self.seed, 2])
        sessions = Sessions(
            seed=self.seed,
            start_ms=0,
            activity=rng.beta(1.4, 2.7, self.users),
            hour_share=HOUR_SHARE,
            responses=kuairand_responses(RHO),
            config=SessionConfig(),
        )
        offset, rounds = np.zeros(self.users, np.int64), []
        for policy, days in parts:
            ranking = self.ranking(policy)
            rounds += [part for day in days for part in self._day(sessions, ranking, offset, day)]
        columns = {name: np.concatenate([getattr(part, name) for part in rounds]) for name in _COLUMNS}
        flags = {name: np.concatenate([part.flags[name] for part in rounds]) for name in FLAGS}
        return Played(**columns, flags=flags)

    def _day(self, sessions: Sessions, ranking: np.ndarray, offset: np.ndarray, day: int) -> list[Played]:
        """The rounds of one day: everybody's first request, then everybody's second, ..."""
        plan, rounds = sessions.plan(day), []
        for number in range(int(plan.number.max(initial=-1)) + 1):
            here = plan.number == number
            user, limit = plan.user[here], plan.max_requests[here]
            for request in range(sessions.config.max_requests):
                going = limit > request
                user, limit = user[going], limit[going]
                if not len(user):
                    break
                places = np.minimum(offset[user][:, None] + np.arange(LIST), self.items - 1)
                slots = np.full(len(user), number * sessions.config.max_requests + request)
                part, left = self._scroll(sessions, user, ranking[user[:, None], places], day, slots)
                rounds.append(part)
                offset += np.bincount(part.user, minlength=self.users)
                user, limit = user[~left], limit[~left]
        return rounds

    def _scroll(
        self, sessions: Sessions, user: np.ndarray, items: np.ndarray, day: int, slots: np.ndarray
    ) -> tuple[Played, np.ndarray]:
        duration = self.durations[items]
        done = sessions.scroll(user, items, self.z[user[:, None], items], duration, day, slots)
        row, place = np.nonzero(np.arange(items.shape[1]) < done.shown[:, None])
        part = Played(
            user=user[row],
            item=items[row, place],
            day=np.full(len(row), day),
            play_ms=done.views.play_ms[row, place],
            duration_ms=duration[row, place],
            flags={name: values[row, place] for name, values in done.views.flags.items()},
        )
        return part, done.left


_COLUMNS = ("user", "item", "day", "play_ms", "duration_ms")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A policy of another quality than ``stable``, what everybody does under it, and by how much stay time changed."""

    policy: Policy
    played: Played
    change: float


def plant(users: Users, stable: Policy, days: tuple[range, range], change: float) -> Planted:
    """A candidate under which stay time is ``change`` (-0.1: a tenth less) from that under ``stable``.

    ``days`` are those before, when everybody meets ``stable``, and those of the trial.
    """
    before, trial = days
    base = users.play((stable, before), (stable, trial)).stay_minutes(trial)
    chance, slope = stable.chance + change / FIRST_SLOPE, FIRST_SLOPE
    tried: list[Planted] = []
    for _ in range(3):
        policy = Policy(name="candidate", chance=float(np.clip(chance, 0, 1)))
        played = users.play((stable, before), (policy, trial))
        real = played.stay_minutes(trial) / base - 1
        tried.append(Planted(policy=policy, played=played, change=real))
        if abs(real - change) < 0.01:
            break
        slope = real / (policy.chance - stable.chance)
        chance = stable.chance + change / slope
    return min(tried, key=lambda each: abs(each.change - change))
