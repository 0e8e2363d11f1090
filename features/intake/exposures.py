"""The exposure store: events joined into exposures, the unit of training, in hourly partitions.

A partition made from fewer events is superseded by writing a fuller one beside it, and ``read`` merges what overlaps:
compaction may be repeated at any time. Late feedback is joined for ``late_hours`` after its impression; what then still
has no impression is reported under ``rejected/``. A training run claims the segments it reads (``consume``).
Left out: deleting superseded parts (``features.intake.retention``).
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.intake import partitions
from features.intake.join import Joined, join, merge, rows_of
from features.intake.partitions import Part, between, utc
from features.intake.rejected import Rejected, reject
from features.schema import EVENTS, EXPOSURE, IMPRESSION, SERVED, conform
from features.settings import settings
from features.storage import ObjectMissing, Storage

__all__ = [
    "ROOT",
    "Joined",
    "compact",
    "consume",
    "join",
    "merge",
    "read",
    "read_events",
    "stored_hours",
    "write",
]

log = logging.getLogger(__name__)

ROOT = "exposures"
CLAIMS = "manifests/consumed"

COUNTS = (
    "exposures",
    "exposures_without_feedback",
    "served_without_impression",
    "impressions_without_served",
    "feedback_without_impression",
    "feedback_expired",
    "exposures_belated",
)
"""What a compaction counts."""
SLICE_BYTES = 512 * 1024 * 1024
"""Stored events that are joined at once; some six times as much in memory. Every slice reads all of them."""

CLOCKS = timedelta(days=1)
"""How far into the future an exposure may lie and still be somebody's newest."""

_SKEW = timedelta(hours=1)
_TRIES = 3
_Read = TypeVar("_Read")


def write(storage: Storage, exposures: pa.Table) -> list[str]:
    """Stores EXPOSURE rows in their hourly partitions; returns the keys; ValueError on another schema."""
    return partitions.write(storage, ROOT, merge(conform(exposures, EXPOSURE)))


