"""Puts a log into the platform: exposure store, catalogue and on-line features, all idempotent.

A log comes in chunks of whole users. Chunks are stored in groups: exposures in hourly partitions, the windows of their
users on-line, and a state object under ``ingest/<fingerprint>/`` with what the groups leave to the end (the items and
users they named, the users' lifelong rows). An interrupted ingest, run again with the same files, goes on after the
last finished group; when all is stored the state objects go. A log of one chunk has one group.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from features import catalog, memory, offline
from features.datasets.dataset import TOO_FEW, Chunk, Dataset, Log, Seen, no_rejects
from features.histories.lifelong import LIFELONG_ROWS, daily_lifelong
from features.histories.windows import Limits
from features.intake import exposures as exposure_store
from features.intake.rejected import Rejected, reject
from features.online import OnlineFeatures
from features.repository import feast_home
from features.schema import EXPOSURE
from features.storage import Storage
from features.updater import seed_windows

GROUP_ROWS = 2_000_000
"""Exposures that are stored at once: fewer make more and smaller partitions, more take more memory."""
ENDS = 1_000_000
"""Bytes of each end of a file that the fingerprint reads."""


class Watcher(Protocol):
    """Somebody who is told how far an ingest is."""

    def note(self, text: str) -> None:
        """What is going on now."""

    def update(self, done: int, total: int) -> None:
        """``done`` of about ``total`` chunks are stored."""


@dataclass(kw_only=True)
class _Group:
    """Chunks that are stored together."""

    chunks: list[Chunk] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        return [chunk.key for chunk in self.chunks]

    @property
    def rows(self) -> int:
        return sum(chunk.exposures.num_rows for chunk in self.chunks)

    @property
    def exposures(self) -> pa.Table:
        return pa.concat_tables([chunk.exposures for chunk in self.chunks] or [EXPOSURE.empty_table()])


@dataclass(frozen=True)
class _State:
    """Finished groups of one log in object storage; a log without files leaves no state."""

    storage: Storage
    prefix: str

    def groups(self) -> list[dict[str, Any]]:
        """What the finished groups recorded."""
        if not self.prefix:
            return []
        return [self.storage.get_json(key) for key in self.storage.keys(self.prefix) if key.endswith(".json")]

    def tables(self, record: dict[str, Any]) -> dict[str, pa.Table]:
        """What a group left to the end."""
        folder = f"{self.prefix}{record['keys'][0]}"
        return {name: self.storage.get_table(f"{folder}/{name}.parquet") for name in ("items", "users", "lifelong")}

    def finish(self, record: dict[str, Any], tables: dict[str, pa.Table]) -> None:
        """Records a group; the JSON object comes last and makes it finished."""
        if self.prefix:
            for name, table in tables.items():
                self.storage.put_table(f"{self.prefix}{record['keys'][0]}/{name}.parquet", table)
            self.storage.put_json(f"{self.prefix}{record['keys'][0]}.json", record)

    def clear(self) -> None:
        """Removes everything, the records first."""
        keys = list(self.storage.keys(self.prefix)) if self.prefix else []
        for key in sorted(keys, key=lambda key: not key.endswith(".json")):
            self.storage.remove(key)


@dataclass(kw_only=True)
class _Left:
    """What the groups so far leave to the end."""

    seen: Seen = field(default_factory=Seen)
    counts: Counter[str] = field(default_factory=Counter)
    lifelong: list[pa.Table] = field(default_factory=lambda: [LIFELONG_ROWS.empty_table()])
    since: list[int] = field(default_factory=list)
    """Time of each group's first exposure, in ms."""

    def add(self, record: dict[str, Any], tables: dict[str, pa.Table]) -> None:
        """Takes over the record and the tables of a group."""
        self.seen.merge(tables["items"], tables["users"])
        self.lifelong.append(tables["lifelong"])
        self.counts.update(record["counts"])
        self.since.append(record["since"])


def ingest(dataset: Dataset, storage: Storage, home: Path) -> dict[str, Any]:
    """Stores a data set in memory and seeds the features; returns counts. ``home`` is the platform's home folder.

    Raises ValueError, before anything is stored, when the log has fewer than two users.
    """
    return ingest_log(_Held(dataset), storage, home)


