"""One window of exposures frozen as a run's training data: the stage every pipeline begins with.

Joins the newest events, rebuilds the daily feature rows, reads them back point-in-time through Feast for every
training request, and stores it all under ``runs/<run_id>/data/`` with a manifest of the segments consumed: tables of
exposures, items and users, and the sequences that training maps into memory. Older exposures of the window only serve
as contexts; requests from ``targets_from`` on are trained on. A window that fits one partition is handled in memory,
a larger one partition by partition (``features.histories.etl``), by the same functions.
"""

import json
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import catalog, offline
from features.histories.etl import EtlConfig, assemble, build_parts, read_parts, read_rows
from features.histories.lifelong import LIFELONG_ROWS, events_of_lists
from features.histories.parts import Part
from features.histories.sequences import PartFeatures
from features.intake import exposures as exposure_store
from features.intake import partitions
from features.memory import Memory
from features.repository import feast_home
from features.runs import Run
from features.schema import EXPOSURE
from features.settings import settings
from features.storage import Storage, connect

JOIN_AGAIN = timedelta(days=1)
"""How much of the window's end is joined from events; what is older has been joined by earlier runs."""

MINIMUM_USERS = 2


class EmptyWindow(ValueError):
    """The window holds too little to train on; the message says what it holds and what to do."""


def prepare(run_id: str, start: str, end: str, targets_from: str) -> str:
    """Freezes exposures of [start, end) (ISO 8601) for ``run_id``; returns the content digest."""
    first, last, target = (partitions.utc(datetime.fromisoformat(text)) for text in (start, end, targets_from))
    run = Run(connect(), run_id)
    inputs = {"start": start, "end": end, "targets_from": targets_from}
    return run.stage("data", inputs, lambda folder: freeze(run, folder, first, last, target))


def freeze(
    run: Run, folder: Path, start: datetime, end: datetime, targets_from: datetime, config: EtlConfig | None = None
) -> dict[str, Any]:
    """Writes exposures, sequences, items, users and manifest into ``folder``; returns counts."""
    storage, config = run.storage, config or EtlConfig(ray_address=settings().ray_address)
    joined = exposure_store.compact(storage, max(start, end - JOIN_AGAIN), end)
    items, users = catalog.read_items(storage), catalog.read_users(storage)
    segments = exposure_store.consume(storage, run.run_id, start, end)
    work = settings().home / "work"
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="etl-", dir=work) as scratch:
        files = _download(storage, segments, Path(scratch))
        item_ids = items.column("item_id").combine_chunks()
        parts = build_parts(files, item_ids, Path(scratch), window=(start, end), config=config, progress=_say)
        _check(parts, start, end)
        memory = Memory(storage, Path(scratch), _ms(end))
        features = PointInTimeFeatures(users, item_ids, targets_from, memory, alone=len(parts) == 1)
        counts = assemble(read_parts(parts), read_rows(parts), folder, features)
        features.close()
        print("lifelong rows:", json.dumps(memory.close()))
        versions = {"item_vectors": memory.vectors.version if memory.vectors else None}
    for name, table in (("items", items), ("users", users)):
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    summary = {
        "exposures": counts["exposures"],
        "requests": counts["trained_on"],
        "users": counts["users"],
        "items": items.num_rows,
        "joined": {key: value for key, value in joined.items() if key != "segments"},
    }
    (folder / "manifest.json").write_text(
        json.dumps({"segments": segments, **versions, **summary}, indent=1, default=str)
    )
    return summary


