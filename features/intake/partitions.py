"""Hourly Parquet partitions in object storage: ``<root>/date=YYYY-MM-DD/hour=HH/<sha256>.parquet``.

The event time of a row decides its partition. Keys are content-addressed, so a repeated write changes nothing
and no two writers need to agree; readers de-duplicate. Left out: deleting superseded parts, because a training
manifest may still name them.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.schema import TIME
from features.storage import Storage, table_bytes

HOUR_MS = 3_600_000
PARALLEL = 8
# Listing day by day is cheaper than listing everything, until the range holds more days than the bucket.
LISTED_BY_DAY = 400

_KEY = re.compile(r"/date=(\d{4}-\d{2}-\d{2})/hour=(\d{2})/[0-9a-f]{64}\.parquet$")
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def utc(time: datetime) -> datetime:
    """``time`` in UTC; raises ValueError for a naive one."""
    if time.tzinfo is None:
        raise ValueError(f"the time {time.isoformat()} has no time zone; give an aware datetime, e.g. tzinfo=UTC")
    return time.astimezone(UTC)


def milliseconds(table: pa.Table, column: str = "event_time") -> np.ndarray:
    """The times of ``column`` as int64 UTC milliseconds."""
    return pc.cast(table.column(column), pa.int64()).to_numpy()


def write(storage: Storage, root: str, table: pa.Table) -> list[str]:
    """Writes the rows of ``table``, in their order, to the partition of their event time; returns the keys."""
    hours = milliseconds(table) // HOUR_MS
    order = np.argsort(hours, kind="stable")
    found, starts = np.unique(hours[order], return_index=True)
    rows = np.split(order, starts[1:])
    parts = [(datetime.fromtimestamp(int(hour) * 3600, UTC), index) for hour, index in zip(found, rows, strict=False)]
    return in_parallel(lambda part: _put(storage, root, part[0], table.take(pa.array(part[1]))), parts)


def keys(storage: Storage, root: str, start: datetime | None, end: datetime | None) -> list[str]:
    """Keys of the partitions of ``root`` that may hold events of [start, end); None leaves that side open."""
    first = utc(start).replace(minute=0, second=0, microsecond=0) if start else None
    last = utc(end) if end else None
    found: Iterable[str]
    if first and last and (last - first).days < LISTED_BY_DAY:
        days = _days(first.date(), last.date())
        found = [k for listed in in_parallel(lambda d: list(storage.keys(f"{root}/date={d}/")), days) for k in listed]
    else:
        found = storage.keys(f"{root}/date=")
    return [key for key in found if _overlaps(key, first, last)]


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


def _put(storage: Storage, root: str, hour: datetime, rows: pa.Table) -> str:
    data = table_bytes(rows.combine_chunks())
    key = f"{root}/date={hour:%Y-%m-%d}/hour={hour:%H}/{hashlib.sha256(data).hexdigest()}.parquet"
    storage.put(key, data, "application/vnd.apache.parquet")
    return key


def _days(first: date, last: date) -> list[str]:
    return [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]


def _overlaps(key: str, first: datetime | None, last: datetime | None) -> bool:
    match = _KEY.search(key)
    if match is None:
        return False
    hour = datetime.fromisoformat(f"{match[1]}T{match[2]}:00:00+00:00")
    return (first is None or hour >= first) and (last is None or hour < last)
