import contextlib
import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.intake.events import MAX_EVENTS, MAX_ID_CHARS, InvalidBatch, decode, parse
from features.schema import EVENTS, FLAGS

TIME = 1_651_363_200_123
IDS = {"exposure_id": "e", "request_id": "r", "user_id": "u", "item_id": "i"}
GOOD: dict[str, dict[str, Any]] = {
    "impression": {**IDS, "position": 0, "event_time": TIME, "source": "onerec", "duration_ms": 9000},
    "feedback": {"exposure_id": "e", "user_id": "u", "event_time": TIME, "play_ms": 10, **dict.fromkeys(FLAGS, True)},
    "served": {
        **IDS,
        "sid": [1, 2],
        "position": 0,
        "model_version": "m",
        "log_probs": [-1.0, -0.5],
        "event_time": TIME,
    },
}
KINDS = sorted(GOOD)


def body(*events: Any) -> bytes:
    return json.dumps({"events": list(events)}).encode()


def good(kind: str, /, **changes: Any) -> dict[str, Any]:
    return {"kind": kind, **GOOD[kind]} | changes


def refused(*events: Any) -> InvalidBatch:
    with pytest.raises(InvalidBatch) as caught:
        parse(body(*events))
    return caught.value


text = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=128)
times = st.datetimes(datetime(2000, 1, 2), datetime(2099, 12, 30), timezones=st.just(UTC))


@settings(max_examples=100)
@given(text, text, times, st.integers(0, 10**9), st.sets(st.sampled_from(FLAGS)), st.booleans())
def test_valid_feedback_becomes_the_row_it_says(
    exposure: str, user: str, time: datetime, play_ms: int, flags: set[str], iso: bool
) -> None:
    milliseconds = (time - datetime(1970, 1, 1, tzinfo=UTC)) // (datetime.resolution * 1000)
    event = {"kind": "feedback", "exposure_id": exposure, "user_id": user, "play_ms": play_ms}
    event |= {"event_time": time.isoformat() if iso else milliseconds, **dict.fromkeys(flags, True)}
    decoded = decode([body(event)])
    (row,) = decoded.tables["feedback"].to_pylist()
    assert decoded.rejected == []
    assert (row["exposure_id"], row["user_id"], row["play_ms"]) == (exposure, user, play_ms)
    assert row["event_time"] == datetime.fromtimestamp(milliseconds // 1000, UTC).replace(
        microsecond=milliseconds % 1000 * 1000
    )
    assert {flag for flag in FLAGS if row[flag]} == flags


def test_every_kind_has_the_schema_of_its_events() -> None:
    decoded = decode([body(*(good(kind) for kind in KINDS)), body(good("served", position=3))])
    assert {kind: table.schema for kind, table in decoded.tables.items()} == EVENTS
    assert decoded.tables["served"].column("position").to_pylist() == [0, 3]
    assert decoded.tables["served"].column("log_probs").to_pylist()[0] == [-1.0, -0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_is_required_and_typed_and_none_may_be_added(kind: str) -> None:
    optional = set(FLAGS)
    for name in GOOD[kind]:
        event = good(kind)
        del event[name]
        if name not in optional:
            assert name in refused(good(kind), event).reason
        for wrong in (None, {}, [[]], "", -1, True if name not in optional else 1, 2**70):
            error = refused(good(kind), good(kind, **{name: wrong}))
            assert (error.index, name in error.reason) == (1, True)
    assert "log_prob" in refused(good(kind, log_prob=0)).reason
    if kind != "served":
        assert refused(good(kind, log_probs=[-1.0])).index == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"event_time": TIME // 1000},
        {"event_time": TIME * 1000},
        {"event_time": "2022-05-01T00:00:00"},
        {"event_time": "1999-12-31T23:59:59Z"},
        {"event_time": "yesterday at noon"},
        {"event_time": str(TIME)},
        {"user_id": "x" * 129},
        {"user_id": "a\nb"},
        {"play_ms": 1.5},
        {"play_ms": 10**10},
        {"like": "true"},
        {"kind": "click"},
    ],
)
def test_wrong_values_are_refused_with_field_and_value(changes: dict[str, Any]) -> None:
    error = refused(good("feedback"), good("feedback", **changes))
    assert error.index == 1
    (value,) = changes.values()
    assert next(iter(changes)) in error.reason
    assert repr(str(value))[1:20] in error.reason


@pytest.mark.parametrize("log_probs", [[-1.0], [-1.0, 0.5], [-1.0, float("nan")], [-1.0, float("-inf")], []])
def test_log_probs_are_log_probabilities_one_per_code(log_probs: list[float]) -> None:
    # NaN and infinities are no JSON: then the batch has no events to point at
    assert refused(good("served", log_probs=log_probs)).index in (0, None)


def test_too_many_events_are_too_large() -> None:
    assert len(parse(body(*[good("feedback")] * MAX_EVENTS))) == MAX_EVENTS
    assert refused(*[good("feedback")] * (MAX_EVENTS + 1)).too_large
    assert parse(body()) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*IDS, "kind", "events"]), inner),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=60), json_values.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidBatch):
        assert isinstance(parse(data), list)
    decode([data])


@settings(max_examples=100)
@given(st.sampled_from(KINDS), st.data())
def test_changed_events_are_stored_as_sent_or_refused(kind: str, data: st.DataObject) -> None:
    event = good(kind, **{data.draw(st.sampled_from([*GOOD[kind], "extra"])): data.draw(json_values)})
    decoded = decode([body(event)])
    assert sum(table.num_rows for table in decoded.tables.values()) + len(decoded.rejected) == 1
    if decoded.tables[kind].num_rows:
        (parsed,) = msgspec.to_builtins(parse(body(event)))
        assert {**event, "event_time": 0} == {**parsed, "event_time": 0}


def test_logged_rows_that_stopped_to_be_valid_are_rejected_alone() -> None:
    bad = good("impression", position=-1)
    decoded = decode([body(good("impression"), bad, 7), b"no json", b'{"events": {}}'])
    assert decoded.tables["impression"].num_rows == 1
    assert [r.row for r in decoded.rejected] == [bad, 7, "no json", '{"events": {}}']
    assert "position" in decoded.rejected[0].reason


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=6) | st.just("x" * 10_000), st.booleans())
def test_ids_are_printable_however_they_are_escaped(name: str, ascii_only: bool) -> None:
    text = json.dumps({"events": [good("feedback", user_id=name)]}, ensure_ascii=ascii_only).encode()
    wanted = 0 < len(name) <= MAX_ID_CHARS and not any(ord(letter) < 32 or ord(letter) == 127 for letter in name)
    if wanted:
        (event,) = parse(text)
        assert event.user_id == name
        return
    with pytest.raises(InvalidBatch, match="user_id") as caught:
        parse(text)
    assert (caught.value.index, caught.value.kind) == (0, "invalid")


def test_what_is_no_json_is_malformed_and_what_is_too_much_too_large() -> None:
    for text in (b"", b"{", b"\xff", b'{"events": [NaN]}', b'{"events": []} x', b"[" * 100_000):
        with pytest.raises(InvalidBatch) as caught:
            parse(text)
        assert caught.value.kind in ("malformed", "invalid")
        assert caught.value.index is None
    assert refused(*[good("feedback")] * (MAX_EVENTS + 1)).kind == "too_large"