class PointInTimeFeatures:
    """Static and lifelong features of the requests from ``targets_from`` on, a part at a time, through Feast.

    The newest features of each part's users are loaded on-line on the way; ``close`` loads those of users without any
    exposure. ``alone`` says that there is one part, which then takes all users at once.
    """

    def __init__(
        self, users: pa.Table, item_ids: pa.Array, targets_from: datetime, memory: Memory, *, alone: bool
    ) -> None:
        self._users, self._targets_ms, self._memory = users, _ms(targets_from), memory
        self._item_ids, self._alone = item_ids, alone

    def __call__(self, part: Part, exposures: pa.Table) -> PartFeatures:
        """Features of a part whose EXPOSURE rows are ``exposures``."""
        own = self._users
        if not self._alone:
            known = pc.is_in(self._users.column("user_id"), value_set=part.user_ids)
            own, self._users = self._users.filter(known), self._users.filter(pc.invert(known))
        load_features(exposures, own, self._memory.end_ms, self._memory.rows(exposures))
        return training_features(part, self._item_ids, self._targets_ms)

    def close(self) -> None:
        """Loads the attributes of the users that are left."""
        if not self._alone and self._users.num_rows:
            load_features(EXPOSURE.empty_table(), self._users, self._memory.end_ms, LIFELONG_ROWS.empty_table())


def load_features(exposures: pa.Table, users: pa.Table, end_ms: int, lifelong: pa.Table) -> None:
    """Writes the snapshots of ``users`` and their lifelong rows, registers the views, loads the newest rows on-line."""
    home = feast_home()
    since_ms = int(exposures.column("event_time").cast(pa.int64()).to_numpy().min(initial=end_ms))
    offline.write_snapshots(home, users, lifelong, since_ms)
    offline.apply(home)
    offline.materialize(home, now_ms=end_ms)


def training_features(part: Part, item_ids: pa.Array, targets_ms: int) -> PartFeatures:
    """Point-in-time features of the part's requests from ``targets_ms`` on, from the snapshots just written.

    Items are rows of ``item_ids``, the catalogue: a lifelong list may name some that the window no longer holds.
    """
    chosen = np.flatnonzero(part.request_time >= targets_ms)
    user_ids = part.user_ids.to_numpy(zero_copy_only=False)[part.request_user[chosen]]
    times_ms = part.request_time[chosen]
    known = offline.point_in_time(user_ids, times_ms, feast_home())
    events, counts = events_of_lists(known.lifelong)
    # What is not strictly earlier than its request must not enter it, whatever the snapshots hold.
    row = np.repeat(np.arange(len(chosen)), counts)
    earlier = events.times < times_ms[row]
    events, row = events.take(earlier), row[earlier]
    item = pc.index_in(pa.array(events.item_ids, item_ids.type), value_set=item_ids).fill_null(-1)
    return PartFeatures(
        request=chosen,
        static=known.static,
        counts=np.bincount(row, minlength=len(chosen)),
        events={
            "item": item.to_numpy().astype(np.int32),
            "time_ms": events.times,
            "play_ms": events.play_ms,
            "duration_ms": events.duration_ms,
            "labels": events.labels,
        },
    )


def _download(storage: Storage, segments: Sequence[str], folder: Path) -> list[Path]:
    def fetch(job: tuple[int, str]) -> Path:
        path = folder / f"{job[0]}.parquet"
        path.write_bytes(storage.get(job[1]))
        return path

    return partitions.in_parallel(fetch, list(enumerate(segments)))


def _check(parts: Sequence[Path], start: datetime, end: datetime) -> None:
    window = f"[{start.isoformat()}, {end.isoformat()})"
    if not parts:
        raise EmptyWindow(f"no exposure lies in {window}; ingest logs (`onerec ingest PATH`) or give another window")
    users, unknown = 0, set[str]()
    for part in read_parts(parts):
        users += len(part.user_ids)
        unknown.update(part.unknown_items.to_pylist())
    if users < MINIMUM_USERS:
        raise EmptyWindow(
            f"the exposures in {window} are of {users} user; at least {MINIMUM_USERS} are needed to learn from"
        )
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise EmptyWindow(
            f"{len(unknown)} items of the exposures are not in the catalogue ({shown}); ingest their rows"
        )


def _say(done: int, total: int) -> None:
    print(f"part {done} of {total}")


def _ms(time: datetime) -> int:
    return int(time.timestamp() * 1000)