def ingest_log(log: Log, storage: Storage, home: Path, watcher: Watcher | None = None) -> dict[str, Any]:
    """Stores a log group by group and seeds the features; returns counts.

    Raises ValueError, before anything is stored, when the log cannot be read or has fewer than two users.
    """
    storage.ensure_bucket()
    state = _State(storage, f"ingest/{fingerprint(log)}/" if log.files else "")
    # Never HOME/work itself, which holds the checkpoints of trainings: a log without files has an empty prefix.
    scratch = home / "work" / (state.prefix.strip("/").replace("/", "-") or "ingest-held")
    left, groups = _Left(), state.groups()
    for record in groups:
        left.add(record, state.tables(record))
    skip = [key for record in groups for key in record["keys"]]
    if skip and watcher is not None:
        watcher.note(f"{len(skip)} chunks were stored before, going on")
    if log.parts > 1 and watcher is not None:
        watcher.note(f"partitioning the rows by user into {log.parts}")
    done = len(skip)
    for group in _grouped(log, log.chunks(scratch, skip), resumed=bool(skip)):
        record, tables = _store(group, storage)
        state.finish(record, tables)
        left.add(record, tables)
        done += len(group.chunks)
        if watcher is not None:
            watcher.note(f"{left.counts['exposures']:,} exposures")
            watcher.update(done, max(log.parts, done))
    left.counts.update(_describe(log, left.seen, storage))
    memory.forget(storage)  # pasts are told anew, from a log that now holds more
    _load(log.users(left.seen), pa.concat_tables(left.lifelong), min(left.since))
    state.clear()
    shutil.rmtree(scratch, ignore_errors=True)
    return dict(left.counts)


def fingerprint(log: Log) -> str:
    """Names a log by the names, sizes and both ends of its files, and by how it is read."""
    digest = hashlib.sha256(f"{log!r} {log.parts}".encode())
    for path in log.files:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(path.stat().st_size - ENDS, 0))
            digest.update(file.read(ENDS))
    return digest.hexdigest()[:16]


def _grouped(log: Log, chunks: Iterator[Chunk], resumed: bool) -> Iterator[_Group]:
    """Groups of at least GROUP_ROWS, the last one excepted; the first holds two users, or ValueError is raised."""
    group, told = _Group(), resumed
    for chunk in chunks:
        group.chunks.append(chunk)
        if group.rows >= GROUP_ROWS and (told or _users(group) > 1):
            yield group
            group, told = _Group(), True
    users = _users(group)
    if not told and users < 2:
        raise ValueError(f"the log {log.name!r} has {users} user{'s' * (users != 1)}; {TOO_FEW}")
    if group.chunks:
        yield group


def _users(group: _Group) -> int:
    return int(pc.count_distinct(group.exposures["user_id"]).as_py())


def _store(group: _Group, storage: Storage) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """Stores a group; returns its record and the tables that wait for the end."""
    exposures, folder, limits = group.exposures, feast_home().absolute(), Limits()
    segments = exposure_store.write(storage, exposures)
    rejected = [row for chunk in group.chunks for row in chunk.rejected.to_pylist()]
    reject(storage, "ingest", [Rejected("log", str(row["reason"]), row) for row in rejected])
    offline.apply(folder)
    seeded = seed_windows(OnlineFeatures.connect(folder), exposures, limits)
    lifelong = offline.latest_rows(daily_lifelong(exposures, limits.lifelong), None)
    seen = Seen()
    seen.add(exposures)
    record = {
        "keys": group.keys,
        "since": pc.min(exposures["event_time"].cast(pa.int64())).as_py(),
        "counts": {
            "exposures": exposures.num_rows,
            "duplicates_removed": sum(chunk.duplicates for chunk in group.chunks),
            "rejected": len(rejected),
            "segments": len(segments),
            "users_seeded": seeded,
        },
    }
    return record, {"items": seen.items, "users": seen.users, "lifelong": lifelong}


def _describe(log: Log, seen: Seen, storage: Storage) -> Counter[str]:
    """Stores items and users; returns how many."""
    counts = Counter[str]()
    for items, rejected in log.items(seen):
        catalog.append_items(storage, items)
        reject(storage, "ingest", [Rejected("item", str(row["reason"]), row) for row in rejected.to_pylist()])
        counts["items"] += items.num_rows
        counts["rejected"] += rejected.num_rows
    users = log.users(seen)
    catalog.append_users(storage, users)
    counts["users"] = users.num_rows
    return counts


def _load(users: pa.Table, lifelong: pa.Table, since_ms: int) -> None:
    """Loads every user's attributes and newest lifelong row on-line."""
    folder = feast_home().absolute()
    offline.write_snapshots(folder, users, lifelong, since_ms)
    offline.apply(folder)
    offline.materialize(folder)


@dataclass(frozen=True)
class _Held:
    """A data set in memory as a log of one chunk."""

    dataset: Dataset
    files: tuple[Path, ...] = ()
    parts: int = 1

    @property
    def name(self) -> str:
        return self.dataset.name

    def chunks(self, scratch: Path, skip: Collection[str] = ()) -> Iterator[Chunk]:
        """See ``Log``."""
        data = self.dataset
        yield Chunk(key="all", exposures=data.exposures, rejected=data.rejected, duplicates=data.duplicates)

    def items(self, seen: Seen) -> Iterator[tuple[pa.Table, pa.Table]]:
        """See ``Log``."""
        yield self.dataset.items, no_rejects()

    def users(self, seen: Seen) -> pa.Table:
        """See ``Log``."""
        return self.dataset.users
