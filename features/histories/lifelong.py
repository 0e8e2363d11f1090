"""The lifelong pathway as daily rows: what each user watched, as known at the midnight after an active day.

One row per (user, UTC midnight that follows a day with watched views), so a point-in-time join gives a request the
state of the last midnight before it, off-line and on-line alike. A user with more watched views (at least 3 s or half
the video) than fit is compressed by hierarchical K-means on item vectors (``features.histories.clusters``; OneRec
technical report, arXiv 2506.13695, section 2.2), and not every night: clustering leaves a quarter of the places free,
views of later days stand there as clusters of their own, and only when these are used up both are clustered again. So
a past is carried from night to night in at most ``limit`` entries, and the raw log is read once. Without item vectors
(before the first model) it is plain recency. Left out: feedback that comes after its view was compressed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.histories.clusters import ItemVectors, compress
from features.histories.windows import COLUMNS, Window, concat_windows, merge, spans, window_of
from features.schema import FLAGS, TIME

DAY_MS = 86_400_000
WATCHED_MS = 3_000
LONG_VIEW = 1 << FLAGS.index("long_view")
SPARE = 0.25
"""Share of the places that clustering leaves to the views of the days after it."""
SETTLED_MS = 2 * DAY_MS
"""Rows so much older than the newest data no longer change: late feedback and joins are through by then."""
KEPT_MS = 60 * DAY_MS
"""How long rows are kept: the view's TTL; a user's newest row stays whatever its age."""

LIST_TYPES = {name: pa.list_(pa.string() if name == "item_ids" else pa.int64()) for name in COLUMNS}
"""Arrow types of a window stored in one row; features.store stores the same ones."""

WINDOW_ROWS = pa.schema(
    [pa.field("user_id", pa.string()), pa.field("event_timestamp", TIME)]
    + [pa.field(name, kind) for name, kind in LIST_TYPES.items()]
)
LIFELONG_ROWS = pa.schema(
    [*WINDOW_ROWS, pa.field("counts", pa.list_(pa.int64())), pa.field("clustered_ms", pa.int64())]
)
"""A window's columns, how many views each entry stands for, and the midnight of the last clustering (0: never, CUT)."""
CUT = -1
"""In ``clustered_ms``: older views than these were left out, for want of vectors."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Entries:
    """Views and clusters of many users in order of (user, time, id)."""

    events: Window
    counts: np.ndarray
    user: np.ndarray
    day: np.ndarray
    """UTC day of each view; -1 for what earlier nights have told already."""

    def take(self, rows: np.ndarray | slice) -> "_Entries":
        return _Entries(
            events=self.events.take(rows), counts=self.counts[rows], user=self.user[rows], day=self.day[rows]
        )


def daily_lifelong(
    exposures: pa.Table, limit: int, vectors: ItemVectors | None = None, previous: pa.Table | None = None
) -> pa.Table:
    """LIFELONG_ROWS: per user and active day, at most ``limit`` watched views or clusters before the UTC midnight.

    ``previous`` are rows of earlier nights that still hold (``settled``): they come back as they are, each user goes
    on from the newest of them, and of ``exposures`` only what is later counts. A user whose past was cut without ever
    being clustered is taken from the log anew once there are ``vectors``. Users are independent of each other, so
    partitions of them may be done apart.
    """
    past = _newest_rows(previous if previous is not None else LIFELONG_ROWS.empty_table())
    settled_ms = int(stamps_of(previous).max()) if previous is not None and previous.num_rows else 0
    users, entries = _gather(exposures, past, settled_ms, vectors is not None)
    known = dict(zip(past.column("user_id").to_pylist(), past.column("clustered_ms").to_pylist(), strict=True))
    clustered_ms = np.array([known.get(user, 0) for user in users], np.int64)
    split = (np.bincount(entries.user, minlength=len(users)) > limit) & (vectors is not None)
    own = split[entries.user]
    tables = [] if previous is None else [_within_reach(previous, past)]
    tables.append(_plain_rows(users, entries.take(~own), limit, clustered_ms))
    if vectors is not None and own.any():
        tables.append(_clustered_rows(users, entries.take(own), limit, vectors, clustered_ms, settled_ms))
    return pa.concat_tables(tables).sort_by([("user_id", "ascending"), ("event_timestamp", "ascending")])


def settled(rows: pa.Table, end_ms: int) -> pa.Table:
    """Those of ``rows`` that data up to ``end_ms`` no longer changes: what the next night may go on from."""
    return rows.filter(pa.array(stamps_of(rows) <= end_ms // DAY_MS * DAY_MS - SETTLED_MS))


def _gather(exposures: pa.Table, past: pa.Table, settled_ms: int, clustering: bool) -> tuple[np.ndarray, _Entries]:
    """Users in order of their ids, and their entries: the carried past and the watched views of ``exposures``.

    With ``clustering`` a past that was cut by plain recency is read from the exposures instead.
    """
    told = past.column("user_id").to_pandas().to_numpy(object)
    cut = (past.column("clustered_ms").to_numpy() == CUT) & clustering
    carried, counts = events_of_lists(past.filter(pa.array(~cut)))
    ids = np.concatenate([exposures.column("user_id").to_pandas().to_numpy(object), told])
    codes, users = pd.factorize(ids, sort=True)
    views, user = merge(window_of(exposures), codes[: exposures.num_rows].astype(np.int64))
    has_row, reads_log = np.zeros(len(users), bool), np.zeros(len(users), bool)
    has_row[codes[exposures.num_rows :]] = True
    reads_log[codes[exposures.num_rows :][cut]] = True
    old = has_row[user] & (views.times < settled_ms)
    kept = watched(views) & (~old | reads_log[user])
    views, user, old = views.take(kept), user[kept], old[kept]
    past_counts = past.filter(pa.array(~cut)).column("counts").combine_chunks().flatten().to_numpy()
    all_users = np.concatenate([np.repeat(codes[exposures.num_rows :][~cut], counts), user])
    events = concat_windows([carried, views])
    order = np.lexsort((events.ids, events.times, all_users))
    entries = _Entries(
        events=events,
        counts=np.concatenate([past_counts, np.ones(len(views), np.int64)]),
        user=all_users,
        day=np.concatenate([np.full(len(carried), -1), np.where(old, -1, views.times // DAY_MS)]),
    )
    return users, entries.take(order)


def watched(events: Window) -> np.ndarray:
    """bool [n]: at least 3 s, or half of the video; a log without play times says it by its long views."""
    long_enough: np.ndarray = events.play_ms >= WATCHED_MS
    timed = events.duration_ms > 0
    told = ~timed & ((events.labels & LONG_VIEW) != 0)
    return long_enough | told | (timed & (2 * events.play_ms >= events.duration_ms))


def _plain_rows(users: np.ndarray, entries: _Entries, limit: int, clustered_ms: np.ndarray) -> pa.Table:
    """Rows of the newest ``limit`` entries at the end of each day, all users at once."""
    user, day = entries.user, entries.day
    last = np.flatnonzero(np.r_[(np.diff(user) != 0) | (np.diff(day) != 0), True]) if len(user) else user
    last = last[day[last] >= 0]
    first = np.searchsorted(user, user[last])
    starts = np.maximum(first, last + 1 - limit)
    counts = last + 1 - starts
    clustered = np.where(starts > first, CUT, clustered_ms[user[last]])
    own, stamps = entries.take(spans(starts, counts)), (day[last] + 1) * DAY_MS
    return _rows(users[user[last]].tolist(), stamps, own.events, own.counts, counts, clustered)


def _clustered_rows(
    users: np.ndarray,
    entries: _Entries,
    limit: int,
    vectors: ItemVectors,
    clustered_ms: np.ndarray,
    settled_ms: int,
) -> pa.Table:
    """Rows of users with more than ``limit`` entries."""
    bounds = np.flatnonzero(np.r_[True, np.diff(entries.user) != 0, True])
    found: list[tuple[int, int, int, Window, np.ndarray]] = []
    for start, end in pairwise(bounds):
        own = entries.take(slice(start, end))
        user = int(own.user[0])
        days = _nights(own, limit, vectors, int(clustered_ms[user]), settled_ms)
        found += [(user, *day) for day in days]
    windows = [row[3] for row in found]
    each = np.concatenate([row[4] for row in found]) if found else np.empty(0, np.int64)
    lengths = np.array([len(window) for window in windows], np.int64)
    stamps = np.array([row[1] for row in found], np.int64)
    names = [str(users[row[0]]) for row in found]
    clustered = np.array([row[2] for row in found], np.int64)
    return _rows(names, stamps, concat_windows(windows), each, lengths, clustered)


def _nights(
    own: _Entries, limit: int, vectors: ItemVectors, clustered_ms: int, settled_ms: int
) -> Iterator[tuple[int, int, Window, np.ndarray]]:
    """One user's (midnight, midnight of the last clustering, window, counts), night by night."""
    places = max(limit - int(limit * SPARE), 1)
    bounds = np.flatnonzero(np.r_[True, np.diff(own.day) != 0, True])
    window, counts = own.events.take(slice(0, 0)), own.counts[:0]
    for start, end in pairwise(bounds):
        day = int(own.day[start])
        midnight = settled_ms if day < 0 else (day + 1) * DAY_MS
        window = concat_windows([window, own.events.take(slice(start, end))])
        counts = np.r_[counts, own.counts[start:end]]
        if len(window) > limit:
            window, counts = compress(window, counts, vectors, places)
            clustered_ms = midnight
        if day >= 0:
            yield midnight, clustered_ms, window, counts


