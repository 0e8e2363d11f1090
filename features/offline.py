"""Feast's off-line side: snapshots, registry, point-in-time joins and the load of latest rows on-line.

Snapshots are Parquet files in one folder (``features.repository.feast_home``); in a cluster they are synced there from
S3 first, because DuckDB would download an extension to read ``s3://``. The registry is a file without lock: one writer.
Left out: history of user attributes (logs do not say when they changed; the latest are taken as always true).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from features.feast import FeatureStore
from features.histories.context import STATIC_FIELDS, hash_static
from features.histories.lifelong import LIST_TYPES, WINDOW_ROWS, events_of_lists
from features.online import reporting
from features.repository import feast_home, open_store, redis_client
from features.schema import TIME
from features.settings import Settings
from features.store.definitions import feature_views, user

STATIC_ROWS = pa.schema(
    [pa.field("user_id", pa.string()), pa.field("event_timestamp", TIME), pa.field("static", pa.list_(pa.int64()))]
)
SNAPSHOTS = {
    "user_static": STATIC_ROWS,
    "short_term": WINDOW_ROWS,
    "positive_feedback": WINDOW_ROWS,
    "lifelong": WINDOW_ROWS,
}
WRITE_ROWS = 2_000


class FutureLeak(ValueError):
    """A snapshot tells of events that had not happened at the time it is asked about."""


@dataclass(frozen=True, kw_only=True)
class PointInTime:
    """What Feast knew of N (user, time) pairs, in the order they were given."""

    static: np.ndarray
    """int64 [N, F], 0 where the user is unknown."""
    lifelong: pa.Table
    """N rows of a window's list columns (``features.histories.lifelong.LIST_TYPES``), empty where unknown."""


def static_rows(users: pa.Table, since_ms: int) -> pa.Table:
    """STATIC_ROWS of a USER table, valid from ``since_ms``: the first event of the log."""
    static = [hash_static(attributes).tolist() for attributes in users.column("attributes").to_pylist()]
    since = pa.array([since_ms] * users.num_rows, pa.int64()).cast(TIME)
    return pa.table([users.column("user_id"), since, pa.array(static, pa.list_(pa.int64()))], schema=STATIC_ROWS)


def write_snapshots(home: Path, users: pa.Table, lifelong: pa.Table, since_ms: int) -> None:
    """Replaces the snapshots in ``home``: USER rows valid from ``since_ms`` and the rows of ``daily_lifelong``."""
    home.mkdir(parents=True, exist_ok=True)
    _replace(home / "user_static.parquet", static_rows(users, since_ms))
    _replace(home / "lifelong.parquet", lifelong.select(WINDOW_ROWS.names).cast(WINDOW_ROWS))


def apply(home: Path | None = None, config: Settings | None = None) -> FeatureStore:
    """Registers the definitions in ``home``'s registry, as ``feast apply`` would; repeating it changes nothing."""
    home = (home or feast_home(config)).absolute()
    home.mkdir(parents=True, exist_ok=True)
    for name, schema in SNAPSHOTS.items():
        if not (home / f"{name}.parquet").exists():
            _replace(home / f"{name}.parquet", schema.empty_table())
    store = open_store(home, config, offline=True)
    store.apply([user, *feature_views(home)])
    return store


