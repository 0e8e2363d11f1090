"""Validation of ``POST /v1/events``, and the Arrow tables of validated batches.

The body is ``{"events": [{"kind": "impression" | "feedback" | "served", ...}]}`` with the fields of
``features.schema`` for that kind; ``event_time`` is epoch milliseconds or ISO 8601 with a time zone. Flags that are
left out are false. Unknown fields are refused, so ``log_probs`` cannot hide in a client's event. Validation is
msgspec over typed structs, which parses and checks in one pass without Python per event (five times pydantic's speed
here, and it decides how much one collector takes); the same types give the OpenAPI page (``features.intake.openapi``).
Left out: who may send what (``features.intake.api``).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa
from msgspec import Meta, Struct

from features.intake.rejected import Rejected
from features.schema import EVENTS

MAX_EVENTS = 1000
MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_ID_CHARS = 128

# Data time may be far from wall time (replayed logs, simulated days), so only nonsense is refused.
_EARLIEST_MS = int(datetime(2000, 1, 1, tzinfo=UTC).timestamp() * 1000)
_LATEST_MS = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp() * 1000)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_MS = 10**9  # 11 days: longer plays and videos are unit mistakes
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLACE = re.compile(r" - at `\$(?:\.events)?(?:\[(\d+)\])?(?:\.(\w+))?.*`$")
_FIELD = re.compile(r"field `(\w+)`")


class InvalidBatch(ValueError):
    """A batch that is refused as a whole; ``index`` is the first offending event, None for the batch itself.

    ``kind`` is one of ``malformed`` (no JSON), ``invalid`` (types, values, fields) and ``too_large``.
    """

    def __init__(self, reason: str, *, index: int | None = None, kind: str = "invalid") -> None:
        super().__init__(reason)
        self.reason = reason
        self.index = index
        self.kind = kind

    @property
    def too_large(self) -> bool:
        """Whether a smaller batch would do."""
        return self.kind == "too_large"


# Checked apart (``_check_characters``): here a pattern would cost a run of ``re`` per string.
_PRINTABLE = {"pattern": r"^[^\x00-\x1f\x7f]+$"}
Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS, extra_json_schema=_PRINTABLE)]
Milliseconds = Annotated[int, Meta(ge=0, le=_LONGEST_MS)]
Int32 = Annotated[int, Meta(ge=0, le=2**31 - 1)]
# Number or text is told apart by type: seconds in place of milliseconds are refused, not guessed.
Time = (
    Annotated[int, Meta(ge=_EARLIEST_MS, lt=_LATEST_MS, description="Epoch milliseconds, years 2000 to 2099.")]
    | Annotated[str, Meta(min_length=10, max_length=40, extra_json_schema={"format": "date-time"})]
)
# A probability above one by rounding is still a probability.
LogProb = Annotated[float, Meta(le=1e-3, ge=-1e6)]


class Impression(Struct, kw_only=True, gc=False, forbid_unknown_fields=True, tag_field="kind", tag="impression"):
    """The client showed one item."""

    exposure_id: Id
    request_id: Id
    user_id: Id
    item_id: Id
    position: Int32
    event_time: Time
    source: Literal["onerec", "cascade", "organic"]
    duration_ms: Milliseconds


class Feedback(Struct, kw_only=True, gc=False, forbid_unknown_fields=True, tag_field="kind", tag="feedback"):
    """What the user did with one shown item so far; several of them add up."""

    exposure_id: Id
    user_id: Id
    event_time: Time
    play_ms: Milliseconds
    click: bool = False
    like: bool = False
    follow: bool = False
    comment: bool = False
    forward: bool = False
    collect: bool = False
    dislike: bool = False
    profile_enter: bool = False
    long_view: bool = False


class Served(Struct, kw_only=True, gc=False, forbid_unknown_fields=True, tag_field="kind", tag="served"):
    """The model server sent one item; nobody else may say so."""

    exposure_id: Id
    request_id: Id
    user_id: Id
    item_id: Id
    sid: Annotated[list[Int32], Meta(min_length=1, max_length=16)]
    position: Int32
    model_version: Id
    log_probs: Annotated[list[LogProb], Meta(max_length=16, description="One per code of the sid.")]
    event_time: Time


Event = Impression | Feedback | Served
KINDS: dict[type, str] = {Impression: "impression", Feedback: "feedback", Served: "served"}


class Batch(Struct, forbid_unknown_fields=True):
    """The body of a request."""

    events: Annotated[list[Event], Meta(max_length=MAX_EVENTS)]


_DECODER = msgspec.json.Decoder(Batch)


def parse(body: bytes) -> list[Event]:
    """The validated events of a request body, times as epoch ms; raises InvalidBatch with the first reason."""
    if len(body) > MAX_BODY_BYTES:
        raise InvalidBatch(f"the body has {len(body)} bytes; at most {MAX_BODY_BYTES} are accepted", kind="too_large")
    try:
        events = _DECODER.decode(body).events
    except msgspec.ValidationError as error:
        raise _invalid(str(error), body) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidBatch(f"the body is no JSON in UTF-8: {error}", kind="malformed") from None
    # JSON carries control characters escaped, all but this last one: most bodies need no look at their strings.
    _finish(events, escaped=b"\\" in body or b"\x7f" in body)
    return events


def times_ms(events: Sequence[Event]) -> list[int]:
    """Epoch ms of parsed events."""
    return [event.event_time for event in events]  # type: ignore[misc]  # ``parse`` made numbers of the texts


def _finish(events: list[Event], *, escaped: bool) -> None:
    """What types cannot say; raises InvalidBatch. Times given as text become numbers."""
    texts = str in {type(event.event_time) for event in events}
    if not (escaped or texts or Served in set(map(type, events))):
        return
    for index, event in enumerate(events):
        if isinstance(event.event_time, str):
            event.event_time = _milliseconds(event.event_time, index)
        if escaped:
            _check_characters(event, index)
        if isinstance(event, Served) and len(event.log_probs) != len(event.sid):
            reason = f"log_probs, sid: {len(event.log_probs)} log_probs for {len(event.sid)} codes; give one each"
            raise InvalidBatch(reason, index=index)


def _milliseconds(text: str, index: int) -> int:
    """Epoch ms of an ISO 8601 time."""
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise ValueError("it has no time zone; append Z or an offset, or send epoch milliseconds")
        milliseconds = (time - _EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError) as error:
        raise InvalidBatch(f"event_time: {error} (given: {text!r})", index=index) from None
    if not _EARLIEST_MS <= milliseconds < _LATEST_MS:
        raise InvalidBatch(f"event_time: it must lie in the years 2000 to 2099 (given: {text!r})", index=index)
    return milliseconds


def _check_characters(event: Event, index: int) -> None:
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str) and _CONTROL.search(value):
            raise InvalidBatch(f"{name}: no control characters are allowed (given: {value[:80]!r})", index=index)


@dataclass(frozen=True)
class Decoded:
    """The events of some logged batches as tables by kind, and the events that no longer pass validation."""

    tables: dict[str, pa.Table]
    rejected: list[Rejected] = field(default_factory=list)


def decode(bodies: Sequence[bytes]) -> Decoded:
    """Arrow tables (features.schema.EVENTS) of bodies that ``parse`` accepted when they were logged."""
    events: dict[type, list[Any]] = {kind: [] for kind in KINDS}
    rejected: list[Rejected] = []
    for body in bodies:
        try:
            batch = parse(body)
        except InvalidBatch:
            batch, refused = _salvage(body)
            rejected += refused
        for event in batch:
            events[type(event)].append(event)
    return Decoded({name: _table(name, events[kind]) for kind, name in KINDS.items()}, rejected)


def _table(kind: str, rows: Sequence[Any]) -> pa.Table:
    schema = EVENTS[kind]
    if not rows:
        return schema.empty_table()
    columns = dict(zip(rows[0].__struct_fields__, zip(*map(msgspec.structs.astuple, rows), strict=True), strict=True))
    return pa.table([pa.array(columns[column.name], column.type) for column in schema], schema=schema)


def _salvage(body: bytes) -> tuple[list[Event], list[Rejected]]:
    """Event by event, for batches logged by a version with other rules."""
    good: list[Event] = []
    rejected: list[Rejected] = []
    try:
        events = json.loads(body)["events"]
        if not isinstance(events, list):
            raise TypeError("events is no list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [], [Rejected("unknown", f"no batch of events: {error}", body.decode(errors="replace"))]
    for event in events:
        try:
            good += parse(json.dumps({"events": [event]}).encode())
        except InvalidBatch as error:
            kind = str(event.get("kind")) if isinstance(event, dict) else "unknown"
            rejected.append(Rejected(kind, error.reason, event))
    return good, rejected


def _invalid(message: str, body: bytes) -> InvalidBatch:
    """The first problem in one sentence: the field, what is wrong and what was given."""
    place = _PLACE.search(message)
    problem = message[: place.start()] if place else message
    index = int(place[1]) if place and place[1] else None
    if index is None and "length <=" in problem:
        return InvalidBatch(f"the batch holds more than {MAX_EVENTS} events; split it", kind="too_large")
    if index is None:
        return InvalidBatch(problem)
    named = place and place[2]
    missing = _FIELD.search(problem)
    name = named or (missing[1] if missing else "event")
    return InvalidBatch(f"{name}: {problem}{_given(body, index, named) if named else ''}", index=index)


def _given(body: bytes, index: int, name: str) -> str:
    """What stood in the field, for the message; nothing when the rest of the body is no JSON."""
    try:
        value = json.loads(body)["events"][index][name]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return "" if isinstance(value, dict | list) else f" (given: {str(value)[:80]!r})"
