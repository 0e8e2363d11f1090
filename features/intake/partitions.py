"""Hourly Parquet partitions in object storage: ``<root>/date=YYYY-MM-DD/hour=HH/<sha256>.parquet``.

The event time of a row decides its partition. Keys are content-addressed, so a repeated write changes nothing
and no two writers need to agree; readers de-duplicate. Of large parts only the row groups and columns that are asked
for are fetched. Superseded parts are deleted by ``features.intake.retention``.
"""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.schema import TIME
from features.storage import Storage

HOUR_MS = 3_600_000
PARALLEL = 8
# Listing day by day is cheaper than listing everything, until the range holds more days than the bucket.
LISTED_BY_DAY = 400
ROW_GROUP = 65_536
WHOLE_BYTES = 1 << 20
"""Smaller parts are fetched in one request."""

_KEY = re.compile(r"/date=(\d{4}-\d{2}-\d{2})/hour=(\d{2})/[0-9a-f]{64}\.parquet$")
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def utc(time: datetime) -> datetime:
    """``time`` in UTC; raises ValueError for a naive one."""
    if time.tzinfo is None:
        raise ValueError(f"the time {time.isoformat()} has no time zone; give an aware datetime, e.g. tzinfo=UTC")
    return time.astimezone(UTC)


def events_root(kind: str) -> str:
    """The root of the events of a kind (features.schema.EVENTS)."""
    return f"events/kind={kind}"


def milliseconds(table: pa.Table) -> np.ndarray:
    """int64 [rows]: the event times in UTC milliseconds."""
    return pc.cast(table.column("event_time"), pa.int64()).to_numpy()


def write(storage: Storage, root: str, table: pa.Table) -> list[str]:
    """Writes the rows of ``table``, in their order, to the partition of their event time; returns the keys."""
    hours = milliseconds(table) // HOUR_MS
    order = np.argsort(hours, kind="stable")
    found, starts = np.unique(hours[order], return_index=True)
    rows = np.split(order, starts[1:])
    parts = [(datetime.fromtimestamp(int(hour) * 3600, UTC), index) for hour, index in zip(found, rows, strict=False)]
    return in_parallel(lambda part: _put(storage, root, part[0], table.take(pa.array(part[1]))), parts)


@dataclass(frozen=True)
class Part:
    """One stored file of a partition."""

    key: str
    size: int
    """Bytes."""
    modified: datetime

    @property
    def hour(self) -> datetime:
        """The beginning of its hour."""
        return hour_of(self.key)


def hour_of(key: str) -> datetime:
    """The beginning of the hour of a partition's key; raises ValueError for other keys."""
    match = _KEY.search(key)
    if match is None:
        raise ValueError(f"{key!r} is no key of an hourly partition")
    return datetime.fromisoformat(f"{match[1]}T{match[2]}:00:00+00:00")


def parts(storage: Storage, root: str, start: datetime | None, end: datetime | None) -> list[Part]:
    """The parts of ``root`` that may hold events of [start, end), by key; None leaves that side open."""
    first = utc(start).replace(minute=0, second=0, microsecond=0) if start else None
    last = utc(end) if end else None
    prefixes = [f"{root}/date="]
    if first and last and (last - first).days < LISTED_BY_DAY:
        prefixes = [f"{root}/date={day}/" for day in _days(first.date(), last.date())]
    listed = in_parallel(storage.objects, prefixes)
    found = [Part(*each) for objects in listed for each in objects if _KEY.search(each[0])]
    return [part for part in found if (not first or part.hour >= first) and (not last or part.hour < last)]


def keys(storage: Storage, root: str, start: datetime | None, end: datetime | None) -> list[str]:
    """The keys of ``parts``."""
    return [part.key for part in parts(storage, root, start, end)]


def fetch(
    storage: Storage,
    part: Part,
    columns: Sequence[str] | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
) -> pa.Table:
    """The row groups of ``part`` that may hold events of [start, end), as they are, and only ``columns`` of them."""
    source = pa.BufferReader(storage.get(part.key)) if part.size <= WHOLE_BYTES else _Ranges(storage, part)
    file = pq.ParquetFile(source, pre_buffer=True)
    names = None if columns is None else list(columns)
    return file.read_row_groups(_groups(file, start, end), columns=names, use_threads=False)


def between(table: pa.Table, start: datetime | None, end: datetime | None) -> pa.Table:
    """The rows of ``table`` with start <= event_time < end."""
    times = table.column("event_time")
    if start is not None:
        table = table.filter(pc.greater_equal(times, pa.scalar(utc(start), TIME)))
        times = table.column("event_time")
    if end is not None:
        table = table.filter(pc.less(times, pa.scalar(utc(end), TIME)))
    return table


def in_parallel(function: Callable[[_In], _Out], values: Sequence[_In]) -> list[_Out]:
    """``function`` of each value, several requests in flight; the first error is raised."""
    if len(values) < 2:
        return [function(value) for value in values]
    with ThreadPoolExecutor(max_workers=min(PARALLEL, len(values))) as pool:
        return list(pool.map(function, values))


def encode(root: str, hour: datetime, rows: pa.Table) -> tuple[str, bytes]:
    """The key and the bytes of a part with ``rows``: equal rows give an equal key."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows.combine_chunks(), sink, compression="zstd", row_group_size=ROW_GROUP)
    data = bytes(sink.getvalue())
    return f"{root}/date={hour:%Y-%m-%d}/hour={hour:%H}/{hashlib.sha256(data).hexdigest()}.parquet", data


def _put(storage: Storage, root: str, hour: datetime, rows: pa.Table) -> str:
    key, data = encode(root, hour, rows)
    storage.put(key, data, "application/vnd.apache.parquet")
    return key


def _groups(file: pq.ParquetFile, start: datetime | None, end: datetime | None) -> list[int]:
    """The row groups whose statistics of event_time meet [start, end)."""
    column = file.schema_arrow.get_field_index("event_time")
    if column < 0 or (start is None and end is None):
        return list(range(file.num_row_groups))
    # Every column of our schemas is one leaf, lists too: leaf and field have the same index.
    found = []
    for index in range(file.num_row_groups):
        known = file.metadata.row_group(index).column(column).statistics
        if known is None or not known.has_min_max or _meets(known.min, known.max, start, end):
            found.append(index)
    return found


def _meets(low: datetime, high: datetime, start: datetime | None, end: datetime | None) -> bool:
    return (start is None or high >= utc(start)) and (end is None or low < utc(end))


class _Ranges(io.RawIOBase):
    """An object as a file that fetches just what is read."""

    def __init__(self, storage: Storage, part: Part) -> None:
        self._storage, self._part, self._at = storage, part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = self._part.size - self._at
        length = left if size is None or size < 0 else min(size, left)
        data = self._storage.get_range(self._part.key, self._at, length) if length > 0 else b""
        self._at += len(data)
        return data


def _days(first: date, last: date) -> list[str]:
    return [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]
