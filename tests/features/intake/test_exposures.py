from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.intake import exposures, partitions
from features.schema import EVENTS, EXPOSURE, FEEDBACK, FLAGS, IMPRESSION, SERVED
from features.storage import Storage

DAY = datetime(2022, 5, 1, tzinfo=UTC)
T0 = int(DAY.timestamp() * 1000)
HOUR = 3_600_000


def impression(name: str, time: int = T0, item: str = "seen", **changes: Any) -> dict[str, Any]:
    row = {"exposure_id": name, "request_id": "r", "user_id": "u", "item_id": item, "position": 0}
    return row | {"event_time": time, "source": "onerec", "duration_ms": 9000} | changes


def served(name: str, time: int = T0, item: str = "sent", **changes: Any) -> dict[str, Any]:
    row = {"exposure_id": name, "request_id": "r", "user_id": "u", "item_id": item, "position": 0, "event_time": time}
    return row | {"sid": [1, 2, 3], "model_version": "m", "log_probs": [-0.5, -1.0, -1.5]} | changes


def feedback(name: str, time: int = T0, play_ms: int = 1000, **changes: Any) -> dict[str, Any]:
    row = {"exposure_id": name, "user_id": "u", "event_time": time, "play_ms": play_ms}
    return row | dict.fromkeys(FLAGS, False) | changes


def tables(
    served_rows: list[dict[str, Any]], impressions: list[dict[str, Any]], feedbacks: list[dict[str, Any]]
) -> tuple[pa.Table, pa.Table, pa.Table]:
    return (
        pa.Table.from_pylist(served_rows, schema=SERVED),
        pa.Table.from_pylist(impressions, schema=IMPRESSION),
        pa.Table.from_pylist(feedbacks, schema=FEEDBACK),
    )


def store(storage: Storage, kind: str, *rows: dict[str, Any]) -> None:
    partitions.write(storage, f"events/kind={kind}", pa.Table.from_pylist(list(rows), schema=EVENTS[kind]))


