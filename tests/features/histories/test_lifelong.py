"""Daily lifelong rows: by recency, by clusters, and night after night against all at once."""

import numpy as np
import pyarrow as pa
import pytest

from features.histories.clusters import ItemVectors
from features.histories.lifelong import (
    DAY_MS,
    LIFELONG_ROWS,
    WATCHED_MS,
    WINDOW_ROWS,
    daily_lifelong,
    events_of_lists,
    rows_of_windows,
    settled,
)
from features.histories.windows import COLUMNS, concat_windows, empty_window, fold, window_of
from features.schema import EXPOSURE


def test_each_row_is_the_state_of_its_midnight(make_exposures) -> None:
    table = make_exposures(400, users=3)
    rows = daily_lifelong(table, limit=8)
    assert rows.schema == LIFELONG_ROWS
    assert rows.select(WINDOW_ROWS.names).schema == WINDOW_ROWS
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


def test_windows_come_back_from_their_lists(make_exposures) -> None:
    events = window_of(make_exposures(60))
    windows = [empty_window(), fold(empty_window(), events, 9), fold(empty_window(), events, 2)]
    found, counts = events_of_lists(rows_of_windows(["a", "b", "c"], np.zeros(3, np.int64), windows))
    assert counts.tolist() == [0, 9, 2]
    assert found == concat_windows(windows)


def test_null_lists_count_as_empty(make_exposures) -> None:
    window = fold(empty_window(), window_of(make_exposures(5, users=1)), 9)
    rows = rows_of_windows(["a"], np.zeros(1, np.int64), [window])
    nulls = pa.table({field.name: pa.nulls(1, field.type) for field in WINDOW_ROWS}, schema=WINDOW_ROWS)
    events, counts = events_of_lists(pa.concat_tables([nulls, rows, nulls]))
    assert counts.tolist() == [0, 5, 0]
    assert events == window


def vectors_of(items: int, without: int = 0) -> ItemVectors:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(items - without, 4)).astype(np.float32)
    names = np.array([f"i{item}" for item in range(without, items)], object)
    return ItemVectors(item_ids=names, vectors=vectors, version="v")


def watched_times(table: pa.Table, user: str) -> np.ndarray:
    events = window_of(table)
    mine = np.array(table["user_id"].to_pylist(), object) == user
    return np.sort(events.times[mine & ((events.play_ms >= WATCHED_MS) | (2 * events.play_ms >= events.duration_ms))])


def test_clusters_stand_for_every_view_before_their_midnight(make_exposures) -> None:
    table = make_exposures(900, users=3, days=20)
    rows = daily_lifelong(table, 60, vectors_of(30)).to_pylist()
    clustered = {user: set() for user in ("u0", "u1", "u2")}
    for row in rows:
        midnight = int(row["event_timestamp"].timestamp() * 1000)
        before = watched_times(table, row["user_id"])
        before = before[before < midnight]
        assert len(row["times"]) <= 60
        assert sum(row["counts"]) == len(before)
        assert row["times"] == sorted(row["times"])
        assert row["times"][-1] < midnight
        # a cluster's time is the mean of its views', so the mean over all views stays (up to rounding down)
        mean = np.average(np.array(row["times"]) - row["times"][0], weights=row["counts"]) + row["times"][0]
        assert mean == pytest.approx(before.mean(), abs=len(rows))
        clustered[row["user_id"]].add(row["clustered_ms"])
    nights = len(rows) / 3
    assert all(3 < len(stamps) < nights / 2 for stamps in clustered.values()), "again and again, but not every night"


def test_a_night_after_a_night_equals_all_at_once(make_exposures) -> None:
    table = make_exposures(700, users=4, days=12)
    times = table["event_time"].cast(pa.int64()).to_numpy()
    for vectors in (None, vectors_of(30)):
        rows = None
        for end in range(int(times.min()) // DAY_MS + 1, int(times.max()) // DAY_MS + 2):
            known = table.filter(pa.array(times < end * DAY_MS))
            rows = daily_lifelong(known, 30, vectors, None if rows is None else settled(rows, end * DAY_MS))
        assert rows.equals(daily_lifelong(table, 30, vectors))


def test_going_on_reads_only_what_is_new_and_keeps_what_is_settled(make_exposures) -> None:
    table = make_exposures(700, users=4, days=12)
    times = table["event_time"].cast(pa.int64()).to_numpy()
    middle = (int(times.min()) // DAY_MS + 6) * DAY_MS
    vectors = vectors_of(30)
    first = daily_lifelong(table.filter(pa.array(times < middle)), 30, vectors)
    held = settled(first, middle)
    assert 0 < held.num_rows < first.num_rows
    later = table.filter(pa.array(times >= middle - 2 * DAY_MS))
    assert daily_lifelong(later, 30, vectors, held).equals(daily_lifelong(table, 30, vectors))
    assert daily_lifelong(table.slice(0, 0), 30, vectors, first).equals(first)


def test_a_past_cut_by_recency_is_clustered_from_the_log_once_there_are_vectors(make_exposures) -> None:
    table = make_exposures(600, users=2, days=10)
    end = int(table["event_time"][-1].as_py().timestamp() * 1000) // DAY_MS * DAY_MS + DAY_MS
    plain = settled(daily_lifelong(table, 30), end)
    rows = daily_lifelong(table, 30, vectors_of(30), plain).to_pylist()
    assert rows[: plain.num_rows // 2] == plain.to_pylist()[: plain.num_rows // 2]
    for user in ("u0", "u1"):
        last = [row for row in rows if row["user_id"] == user][-1]
        assert last["clustered_ms"] > 0
        assert sum(last["counts"]) == len(watched_times(table, user))


def test_items_without_vectors_stand_for_themselves(make_exposures) -> None:
    table = make_exposures(900, users=2, days=20)
    rows = daily_lifelong(table, 40, vectors_of(30, without=10)).to_pylist()
    for row in rows:
        alone = [count for item, count in zip(row["item_ids"], row["counts"], strict=True) if int(item[1:]) < 10]
        assert set(alone) <= {1}
        assert len(row["ids"]) == len(set(row["ids"])) <= 40
    last = rows[-1]
    assert any(int(item[1:]) < 10 for item in last["item_ids"])
    assert max(last["counts"]) > 1


def test_a_log_without_play_times_has_a_past_too(make_exposures) -> None:
    table = make_exposures(60)
    for name in ("play_ms", "duration_ms"):
        column = table.schema.get_field_index(name)
        table = table.set_column(column, table.schema.field(name), pa.array(np.zeros(60, np.int64)))
    rows = daily_lifelong(table, 64)
    liked = set(table.filter(table["long_view"])["item_id"].to_pylist())
    assert set(rows["item_ids"].combine_chunks().flatten().to_pylist()) == liked != set()
