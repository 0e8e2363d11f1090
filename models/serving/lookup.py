"""Users' features within a time budget: the store's, else the last ones known, else none (the cold context).

A recommendation page is never empty because Valkey is. A look-up that is not back in time is answered without, and
says so ("features_unavailable", and "cached_context" when a remembered context stands in); while one is overdue nobody
else waits behind it, and when it does come back it refreshes what is remembered. Concurrent look-ups share one read.
Left out: sharing what is remembered between replicas.
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from features.online import FeaturesUnavailable, OnlineFeatures, UserFeatures
from models.serving.admission import Limits
from models.serving.batching import MicroBatcher, Wanted
from models.serving.errors import DeadlinePassed, Overloaded

PAUSE_S = 1.0
"""How long to answer without the store after it failed: asking a dead server is slower than a cold answer."""
FLAGS = {"cold": "cold_user", "degraded": "degraded", "": ""}
UNAVAILABLE, CACHED = "features_unavailable", "cached_context"
_READS = Limits(max_rows=256, batch_s=1.0, max_wait_s=0.0, queue_rows=4096, queue_s=3600.0)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of B users, and a flag for each ("" when all is well)."""

    users: list[UserFeatures | None]
    flags: list[str]

    @property
    def told(self) -> set[str]:
        """The flags of the response: a remembered context also means that the store was not there."""
        return {*self.flags, *({UNAVAILABLE} if CACHED in self.flags else ())} - {""}


class Remembered:
    """The last known features of the users asked for last, bounded by their events; use it from one thread."""

    def __init__(self, events: int) -> None:
        self._room = events
        self._held = 0
        self._users: OrderedDict[str, UserFeatures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._users)

    def put(self, users: Sequence[UserFeatures]) -> None:
        """Remembers ``users``, and forgets those asked for longest ago when there is no room."""
        for user in users:
            self._forget(user.user_id)
            self._users[user.user_id] = user
            self._held += _events(user)
        while self._held > self._room and self._users:
            self._forget(next(iter(self._users)))

    def get(self, user_id: str) -> UserFeatures | None:
        """What was last known of the user."""
        user = self._users.get(user_id)
        if user is not None:
            self._users.move_to_end(user_id)
        return user

    def _forget(self, user_id: str) -> None:
        user = self._users.pop(user_id, None)
        if user is not None:
            self._held -= _events(user)


def _events(user: UserFeatures) -> int:
    """Events of the user, and one for the user itself: also those without any take room."""
    return 1 + sum(len(window) for window in (user.short, user.positive, user.lifelong) if window is not None)


class FeatureLookup:
    """Looks users up; ``thread`` is a single thread, because a Feast store is asked by one at a time."""

    def __init__(
        self,
        connect: Callable[[], OnlineFeatures],
        thread: Executor,
        *,
        budget_s: float = 0.15,
        events: int = 1_000_000,
    ) -> None:
        self._connect = connect
        self._thread = thread
        self._budget_s = budget_s
        self._store: OnlineFeatures | None = None
        self._retry_at = 0.0
        self._began: float | None = None
        self._remembered = Remembered(events)
        self._reads = MicroBatcher(self._read, _READS)

    def open(self) -> None:
        """Connects in the background, because the first connection takes longer than a request may wait."""
        self._thread.submit(self._connected)

    async def users(self, user_ids: list[str], times_ms: np.ndarray, deadline: float = math.inf) -> Found:
        """The features of B users at ``times_ms``, or what stands in for them after ``budget_s`` or at ``deadline``."""
        now = time.monotonic()
        overdue = self._began is not None and now - self._began > self._budget_s
        if now < self._retry_at or overdue:
            return self._stand_in(user_ids)
        asked = (user_ids, times_ms)
        try:
            batched = await self._reads.submit(None, asked, len(user_ids), deadline=min(now + self._budget_s, deadline))
        except (FeaturesUnavailable, OSError) as error:
            log.warning("answering without the feature store: %s", error)
            self._retry_at = time.monotonic() + PAUSE_S
            return self._stand_in(user_ids)
        except (DeadlinePassed, Overloaded):
            return self._stand_in(user_ids)
        except Exception as error:  # a value that nobody can read, of one of those who share the read
            log.warning("answering without features that cannot be read (%s: %s)", type(error).__name__, error)
            return self._stand_in(user_ids)
        return Found(users=list(batched.result), flags=[FLAGS[user.flag] for user in batched.result])

    def _stand_in(self, user_ids: list[str]) -> Found:
        known = [self._remembered.get(user_id) for user_id in user_ids]
        return Found(users=known, flags=[UNAVAILABLE if user is None else CACHED for user in known])

    async def _read(
        self, _: Hashable, asked: list[tuple[list[str], np.ndarray]], wanted: Wanted
    ) -> list[list[UserFeatures]]:
        """One read for all of ``asked``; to its end, because what comes too late for a caller is remembered."""
        ids = [user_id for user_ids, _ in asked for user_id in user_ids]
        times = np.concatenate([times_ms for _, times_ms in asked])
        self._began = time.monotonic()
        try:
            users = iter(await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, ids, times))
        finally:
            self._began = None
        read = [[next(users) for _ in user_ids] for user_ids, _ in asked]
        self._remembered.put([user for users in read for user in users if user.flag != "cold"])
        return read

    def _ask(self, user_ids: list[str], times_ms: np.ndarray) -> list[UserFeatures]:
        return self._connected().read(user_ids, times_ms)

    def _connected(self) -> OnlineFeatures:
        self._store = self._store or self._connect()
        return self._store