def read(
    storage: Storage,
    start: datetime | None = None,
    end: datetime | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The exposures with start <= event_time < end, each once, sorted by event time: EXPOSURE, or ``columns`` of it.

    Of large parts only the columns and row groups that are needed are fetched.
    """
    return _again(lambda: _read(storage, start, end, columns))


def stored_hours(storage: Storage, now: datetime | None = None) -> tuple[datetime, datetime] | None:
    """[first, last) of everything stored, whole hours, UTC; None when nothing is.

    A log lives in its own time, but what lies a day or more after ``now`` (default: the clock) beside hours that do not
    came from clients whose clocks are wrong: one of them must not become everybody's newest day.
    """
    hours = sorted({part.hour for part in partitions.parts(storage, ROOT, None, None)})
    limit = (now or datetime.now(UTC)) + CLOCKS
    sane = [hour for hour in hours if hour < limit] or hours
    if len(sane) < len(hours):
        log.warning("%d hours after %s are left out: clocks that are wrong", len(hours) - len(sane), limit)
    return (sane[0], sane[-1] + timedelta(hours=1)) if sane else None


def consume(storage: Storage, run_id: str, start: datetime, end: datetime) -> list[str]:
    """Claims the segments of [start, end) for a training run and returns their keys.

    The claim, ``manifests/consumed/<run_id>.json``, keeps them from being deleted until the run is finished.
    """
    segments = partitions.keys(storage, ROOT, start, end)
    claim = {"run_id": run_id, "start": utc(start).isoformat(), "end": utc(end).isoformat(), "segments": segments}
    storage.put_json(f"{CLAIMS}/{run_id}.json", {**claim, "claimed": datetime.now(UTC).isoformat()})
    gone = set(segments) - set(partitions.keys(storage, ROOT, start, end))
    # Deleted between the listing and the claim: whatever superseded them is listed now.
    return consume(storage, run_id, start, end) if gone else segments


def read_events(storage: Storage, kind: str, start: datetime | None, end: datetime | None) -> pa.Table:
    """The stored events of a kind (features.schema.EVENTS) with start <= event_time < end, repeats included."""
    table, broken = _read_events(storage, kind, start, end)
    if broken:
        raise ValueError(f"{len(broken)} stored parts break the schema, first {broken[0].row}: {broken[0].reason}")
    return table


def recent_events(storage: Storage, kind: str, rows: int) -> pa.Table:
    """The ``rows`` newest events of a kind by time of storing, in whole parts: the last is what passes the number."""
    found = sorted(_event_parts(storage, kind, None, None), key=lambda part: part.modified)
    tables: list[pa.Table] = []
    while found and sum(table.num_rows for table in tables) < rows:
        tables.append(conform(partitions.fetch(storage, found.pop()), EVENTS[kind]))
    return _concat(tables, EVENTS[kind])


def compact(storage: Storage, start: datetime, end: datetime, *, late: timedelta | None = None) -> dict[str, Any]:
    """Joins the events of [start, end) into exposure partitions, and again those of the ``late`` before them.

    ``late`` is how much later than its impression an event may happen and still be joined (default: the setting
    ``late_hours``). Idempotent: the same events give the same keys, more events give fuller partitions beside the old
    ones. Many events are joined in slices by exposure_id, so that memory stays bounded. The summary counts [start, end)
    alone, names every partition written and is kept as ``manifests/exposures/<start>_<end>.json``.
    """
    window = _Window(utc(start), utc(end), timedelta(hours=settings().late_hours) if late is None else late)
    if window.start >= window.end:
        raise ValueError(f"compaction from {start.isoformat()} to {end.isoformat()} is empty; give start < end")
    size = sum(part.size for kind in EVENTS for part in _event_parts(storage, kind, *window.joined))
    slices = max(1, math.ceil(size / SLICE_BYTES))
    counts: Counter[str] = Counter()
    rejected: list[Rejected] = []
    keys: list[str] = []
    for which in range(slices):
        done = _again(partial(_compact_slice, storage, window, (which, slices)))
        counts.update(done[0])
        rejected += done[1]
        keys += done[2]
    summary = {
        "start": window.start.isoformat(),
        "end": window.end.isoformat(),
        "late_hours": window.late / timedelta(hours=1),
        **{name: counts[name] for name in COUNTS},
        "rejected": len(rejected),
        "rejected_key": reject(storage, "exposures", rejected),
        "segments": keys,
    }
    name = f"{window.start:%Y%m%dT%H%M%S}_{window.end:%Y%m%dT%H%M%S}"
    storage.put_json(f"manifests/exposures/{name}.json", summary)
    return summary


@dataclass(frozen=True)
class _Window:
    """What a compaction is about."""

    start: datetime
    end: datetime
    late: timedelta

    @property
    def joined(self) -> tuple[datetime, datetime]:
        """The time of the events that are read."""
        return self.start - self.late - _SKEW, self.end + self.late


def _compact_slice(
    storage: Storage, window: _Window, which: tuple[int, int]
) -> tuple[dict[str, int], list[Rejected], list[str]]:
    """Joins one of so many slices; returns counts, refused rows and the keys written."""
    start, end = window.start, window.end
    events: dict[str, pa.Table] = {}
    rejected: list[Rejected] = []
    for kind in EVENTS:
        events[kind], broken = _read_events(storage, kind, *window.joined, which)
        rejected += broken if which[0] == 0 else []
    joined = join(events["served"], events["impression"], events["feedback"])
    belated, expired = _belated(storage, joined, window)
    keys = partitions.write(storage, ROOT, between(joined.exposures, start - window.late, end))
    keys += partitions.write(storage, ROOT, belated.exposures)
    new = between(joined.exposures, start, end)
    counts = (
        new.num_rows,
        int((rows_of(new, events["feedback"]) < 0).sum()),
        between(joined.served_without_impression, start, end).num_rows,
        between(joined.impressions_without_served, start, end).num_rows,
        between(joined.feedback_without_impression, start, end).num_rows,
        len(expired),
        belated.exposures.num_rows,
    )
    refused = [*rejected, *joined.rejected, *belated.rejected, *expired]
    return dict(zip(COUNTS, counts, strict=True)), refused, keys


def _belated(storage: Storage, joined: Joined, window: _Window) -> tuple[Joined, list[Rejected]]:
    """Of the feedback of [start - late, end - late) without an impression: what does have one, and what has none.

    Such feedback was stored after the compaction that took its impression; the exposure is written once more, with
    this feedback alone, and readers merge the two. Windows that follow one another report each lost row once.
    """
    start, late = window.start, window.late
    lost = between(joined.feedback_without_impression, start - late, window.end - late)
    names = lost.column("exposure_id").combine_chunks()
    found = _event_parts(storage, "impression", start - 2 * late - _SKEW, start - late) if lost.num_rows else []

    def load(part: Part) -> pa.Table:
        impressions = conform(partitions.fetch(storage, part), IMPRESSION)
        return impressions.filter(pc.is_in(impressions.column("exposure_id"), value_set=names))

    older = _concat(partitions.in_parallel(load, found), IMPRESSION)
    unknown = pa.array(rows_of(lost, older) < 0)
    again = join(SERVED.empty_table(), older, lost.filter(pc.invert(unknown)))
    reason = f"no impression of this exposure within {late / timedelta(hours=1):g} h"
    return again, [Rejected("feedback", reason, row) for row in lost.filter(unknown).to_pylist()]


def _read(storage: Storage, start: datetime | None, end: datetime | None, columns: Sequence[str] | None) -> pa.Table:
    found = partitions.parts(storage, ROOT, start, end)
    if columns is None:
        return between(merge(_load(storage, found, EXPOSURE, start, end)), start, end)
    unknown = [name for name in columns if name not in EXPOSURE.names]
    if unknown:
        raise ValueError(f"exposures have no columns {unknown}; they have {EXPOSURE.names}")
    needed = pa.schema([f for f in EXPOSURE if f.name in {*columns, "exposure_id", "event_time"}])
    table = _load(storage, found, needed, start, end)
    if pc.count_distinct(table.column("exposure_id")).as_py() < table.num_rows:
        # Which of several rows is right takes all columns to say.
        return _read(storage, start, end, None).select(list(columns))
    ordered = table.sort_by([("event_time", "ascending"), ("exposure_id", "ascending")])
    return between(ordered, start, end).select(list(columns))


def _load(
    storage: Storage, found: Sequence[Part], schema: pa.Schema, start: datetime | None, end: datetime | None
) -> pa.Table:
    names = None if schema is EXPOSURE else schema.names

    def load(part: Part) -> pa.Table:
        return conform(partitions.fetch(storage, part, names, start, end), schema)

    return _concat(partitions.in_parallel(load, found), schema)


def _again(read_all: Callable[[], _Read]) -> _Read:
    """A part that is deleted between the listing and the reading is superseded by one that a new listing shows."""
    for _ in range(_TRIES - 1):
        try:
            return read_all()
        except ObjectMissing as error:
            log.info("%s; listing again", error)
    return read_all()


def _concat(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables(tables).replace_schema_metadata(None) if tables else schema.empty_table()


def _event_parts(storage: Storage, kind: str, start: datetime | None, end: datetime | None) -> list[Part]:
    if kind not in EVENTS:
        raise ValueError(f"there are no events of kind {kind!r}; the kinds are {', '.join(EVENTS)}")
    return partitions.parts(storage, partitions.events_root(kind), start, end)


def _read_events(
    storage: Storage, kind: str, start: datetime | None, end: datetime | None, which: tuple[int, int] = (0, 1)
) -> tuple[pa.Table, list[Rejected]]:
    """Slice ``which[0]`` of ``which[1]`` of the stored events, and the parts that cannot be read."""

    def load(part: Part) -> pa.Table | Rejected:
        try:
            table = conform(partitions.fetch(storage, part, None, start, end), EVENTS[kind])
        except (ValueError, pa.ArrowException) as error:
            return Rejected(kind, f"the part cannot be read: {error}", part.key)
        return _slice(table, *which)

    loaded = partitions.in_parallel(load, _event_parts(storage, kind, start, end))
    tables = [part for part in loaded if not isinstance(part, Rejected)]
    return between(_concat(tables, EVENTS[kind]), start, end), [p for p in loaded if isinstance(p, Rejected)]


def _slice(table: pa.Table, which: int, slices: int) -> pa.Table:
    """The rows whose exposure_id falls into a slice: those of one exposure stay together."""
    if slices == 1:
        return table
    hashes = pd.util.hash_array(table.column("exposure_id").to_numpy(), categorize=False)
    return table.filter(pa.array(hashes % slices == which))