def _rows(
    user_ids: Sequence[str],
    stamps: np.ndarray,
    events: Window,
    counts: np.ndarray,
    lengths: np.ndarray,
    clustered_ms: np.ndarray,
) -> pa.Table:
    """LIFELONG_ROWS of entries (``events`` and their ``counts``) that stand one after the other, ``lengths`` a row."""
    table = window_rows(user_ids, stamps, events, lengths)
    offsets = table.column("times").combine_chunks().offsets
    table = table.append_column("counts", pa.ListArray.from_arrays(offsets, pa.array(counts, pa.int64())))
    return table.append_column("clustered_ms", pa.array(clustered_ms, pa.int64())).cast(LIFELONG_ROWS)


def stamps_of(rows: pa.Table) -> np.ndarray:
    """int64 [n], UTC ms: the midnights that ``rows`` tell of."""
    stamps: np.ndarray = rows.column("event_timestamp").cast(pa.int64()).to_numpy()
    return stamps


def _newest_rows(rows: pa.Table) -> pa.Table:
    """Each user's newest row."""
    ordered = rows.sort_by([("user_id", "ascending"), ("event_timestamp", "ascending")]).combine_chunks()
    user = ordered.column("user_id")
    last = np.ones(ordered.num_rows, bool)
    if ordered.num_rows > 1:
        last[:-1] = pc.not_equal(user.slice(1), user.slice(0, ordered.num_rows - 1)).to_numpy(zero_copy_only=False)
    return ordered.filter(pa.array(last))


