"""The lifelong pathway as daily rows: what each user watched, as known at the midnight after an active day.

One row per (user, UTC midnight that follows a day with watched views), so a point-in-time join gives a request the
state of the last midnight before it, off-line and on-line alike. Left out: the hierarchical K-means compression of
up to 100 000 items into 2 000 (OneRec technical report, section 2.2): this is plain recency, the newest
``limit`` views of at least 3 s or half the video.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from features.histories.context import Pathway, pathway_from_events
from features.histories.windows import COLUMNS, Window, concat_windows, merge, window_of
from features.schema import TIME

DAY_MS = 86_400_000
WATCHED_MS = 3_000

LIST_TYPES = {name: pa.list_(pa.string() if name == "item_ids" else pa.int64()) for name in COLUMNS}
"""Arrow types of a window stored in one row; features.store stores the same ones."""

WINDOW_ROWS = pa.schema(
    [pa.field("user_id", pa.string()), pa.field("event_timestamp", TIME)]
    + [pa.field(name, kind) for name, kind in LIST_TYPES.items()]
)


def daily_lifelong(exposures: pa.Table, limit: int) -> pa.Table:
    """WINDOW_ROWS: per user and active day, the newest ``limit`` watched views before the following UTC midnight."""
    codes, users = pd.factorize(exposures.column("user_id").to_pandas().to_numpy(object), sort=True)
    events, user = merge(window_of(exposures), codes.astype(np.int64))
    watched = (events.play_ms >= WATCHED_MS) | ((events.duration_ms > 0) & (2 * events.play_ms >= events.duration_ms))
    events, user = events.take(watched), user[watched]
    day = events.times // DAY_MS
    last = np.flatnonzero(np.r_[(np.diff(user) != 0) | (np.diff(day) != 0), True]) if len(user) else user
    first_of_user = np.searchsorted(user, user[last])
    starts = np.maximum(first_of_user, last + 1 - limit)
    counts = last + 1 - starts
    rows = np.repeat(starts - np.r_[0, np.cumsum(counts)[:-1]], counts) + np.arange(counts.sum()) if len(last) else last
    return window_rows(users[user[last]].tolist(), (day[last] + 1) * DAY_MS, events.take(rows), counts)


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


def events_of_lists(table: pa.Table, prefix: str = "") -> tuple[Window, np.ndarray]:
    """All events of list columns ``<prefix>ids, ...`` one after the other, and int64 [n] how many each row holds.

    Null lists count as empty; without an ``ids`` column the ids are 0.
    """
    present = [name for name in COLUMNS if prefix + name in table.column_names]
    lists = {name: table.column(prefix + name).combine_chunks() for name in present}
    counts = lists["times"].value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    columns = {
        name: values.flatten().to_numpy(zero_copy_only=False).astype(object if name == "item_ids" else np.int64)
        for name, values in lists.items()
    }
    columns.setdefault("ids", np.zeros(len(columns["times"]), np.int64))
    return Window(**columns), counts


def pathway_from_lists(
    table: pa.Table, times_ms: np.ndarray, item_index: pd.Index, limit: int, prefix: str = "lifelong_"
) -> Pathway:
    """Pathway [B, limit] of B requests whose windows are list columns ``<prefix>item_ids, <prefix>times, ...``."""
    events, counts = events_of_lists(table, prefix)
    return pathway_from_events(events, counts, times_ms, item_index, limit)