def by_id(table: pa.Table) -> dict[str, dict[str, Any]]:
    rows = {row["exposure_id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows


def test_a_served_row_gives_item_sid_and_log_probs() -> None:
    joined = exposures.join(*tables([served("a")], [impression("a"), impression("b", source="organic")], []))
    rows = by_id(joined.exposures)
    assert joined.exposures.schema == EXPOSURE
    assert (rows["a"]["item_id"], rows["a"]["sid"], rows["a"]["model_version"]) == ("sent", [1, 2, 3], "m")
    assert rows["a"]["log_probs"] == [-0.5, -1.0, -1.5]
    assert (rows["b"]["item_id"], rows["b"]["sid"], rows["b"]["log_probs"]) == ("seen", None, None)


def test_of_two_items_sent_under_one_id_the_seen_one_wins() -> None:
    sent = [served("a", T0, item="other"), served("a", T0 + 5, item="seen", log_probs=[-9.0, -9.0, -9.0])]
    row = by_id(exposures.join(*tables(sent, [impression("a")], [])).exposures)["a"]
    assert (row["item_id"], row["log_probs"]) == ("seen", [-9.0, -9.0, -9.0])


def test_only_impressions_train_and_strays_are_reported() -> None:
    joined = exposures.join(
        *tables(
            [served("never shown"), served("a")],
            [impression("a"), impression("lost log"), impression("c", source="cascade")],
            [feedback("a"), feedback("a", like=True), feedback("nowhere")],
        )
    )
    assert set(by_id(joined.exposures)) == {"a", "lost log", "c"}
    assert joined.served_without_impression.column("exposure_id").to_pylist() == ["never shown"]
    assert joined.impressions_without_served.column("exposure_id").to_pylist() == ["lost log"]
    assert joined.feedback_without_impression.column("exposure_id").to_pylist() == ["nowhere"]
    assert joined.exposures_without_feedback == 2


def test_another_users_events_are_rejected_with_the_reason() -> None:
    joined = exposures.join(
        *tables(
            [served("a")],
            [impression("a", T0 - 10, user_id="thief"), impression("a")],
            [feedback("a", user_id="thief", dislike=True), feedback("a", play_ms=7)],
        )
    )
    row = by_id(joined.exposures)["a"]
    assert (row["user_id"], row["play_ms"], row["dislike"]) == ("u", 7, False)
    assert [(r.kind, r.row["user_id"]) for r in joined.rejected] == [("impression", "thief"), ("feedback", "thief")]
    assert joined.feedback_without_impression.num_rows == 0


def test_no_events_give_no_exposures() -> None:
    assert exposures.join(*tables([], [], [])).exposures.equals(EXPOSURE.empty_table())


events = st.lists(
    st.one_of(
        st.builds(impression, st.sampled_from("abc"), st.integers(T0, T0 + 50), st.sampled_from("xy")),
        st.builds(served, st.sampled_from("abc"), st.integers(T0, T0 + 50), st.sampled_from("xy")),
        st.builds(feedback, st.sampled_from("abc"), st.integers(T0, T0 + 50), st.integers(0, 9), like=st.booleans()),
    ),
    max_size=12,
)


def split(rows: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table, pa.Table]:
    sent = [row for row in rows if "log_probs" in row]
    return tables(sent, [r for r in rows if "source" in r], [r for r in rows if "play_ms" in r])


@settings(max_examples=60)
@given(events, st.randoms(use_true_random=False))
def test_the_join_ignores_order_and_repeats(rows: list[dict[str, Any]], random: Any) -> None:
    again = rows + rows[:3]
    random.shuffle(again)
    assert exposures.join(*split(rows)).exposures.equals(exposures.join(*split(again)).exposures)


@settings(max_examples=60)
@given(st.lists(events, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_merging_in_steps_equals_merging_at_once(groups: list[list[dict[str, Any]]], random: Any) -> None:
    parts = [exposures.join(*split(rows)).exposures for rows in groups]
    at_once = exposures.merge(pa.concat_tables(parts))
    random.shuffle(parts)
    stepwise = parts[0]
    for part in parts[1:]:
        stepwise = exposures.merge(pa.concat_tables([part, stepwise]))
    assert at_once.equals(stepwise)


def test_written_exposures_are_read_back_once_and_pruned_by_hour(s3: Storage) -> None:
    rows = [impression(str(n), T0 + n * HOUR // 2) for n in range(8)]
    table = exposures.join(*tables([], rows, [])).exposures
    keys = exposures.write(s3, table)
    assert len(keys) == 4
    assert keys[1].startswith("exposures/date=2022-05-01/hour=01/")
    assert exposures.write(s3, table) == keys
    exposures.write(s3, table.slice(2, 3))
    assert exposures.read(s3).equals(table)
    start, end = DAY + timedelta(hours=1), DAY + timedelta(hours=2, minutes=30)
    assert exposures.read(s3, start, end).column("exposure_id").to_pylist() == ["2", "3", "4"]
    hours = {key.split("hour=")[1][:2] for key in partitions.keys(s3, "exposures", start, end)}
    assert hours == {"01", "02"}


def test_an_empty_bucket_reads_as_no_exposures(s3: Storage) -> None:
    assert exposures.read(s3).equals(EXPOSURE.empty_table())
    assert exposures.read(s3, DAY, DAY + timedelta(days=1)).num_rows == 0
    assert exposures.write(s3, EXPOSURE.empty_table()) == []


def test_compaction_is_idempotent_and_joins_late_events(s3: Storage) -> None:
    day = timedelta(days=1)
    store(s3, "impression", impression("a", T0 + 23 * HOUR), impression("b", T0 + 2 * HOUR))
    store(s3, "served", served("a", T0 + 23 * HOUR), served("unseen", T0))
    first = exposures.compact(s3, DAY, DAY + day)
    assert (first["exposures"], first["served_without_impression"], first["impressions_without_served"]) == (2, 1, 1)
    assert exposures.compact(s3, DAY, DAY + day) == first

    store(s3, "feedback", feedback("a", T0 + 24 * HOUR + 5, like=True), feedback("b", T0 + 25 * HOUR, play_ms=3))
    store(s3, "impression", impression("c", T0 + 30 * HOUR))
    second = exposures.compact(s3, DAY + day, DAY + 2 * day)
    assert second["exposures"] == 1
    rows = by_id(exposures.read(s3))
    assert set(rows) == {"a", "b", "c"}
    assert rows["a"]["like"]
    assert rows["a"]["log_probs"] is not None
    assert rows["b"]["play_ms"] == 3


def test_a_part_that_breaks_the_schema_is_rejected_and_the_rest_compacted(s3: Storage) -> None:
    store(s3, "impression", impression("a"))
    broken = pa.table({"exposure_id": ["x"], "event_time": pa.array([T0], pa.timestamp("ms", tz="UTC"))})
    (key,) = partitions.write(s3, "events/kind=impression", broken)
    summary = exposures.compact(s3, DAY, DAY + timedelta(days=1))
    assert (summary["exposures"], summary["rejected"]) == (1, 1)
    (row,) = s3.get_table(summary["rejected_key"]).to_pylist()
    assert key in row["row"]
    assert "request_id" in row["reason"]
    with pytest.raises(ValueError, match="request_id"):
        exposures.read_events(s3, "impression", None, None)


def test_naive_and_empty_ranges_are_refused(s3: Storage) -> None:
    with pytest.raises(ValueError, match="time zone"):
        exposures.read(s3, datetime(2022, 5, 1), DAY)
    with pytest.raises(ValueError, match="empty"):
        exposures.compact(s3, DAY, DAY)


class Fetches:
    """Counts the bytes that a storage hands out."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        whole, ranged = Storage.get, Storage.get_range

        def get(storage: Storage, key: str) -> bytes:
            return self._counted(whole(storage, key))

        def get_range(storage: Storage, key: str, offset: int, length: int) -> bytes:
            return self._counted(ranged(storage, key, offset, length))

        monkeypatch.setattr(Storage, "get", get)
        monkeypatch.setattr(Storage, "get_range", get_range)

    def _counted(self, data: bytes) -> bytes:
        self.bytes += len(data)
        return data


def test_a_window_fetches_its_row_groups_and_columns_alone(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "ROW_GROUP", 5_000)
    monkeypatch.setattr(partitions, "WHOLE_BYTES", 1_000)
    rows = [impression(f"{n:05d}", T0 + n * 80, item=f"item {n * 7919 % 10007}") for n in range(40_000)]
    table = exposures.join(*tables([], rows, [])).exposures
    (key,) = exposures.write(s3, table)
    size = s3.objects(key)[0][1]
    fetches = Fetches(s3, monkeypatch)
    start, end = DAY + timedelta(minutes=30), DAY + timedelta(minutes=31)
    expected = table.filter(pc.and_(pc.greater_equal(table["event_time"], start), pc.less(table["event_time"], end)))
    assert exposures.read(s3, start, end).equals(expected)
    assert 0 < fetches.bytes < size / 2
    fetches.bytes = 0
    assert exposures.read(s3, start, end, columns=["item_id"]).equals(expected.select(["item_id"]))
    assert 0 < fetches.bytes < size / 3
    assert exposures.read(s3, columns=["event_time"]).equals(table.select(["event_time"]))
    with pytest.raises(ValueError, match="colour"):
        exposures.read(s3, columns=["colour"])


def test_columns_of_overlapping_parts_are_merged_first(s3: Storage) -> None:
    for likes in ({"a": True}, {"b": True}):
        told = [feedback(name, like=like) for name, like in likes.items()]
        exposures.write(s3, exposures.join(*tables([], [impression("a"), impression("b")], told)).exposures)
    assert exposures.read(s3, columns=["exposure_id", "like"]).to_pydict() == {
        "exposure_id": ["a", "b"],
        "like": [True, True],
    }


def test_late_feedback_is_joined_up_to_the_horizon_and_then_reported(s3: Storage) -> None:
    day, late = timedelta(days=1), timedelta(hours=6)
    store(s3, "impression", impression("a", T0 + 20 * HOUR), impression("b", T0 + 16 * HOUR))
    store(s3, "feedback", feedback("a", T0 + 20 * HOUR + 5, like=True), feedback("never shown", T0 + 2 * HOUR))
    first = exposures.compact(s3, DAY, DAY + day, late=late)
    assert (first["feedback_without_impression"], first["feedback_expired"], first["late_hours"]) == (1, 1, 6)
    (row,) = s3.get_table(first["rejected_key"]).to_pylist()
    assert "never shown" in row["row"]
    assert "no impression of this exposure within 6 h" in row["reason"]

    store(s3, "feedback", feedback("a", T0 + 25 * HOUR, dislike=True), feedback("b", T0 + 20 * HOUR, collect=True))
    store(s3, "feedback", feedback("comes later", T0 + 47 * HOUR))
    second = exposures.compact(s3, DAY + day, DAY + 2 * day, late=late)
    assert (second["feedback_expired"], second["exposures_belated"]) == (0, 1)
    rows = by_id(exposures.read(s3))
    assert (rows["a"]["like"], rows["a"]["dislike"]) == (True, True)
    assert rows["b"]["collect"], "it was told in time, and came when its impression had been compacted"

    store(s3, "impression", impression("comes later", T0 + 47 * HOUR - 9))
    third = exposures.compact(s3, DAY + 2 * day, DAY + 3 * day, late=late)
    assert (third["feedback_expired"], set(by_id(exposures.read(s3)))) == (0, {"a", "b", "comes later"})


def test_a_run_consumes_what_its_claim_names(s3: Storage) -> None:
    exposures.write(s3, exposures.join(*tables([], [impression("a"), impression("b", T0 + HOUR)], [])).exposures)
    keys = exposures.consume(s3, "run", DAY, DAY + timedelta(hours=1))
    assert keys == partitions.keys(s3, "exposures", DAY, DAY + timedelta(hours=1))
    claim = s3.get_json("manifests/consumed/run.json")
    assert (claim["segments"], claim["start"]) == (keys, DAY.isoformat())


def test_a_compaction_in_slices_gives_the_same_exposures_and_counts(
    s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"exposure {n}" for n in range(40)]
    store(s3, "impression", *(impression(name, T0 + n * HOUR // 4) for n, name in enumerate(names)))
    store(s3, "served", *(served(name) for name in names[::2]))
    store(s3, "feedback", *(feedback(name, T0 + n * HOUR // 4 + 9, play_ms=n) for n, name in enumerate(names[5:])))
    store(s3, "feedback", feedback("nowhere", T0 + 5), feedback(names[0], user_id="thief"))
    window = DAY, DAY + timedelta(days=1)
    whole = exposures.compact(s3, *window, late=timedelta(hours=6))
    read = exposures.read(s3)
    for key in whole["segments"]:
        s3.remove(key)
    monkeypatch.setattr(exposures, "SLICE_BYTES", 4000)
    sliced = exposures.compact(s3, *window, late=timedelta(hours=6))
    assert len(sliced["segments"]) > len(whole["segments"])
    assert {**sliced, "segments": 0} == {**whole, "segments": 0}
    assert exposures.read(s3).equals(read)
