"""The exposure log of all users in memory, and the short-term and positive pathways folded from it, vectorised.

For any (user, time), where ``features.histories.sequences`` knows the requests of a log on disk: the windows that an
ingest seeds come from here.
``context_pathways`` gives for any (user, time) exactly what ``windows.fold`` would give on that user's log and
what serving reads on-line, thousands of requests at a time. Feedback is taken as the log knows it now: it is assumed
to have arrived before the user's next request, as it does in an app that reports a view when it ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from features.histories.context import Pathway, compact
from features.histories.windows import Limits, Window, is_positive, merge, window_of


@dataclass(frozen=True, kw_only=True)
class _Log:
    """Events ordered by (user, time, id), found by binary search."""

    events: Window
    item: np.ndarray
    """int32 [n], row in the item index, -1 unknown."""
    starts: np.ndarray
    """int64 [users + 1], first event of each user."""
    keys: np.ndarray
    """int64 [n], user * span + time - origin, ascending."""
    origin: int
    span: int

    @classmethod
    def build(cls, events: Window, user: np.ndarray, item: np.ndarray, users: int, origin: int, span: int) -> "_Log":
        starts = np.searchsorted(user, np.arange(users + 1))
        keys = user * span + (events.times - origin)
        return cls(events=events, item=item, starts=starts, keys=keys, origin=origin, span=span)

    def bounds(self, user: np.ndarray, times_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First event and end of the events strictly before each (user row, time); empty for user -1."""
        offset = np.clip(times_ms - self.origin, 0, self.span - 1)
        known = user >= 0
        row = np.where(known, user, 0)
        end = np.searchsorted(self.keys, row * self.span + offset, side="left")
        start = self.starts[row] if len(self.starts) > 1 else np.zeros(len(row), np.int64)
        return np.where(known, start, 0), np.where(known, end, 0)

    def pathway(self, user: np.ndarray, times_ms: np.ndarray, limit: int) -> Pathway:
        if len(self.keys) == 0:
            return Pathway.empty(len(user), limit)
        start, end = self.bounds(user, times_ms)
        rows = end[:, None] - limit + np.arange(limit)
        valid = rows >= start[:, None]
        rows = np.where(valid, rows, 0)

        def gather(column: np.ndarray, kind: type, padding: int = 0) -> np.ndarray:
            return np.where(valid, column[rows], padding).astype(kind)

        pathway = Pathway(
            item=gather(self.item, np.int32, -1),
            age_s=np.where(valid, (times_ms[:, None] - self.events.times[rows]) / 1000, 0).astype(np.float32),
            play_ms=gather(self.events.play_ms, np.float32),
            duration_ms=gather(self.events.duration_ms, np.float32),
            labels=gather(self.events.labels, np.int32),
        )
        return compact(pathway) if (pathway.item[valid] < 0).any() else pathway

    def window(self, start: int, end: int, limit: int) -> Window:
        return self.events.take(slice(max(start, end - limit), end))


@dataclass(frozen=True, kw_only=True)
class History:
    """Columnar log of all users: every exposure once, with its feedback."""

    users: pd.Index
    log: _Log
    positive: _Log

    @classmethod
    def from_exposures(cls, exposures: pa.Table, item_index: pd.Index | None = None) -> "History":
        """From exposures in any order; repeated exposure ids are merged as ``fold`` merges them.

        Without ``item_index`` every item is unknown: enough for ``latest``, not for ``context_pathways``.
        """
        codes, users = pd.factorize(exposures.column("user_id").to_pandas().to_numpy(object), sort=True)
        events, user = merge(window_of(exposures), codes.astype(np.int64))
        if item_index is None:
            item = np.full(len(events), -1, np.int32)
        else:
            item = item_index.get_indexer(pd.Index(events.item_ids, dtype=object)).astype(np.int32)
        origin = int(events.times.min()) if len(events) else 0
        span = int(events.times.max()) - origin + 2 if len(events) else 2
        if len(users) * span >= 2**62:
            raise ValueError(f"{len(users)} users over {span} ms are too many for one history; split the log by user")
        keep = is_positive(events.play_ms, events.duration_ms, events.labels)
        return cls(
            users=pd.Index(users, dtype=object),
            log=_Log.build(events, user, item, len(users), origin, span),
            positive=_Log.build(events.take(keep), user[keep], item[keep], len(users), origin, span),
        )

    def context_pathways(
        self, user_ids: Sequence[str] | np.ndarray, times_ms: np.ndarray, limits: Limits
    ) -> tuple[Pathway, Pathway]:
        """Short-term and positive pathways of B requests, from events strictly earlier than ``times_ms`` [B]."""
        user = self.users.get_indexer(pd.Index(np.asarray(user_ids, object), dtype=object)).astype(np.int64)
        times_ms = np.asarray(times_ms, np.int64)
        return (
            self.log.pathway(user, times_ms, limits.short),
            self.positive.pathway(user, times_ms, limits.positive),
        )

    def latest(self, limits: Limits, before_ms: int | None = None) -> tuple[list[str], list[Window], list[Window]]:
        """Every user with events, and their short-term and positive windows (strictly before ``before_ms``)."""
        user = np.arange(len(self.users))
        time = np.full(len(user), np.iinfo(np.int64).max // 2 if before_ms is None else before_ms)
        start, end = self.log.bounds(user, time)
        positive_start, positive_end = self.positive.bounds(user, time)
        rows = np.flatnonzero(end > start)
        return (
            self.users[rows].tolist(),
            [self.log.window(start[row], end[row], limits.short) for row in rows],
            [self.positive.window(positive_start[row], positive_end[row], limits.positive) for row in rows],
        )