def _within_reach(rows: pa.Table, newest: pa.Table) -> pa.Table:
    """``rows`` that a point-in-time join may still ask for, and each user's ``newest`` one."""
    if not rows.num_rows:
        return rows
    oldest = stamps_of(rows).max() - KEPT_MS
    old = newest.filter(pa.array(stamps_of(newest) < oldest))
    return pa.concat_tables([old, rows.filter(pa.array(stamps_of(rows) >= oldest))])


def window_rows(user_ids: Sequence[str], timestamps_ms: np.ndarray, events: Window, counts: np.ndarray) -> pa.Table:
    """WINDOW_ROWS of windows that stand one after the other in ``events``, ``counts`` rows each."""
    offsets = pa.array(np.r_[0, np.cumsum(counts)].astype(np.int32))
    columns = [pa.array(user_ids, pa.string()), pa.array(timestamps_ms, pa.int64()).cast(TIME)]
    for name, column in zip(COLUMNS, events.columns(), strict=True):
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(column, LIST_TYPES[name].value_type)))
    return pa.table(columns, schema=WINDOW_ROWS)


def rows_of_windows(user_ids: Sequence[str], timestamps_ms: np.ndarray, windows: Sequence[Window]) -> pa.Table:
    """WINDOW_ROWS, one row per window."""
    counts = np.array([len(window) for window in windows], np.int64)
    return window_rows(user_ids, timestamps_ms, concat_windows(windows), counts)


def events_of_lists(table: pa.Table) -> tuple[Window, np.ndarray]:
    """All events of a window's list columns one after the other, and int64 [n] how many each row holds.

    Null lists count as empty.
    """
    lists = {name: table.column(name).combine_chunks() for name in COLUMNS}
    counts = lists["times"].value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    columns = {
        name: values.flatten().to_numpy(zero_copy_only=False).astype(object if name == "item_ids" else np.int64)
        for name, values in lists.items()
    }
    return Window(**columns), counts
