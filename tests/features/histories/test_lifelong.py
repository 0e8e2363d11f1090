import numpy as np
import pandas as pd
import pyarrow as pa

from features.histories.context import pathway_from_windows
from features.histories.lifelong import (
    DAY_MS,
    WATCHED_MS,
    WINDOW_ROWS,
    daily_lifelong,
    events_of_lists,
    pathway_from_lists,
    rows_of_windows,
)
from features.histories.windows import COLUMNS, empty_window, fold, window_of
from features.schema import EXPOSURE


def test_each_row_is_the_state_of_its_midnight(make_exposures) -> None:
    table = make_exposures(400, users=3)
    rows = daily_lifelong(table, limit=8)
    assert rows.schema == WINDOW_ROWS
    events, owner = window_of(table), np.array(table["user_id"].to_pylist(), object)
    watched = (events.play_ms >= WATCHED_MS) | (2 * events.play_ms >= events.duration_ms)
    seen = set()
    for row in rows.to_pylist():
        midnight = int(row["event_timestamp"].timestamp() * 1000)
        expected = fold(empty_window(), events.take(watched & (owner == row["user_id"])), 8, before_ms=midnight)
        assert midnight % DAY_MS == 0
        assert [row[name] for name in COLUMNS] == [column.tolist() for column in expected.columns()]
        assert midnight - DAY_MS <= row["times"][-1] < midnight
        seen.add((row["user_id"], midnight))
    days = {
        (user, (time // DAY_MS + 1) * DAY_MS) for user, time in zip(owner[watched], events.times[watched], strict=True)
    }
    assert seen == days
    assert len(seen) == rows.num_rows


def test_nothing_watched_gives_no_rows() -> None:
    assert daily_lifelong(EXPOSURE.empty_table(), limit=5).num_rows == 0


def test_lists_and_windows_give_the_same_pathway(make_exposures) -> None:
    table = make_exposures(60)
    windows = [empty_window(), fold(empty_window(), window_of(table), 9), fold(empty_window(), window_of(table), 2)]
    rows = rows_of_windows(["a", "b", "c"], np.zeros(3, np.int64), windows)
    index = pd.Index([f"i{item}" for item in range(20)], dtype=object)
    times = np.full(3, 1_800_000_000_000)
    named = rows.rename_columns([f"lifelong_{name}" if name in COLUMNS else name for name in rows.column_names])
    expected = pathway_from_windows(windows, times, index, 4)
    for prefix, source in (("", rows), ("lifelong_", named), ("lifelong_", named.drop_columns("lifelong_ids"))):
        actual = pathway_from_lists(source, times, index, 4, prefix)
        assert np.array_equal(actual.item, expected.item)
        assert np.array_equal(actual.age_s, expected.age_s)


def test_null_lists_count_as_empty(make_exposures) -> None:
    window = fold(empty_window(), window_of(make_exposures(5, users=1)), 9)
    rows = rows_of_windows(["a"], np.zeros(1, np.int64), [window])
    nulls = pa.table({field.name: pa.nulls(1, field.type) for field in WINDOW_ROWS}, schema=WINDOW_ROWS)
    events, counts = events_of_lists(pa.concat_tables([nulls, rows, nulls]))
    assert counts.tolist() == [0, 5, 0]
    assert events == window
