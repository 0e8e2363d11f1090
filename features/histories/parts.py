"""The exposures of some users as integer columns: what the ETL does to each partition of a log.

A part is whole users, so everything a training context needs is inside it: the users' events in order, which of them
are positive, their requests, and how many events precede each request. One function, run in-process for small logs
and by Ray Data for large ones (``features.histories.etl``).
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.histories.windows import event_ids, is_positive
from features.intake.exposures import merge
from features.schema import label_bits

ROW_GROUP = 131_072
PART_FILE, ROWS_FILE = "part.arrow", "exposures.parquet"


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """N events of U users in R requests; rows are ordered by (user, time, id), users by name."""

    user: np.ndarray
    """int32 [N], row of ``user_ids``."""
    item: np.ndarray
    """int32 [N], row of the catalogue that was given; -1 is unknown."""
    time_ms: np.ndarray
    """int64 [N]"""
    play_ms: np.ndarray
    """int64 [N]"""
    duration_ms: np.ndarray
    """int64 [N]"""
    labels: np.ndarray
    """int32 [N], feedback bits."""
    positive: np.ndarray
    """int64 [P], rows with high engagement."""
    user_ids: pa.Array
    """string [U]"""
    start: np.ndarray
    """int64 [U], first row of each user."""
    positive_start: np.ndarray
    """int64 [U], first entry of ``positive`` of each user."""
    request_ids: pa.Array
    """string [R], requests in order of their earliest event."""
    request_user: np.ndarray
    """int32 [R]"""
    request_time: np.ndarray
    """int64 [R], the earliest event."""
    request_size: np.ndarray
    """int64 [R], how many events it has."""
    before: np.ndarray
    """int64 [R], end of the user's rows that are strictly earlier than the request."""
    positive_before: np.ndarray
    """int64 [R], the same in ``positive``."""
    target: np.ndarray
    """int64 [N], rows grouped by request, in order of position inside one."""
    unknown_items: pa.Array
    """string, the items that the catalogue lacks, each once."""

    def save(self, path: Path) -> None:
        """Writes every column to one Arrow file; they differ in length, so each is one list."""
        columns = {field.name: pa.array(getattr(self, field.name)) for field in fields(self)}
        lists = {
            name: pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)
            for name, values in columns.items()
        }
        with pa.ipc.new_file(path, pa.schema([(name, column.type) for name, column in lists.items()])) as file:
            file.write_batch(pa.record_batch(list(lists.values()), list(lists)))

    @classmethod
    def load(cls, path: Path) -> "Part":
        """Maps what ``save`` wrote into memory."""
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        columns = {name: batch.column(name).flatten() for name in batch.schema.names}
        strings = ("user_ids", "request_ids", "unknown_items")
        return cls(**{name: c if name in strings else c.to_numpy() for name, c in columns.items()})


def part_of(exposures: pa.Table, item_ids: pa.Array) -> tuple[Part, pa.Table]:
    """The part of EXPOSURE rows in any order, and these rows, each id once, in the order of the part's rows."""
    table = _once(exposures)
    names = pc.dictionary_encode(table.column("user_id")).combine_chunks()
    by_name = pc.sort_indices(names.dictionary).to_numpy()
    rank = np.empty(len(by_name), np.int32)
    rank[by_name] = np.arange(len(by_name))
    user = rank[names.indices.to_numpy()]
    times = table.column("event_time").cast(pa.int64()).to_numpy()
    order = _order(user, times, table.column("exposure_id"))
    table, user, times = table.take(pa.array(order)), user[order], times[order]
    item = pc.index_in(table.column("item_id"), value_set=item_ids).fill_null(-1).to_numpy().astype(np.int32)
    play, duration = table.column("play_ms").to_numpy(), table.column("duration_ms").to_numpy()
    labels = np.asarray(label_bits(table), np.int64)
    positive = is_positive(play, duration, labels)
    earlier_positive = np.r_[0, np.cumsum(positive)]
    start = np.searchsorted(user, np.arange(len(by_name)))
    part = Part(
        user=user,
        item=item,
        time_ms=times,
        play_ms=play,
        duration_ms=duration,
        labels=labels.astype(np.int32),
        positive=np.flatnonzero(positive),
        user_ids=names.dictionary.take(pa.array(by_name)),
        start=start,
        positive_start=earlier_positive[start],
        unknown_items=table.column("item_id").filter(pa.array(item < 0)).unique(),
        **_requests(table, user, times, earlier_positive),
    )
    return part, table


def write_part(exposures: pa.Table, folder: Path, item_ids: pa.Array) -> dict[str, int]:
    """Builds the part of EXPOSURE rows, as PART_FILE and ROWS_FILE in ``folder``; returns counts.

    The folder appears whole or not at all, so a part that exists is done.
    """
    part, rows = part_of(exposures, item_ids)
    fresh = folder.with_name(folder.name + ".fresh")
    fresh.mkdir(parents=True, exist_ok=True)
    part.save(fresh / PART_FILE)
    pq.write_table(rows, fresh / ROWS_FILE, compression="lz4", use_dictionary=False, row_group_size=ROW_GROUP)
    fresh.replace(folder)
    return {"exposures": len(part.user), "users": len(part.user_ids), "requests": len(part.request_time)}


def _once(exposures: pa.Table) -> pa.Table:
    codes = pc.dictionary_encode(exposures.column("exposure_id")).combine_chunks().indices.to_numpy()
    repeated = np.bincount(codes)[codes] > 1 if len(codes) else np.zeros(0, bool)
    if not repeated.any():
        return exposures
    return pa.concat_tables([exposures.filter(pa.array(~repeated)), merge(exposures.filter(pa.array(repeated)))])


def _order(user: np.ndarray, times: np.ndarray, exposure_ids: pa.ChunkedArray) -> np.ndarray:
    """Rows by (user, time, id); the hash that orders ids (``windows.event_ids``) is taken only where times tie."""
    order = np.lexsort((times, user))
    same = (np.diff(user[order]) == 0) & (np.diff(times[order]) == 0)
    tied = order[np.flatnonzero(np.r_[same, False] | np.r_[False, same])] if len(order) else order
    if not len(tied):
        return order
    ids = np.zeros(len(user), np.int64)
    ids[tied] = event_ids(exposure_ids.take(pa.array(tied)).to_pylist())
    return np.lexsort((ids, times, user))


def _requests(
    table: pa.Table, user: np.ndarray, times: np.ndarray, earlier_positive: np.ndarray
) -> dict[str, np.ndarray | pa.Array]:
    """The columns of ``Part`` that describe requests; rows are sorted by (user, time)."""
    rows = len(user)
    names = pc.dictionary_encode(table.column("request_id")).combine_chunks()
    key = user.astype(np.int64) * max(len(names.dictionary), 1) + names.indices.to_numpy()
    _, first, group, size = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    # Rows are in order of time, so a request's first row is its earliest.
    by_time = np.lexsort((first, times[first]))
    rank = np.empty(len(first), np.int64)
    rank[by_time] = np.arange(len(first))
    first, size = first[by_time], size[by_time]
    opens = np.r_[True, (np.diff(user) != 0) | (np.diff(times) != 0)][:rows]
    before = np.flatnonzero(opens)[np.cumsum(opens) - 1][first] if rows else first
    return {
        "request_ids": table.column("request_id").take(pa.array(first)).combine_chunks(),
        "request_user": user[first],
        "request_time": times[first],
        "request_size": size,
        "before": before,
        "positive_before": earlier_positive[before],
        "target": np.lexsort((times, table.column("position").to_numpy(), rank[group])),
    }
