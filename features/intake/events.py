"""Validation of ``POST /v1/events``, and the Arrow tables of validated batches.

The body is ``{"events": [{"kind": "impression" | "feedback" | "served", ...}]}`` with the fields of
``features.schema`` for that kind; ``event_time`` is epoch milliseconds or ISO 8601 with a time zone. Flags that are
left out are false. Unknown fields are refused, so ``log_probs`` cannot hide in a client's event. Validation is
pydantic-core over typed dicts: no Python runs per event. Left out: who may send what (``features.intake.collector``).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NotRequired

import pyarrow as pa
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from features.intake.rejected import Rejected
from features.schema import EVENTS, FLAGS

MAX_EVENTS = 1000
MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_ID_CHARS = 128

# Data time may be far from wall time (replayed logs, simulated days), so only nonsense is refused.
_EARLIEST_MS = int(datetime(2000, 1, 1, tzinfo=UTC).timestamp() * 1000)
_LATEST_MS = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp() * 1000)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_MS = 10**9  # 11 days: longer plays and videos are unit mistakes


class InvalidBatch(ValueError):
    """A batch that is refused as a whole; ``index`` is the first offending event, None for the batch itself."""

    def __init__(self, reason: str, *, index: int | None = None, too_large: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.index = index
        self.too_large = too_large


def _iso_ms(text: str) -> int:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("the time has no time zone; append Z or an offset, or send epoch milliseconds")
    milliseconds = (time - _EPOCH) // timedelta(milliseconds=1)
    if not _EARLIEST_MS <= milliseconds < _LATEST_MS:
        raise ValueError("the time must lie in the years 2000 to 2099")
    return milliseconds


def _as_long_as_sid(event: "ServedEvent") -> "ServedEvent":
    if len(event["log_probs"]) != len(event["sid"]):
        raise ValueError(f"{len(event['log_probs'])} log_probs for a sid of {len(event['sid'])} codes; give one each")
    return event


Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$")]
Milliseconds = Annotated[int, Field(ge=0, le=_LONGEST_MS)]
Int32 = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Number or text is told apart by type: seconds in place of milliseconds are refused, not guessed.
Time = (
    Annotated[int, Field(ge=_EARLIEST_MS, lt=_LATEST_MS)]
    | Annotated[str, Field(min_length=10, max_length=40), AfterValidator(_iso_ms)]
)
# A probability above one by rounding is still a probability.
LogProb = Annotated[float, Field(le=1e-3, ge=-1e6, allow_inf_nan=False)]

_STRICT = ConfigDict(extra="forbid", strict=True)


@with_config(_STRICT)
class ImpressionEvent(TypedDict):
    """The client showed one item."""

    kind: Literal["impression"]
    exposure_id: Id
    request_id: Id
    user_id: Id
    item_id: Id
    position: Int32
    event_time: Time
    source: Literal["onerec", "cascade", "organic"]
    duration_ms: Milliseconds


@with_config(_STRICT)
class FeedbackEvent(TypedDict):
    """What the user did with one shown item so far; several of them add up."""

    kind: Literal["feedback"]
    exposure_id: Id
    user_id: Id
    event_time: Time
    play_ms: Milliseconds
    click: NotRequired[bool]
    like: NotRequired[bool]
    follow: NotRequired[bool]
    comment: NotRequired[bool]
    forward: NotRequired[bool]
    collect: NotRequired[bool]
    dislike: NotRequired[bool]
    profile_enter: NotRequired[bool]
    long_view: NotRequired[bool]


@with_config(_STRICT)
class ServedEvent(TypedDict):
    """The model server sent one item; nobody else may say so."""

    kind: Literal["served"]
    exposure_id: Id
    request_id: Id
    user_id: Id
    item_id: Id
    sid: Annotated[list[Int32], Field(min_length=1, max_length=16)]
    position: Int32
    model_version: Id
    log_probs: Annotated[list[LogProb], Field(max_length=16)]
    event_time: Time


Event = Annotated[
    ImpressionEvent | FeedbackEvent | Annotated[ServedEvent, AfterValidator(_as_long_as_sid)],
    Field(discriminator="kind"),
]


@with_config(_STRICT)
class Batch(TypedDict):
    """The body of a request."""

    events: Annotated[list[Event], Field(max_length=MAX_EVENTS)]


_BATCH: TypeAdapter[Batch] = TypeAdapter(Batch)


def parse(body: bytes) -> list[dict[str, Any]]:
    """The validated events of a request body, times as epoch ms; raises InvalidBatch with the first reason."""
    if len(body) > MAX_BODY_BYTES:
        raise InvalidBatch(f"the body has {len(body)} bytes; at most {MAX_BODY_BYTES} are accepted", too_large=True)
    try:
        events: list[Any] = _BATCH.validate_json(body)["events"]
    except ValidationError as error:
        raise _invalid(error) from None
    return events


@dataclass(frozen=True)
class Decoded:
    """The events of some logged batches as tables by kind, and the events that no longer pass validation."""

    tables: dict[str, pa.Table]
    rejected: list[Rejected] = field(default_factory=list)


def decode(bodies: Sequence[bytes]) -> Decoded:
    """Arrow tables (features.schema.EVENTS) of bodies that ``parse`` accepted when they were logged."""
    events: dict[str, list[dict[str, Any]]] = {kind: [] for kind in EVENTS}
    rejected: list[Rejected] = []
    for body in bodies:
        try:
            batch = parse(body)
        except InvalidBatch:
            batch, refused = _salvage(body)
            rejected += refused
        for event in batch:
            events[event["kind"]].append(event)
    return Decoded({kind: _table(kind, rows) for kind, rows in events.items()}, rejected)


def _table(kind: str, rows: list[dict[str, Any]]) -> pa.Table:
    schema = EVENTS[kind]
    columns = []
    for column in schema:
        if column.name in FLAGS:
            columns.append(pa.array([row.get(column.name, False) for row in rows], column.type))
        else:
            columns.append(pa.array([row[column.name] for row in rows], column.type))
    return pa.table(columns, schema=schema)


def _salvage(body: bytes) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """Event by event, for batches logged by a version with other rules."""
    good: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    try:
        events = json.loads(body)["events"]
        if not isinstance(events, list):
            raise TypeError("events is no list")
    except (ValueError, KeyError, TypeError) as error:
        return [], [Rejected("unknown", f"no batch of events: {error}", body.decode(errors="replace"))]
    for event in events:
        try:
            good += parse(json.dumps({"events": [event]}).encode())
        except InvalidBatch as error:
            kind = str(event.get("kind")) if isinstance(event, dict) else "unknown"
            rejected.append(Rejected(kind, error.reason, event))
    return good, rejected


def _invalid(error: ValidationError) -> InvalidBatch:
    """The first problem in one sentence, with the index of its event."""
    problems = error.errors(include_url=False, include_context=False)
    # A time reports what each of its two forms found wrong: number first, then text.
    form = 1 if "event_time" in problems[0]["loc"] and isinstance(problems[0]["input"], str) else 0
    problem = problems[form]
    path = problem["loc"]
    if problem["type"] == "too_long" and path == ("events",):
        return InvalidBatch(f"the batch holds more than {MAX_EVENTS} events; split it", too_large=True)
    index = path[1] if len(path) > 1 and path[0] == "events" and isinstance(path[1], int) else None
    # After the index come the kind, the field and, for a union, which member refused it.
    name = str(path[3]) if index is not None and len(path) > 3 else "event"
    given = problem["input"]
    shown = "" if isinstance(given, dict | list | bytes) else f" (given: {str(given)[:80]!r})"
    return InvalidBatch(f"{name}: {problem['msg']}{shown}", index=index)