def point_in_time(
    user_ids: Sequence[str] | np.ndarray, times_ms: np.ndarray, home: Path | None = None, config: Settings | None = None
) -> PointInTime:
    """Static and lifelong features of N (user, time) pairs as they stood at each time, TTL applied.

    Raises FileNotFoundError when the snapshots were never written, FutureLeak when one tells of what was still to come.
    """
    times_ms, home = np.asarray(times_ms, np.int64), (home or feast_home(config)).absolute()
    if not (home / "registry.db").exists() or not (home / "lifelong.parquet").exists():
        raise FileNotFoundError(f"{home} holds no feature registry and snapshots; run `onerec ingest` first")
    if len(times_ms) == 0:
        empty = pa.table({name: pa.array([], kind) for name, kind in LIST_TYPES.items()})
        return PointInTime(static=np.zeros((0, STATIC_FIELDS), np.int64), lifelong=empty)
    entities = pd.DataFrame(
        {
            "row": np.arange(len(times_ms)),
            "user_id": np.asarray(user_ids, object),
            "event_timestamp": pd.to_datetime(times_ms, unit="ms", utc=True),
        }
    )
    names = [f"lifelong:{name}" for name in LIST_TYPES]
    job = open_store(home, config, offline=True).get_historical_features(entities, ["user_static:static", *names])
    table = job.to_arrow()
    if table.num_rows != len(times_ms):
        raise RuntimeError(f"the off-line store returned {table.num_rows} rows for {len(times_ms)} entity rows")
    table = table.sort_by("row").combine_chunks()
    assert np.array_equal(table.column("row").to_numpy(), np.arange(len(times_ms))), "entity rows were exchanged"
    lifelong = pa.table({name: _filled(table.column(name), kind) for name, kind in LIST_TYPES.items()})
    _check_leak(lifelong, np.asarray(user_ids, object), times_ms)
    return PointInTime(static=_static_matrix(table.column("static")), lifelong=lifelong)


def _check_leak(lifelong: pa.Table, user_ids: np.ndarray, times_ms: np.ndarray) -> None:
    events, counts = events_of_lists(lifelong)
    row = np.repeat(np.arange(len(counts)), counts)
    late = np.flatnonzero(events.times >= times_ms[row])
    if len(late):
        first = late[0]
        raise FutureLeak(
            f"the lifelong snapshot tells {len(late)} events at or after the time it is asked about, first user "
            f"{user_ids[row[first]]!r} at {times_ms[row[first]]} of an event at {events.times[first]} (ms); "
            "its rows have wrong timestamps: build it anew from the log (`onerec ingest`, or the next training)"
        )


def materialize(home: Path | None = None, config: Settings | None = None, now_ms: int | None = None) -> dict[str, int]:
    """Writes the latest static and lifelong row of every user (not later than ``now_ms``) on-line; rows per view.

    The snapshot replaces whatever the on-line store holds: Feast's Redis store would skip rows whose timestamp is not
    newer, and corrected attributes or late views keep theirs. Raises FeaturesUnavailable when Valkey does not answer.
    """
    home = (home or feast_home(config)).absolute()
    store = open_store(home, config, offline=True)
    store.config.online_store.skip_dedup = True
    redis_client(store)
    written = {}
    for name in ("user_static", "lifelong"):
        rows = latest_rows(pq.read_table(home / f"{name}.parquet"), now_ms)
        for start in range(0, rows.num_rows, WRITE_ROWS):
            with reporting(store):
                store.write_to_online_store(name, rows.slice(start, WRITE_ROWS).to_pandas())
        written[name] = rows.num_rows
    return written


def latest_rows(table: pa.Table, now_ms: int | None) -> pa.Table:
    """The newest row of every user whose timestamp is not later than ``now_ms``."""
    times = table.column("event_timestamp").cast(pa.int64()).to_numpy()
    frame = pd.DataFrame({"user_id": table.column("user_id").to_pandas(), "time": times})
    if now_ms is not None:
        frame = frame[frame.time <= now_ms]
    rows = frame.sort_values("time", kind="stable").drop_duplicates("user_id", keep="last").index.sort_values()
    return table.take(pa.array(rows.to_numpy(np.int64)))


def _replace(path: Path, table: pa.Table) -> None:
    """Writes beside and renames, so a reader never sees half a file."""
    fresh = path.with_suffix(".fresh")
    pq.write_table(table, fresh, compression="zstd")
    fresh.replace(path)


def _filled(column: pa.ChunkedArray, kind: pa.ListType) -> pa.Array:
    """``column`` as ``kind`` with empty lists for nulls."""
    lists = column.combine_chunks().cast(kind)
    counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.r_[0, np.cumsum(counts)].astype(np.int32))
    return pa.ListArray.from_arrays(offsets, lists.flatten())


def _static_matrix(column: pa.ChunkedArray) -> np.ndarray:
    lists = column.combine_chunks()
    known = lists.is_valid().to_numpy(zero_copy_only=False)
    matrix = np.zeros((len(lists), STATIC_FIELDS), np.int64)
    matrix[known] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, STATIC_FIELDS)
    return matrix
