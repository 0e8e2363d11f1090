"""One window of exposures frozen as a run's training data: the stage every pipeline begins with.

Joins the newest events, rebuilds the daily feature rows, reads them back point-in-time through Feast for every
training request, and stores it all under ``runs/<run_id>/data/`` with a manifest of the segments consumed. Older
exposures of the window only serve as contexts; requests from ``targets_from`` on are trained on.
"""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features import catalog, offline
from features.histories.lifelong import LIST_TYPES, daily_lifelong
from features.histories.requests import requests
from features.histories.windows import Limits
from features.intake import exposures as exposure_store
from features.intake import partitions
from features.repository import feast_home
from features.runs import Run
from features.storage import connect

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


def freeze(run: Run, folder: Path, start: datetime, end: datetime, targets_from: datetime) -> dict[str, Any]:
    """Writes exposures, items, users, features and manifest into ``folder``; returns counts."""
    storage = run.storage
    joined = exposure_store.compact(storage, max(start, end - JOIN_AGAIN), end)
    exposures = exposure_store.read(storage, start, end)
    items, users = catalog.read_items(storage), catalog.read_users(storage)
    _check(exposures, items, start, end)
    exposures = exposures.sort_by([("user_id", "ascending"), ("event_time", "ascending"), ("exposure_id", "ascending")])
    features = training_features(exposures, users, targets_from, end)
    for name, table in (("exposures", exposures), ("items", items), ("users", users), ("features", features)):
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    summary = {
        "exposures": exposures.num_rows,
        "requests": features.num_rows,
        "users": len(set(exposures["user_id"].to_pylist())),
        "items": items.num_rows,
        "joined": {key: value for key, value in joined.items() if key != "segments"},
    }
    segments = partitions.keys(storage, exposure_store.ROOT, start, end)
    (folder / "manifest.json").write_text(json.dumps({"segments": segments, **summary}, indent=1, default=str))
    return summary


def training_features(exposures: pa.Table, users: pa.Table, targets_from: datetime, end: datetime) -> pa.Table:
    """Static and lifelong features of every request from ``targets_from`` on, point-in-time; also loads them on-line.

    One row per request in order of time: request_id, user_id, time_ms, static list<int64>, lifelong_<column> lists.
    """
    home = feast_home()
    since = int(exposures["event_time"].cast(pa.int64()).to_numpy().min())
    offline.write_snapshots(home, users, daily_lifelong(exposures, Limits().lifelong), since)
    offline.apply(home)
    offline.materialize(home, now_ms=int(end.timestamp() * 1000))
    grouped = requests(exposures)
    chosen = grouped.times_ms >= int(targets_from.timestamp() * 1000)
    user_ids, times_ms = grouped.user_ids[chosen], grouped.times_ms[chosen]
    known = offline.point_in_time(user_ids, times_ms, home)
    columns = {
        "request_id": pa.array(grouped.request_ids[chosen], pa.string()),
        "user_id": pa.array(user_ids, pa.string()),
        "time_ms": pa.array(np.asarray(times_ms, np.int64)),
        "static": pa.array(known.static.tolist(), pa.list_(pa.int64())),
        **{f"lifelong_{name}": known.lifelong[name] for name in LIST_TYPES},
    }
    return pa.table(columns)


def _check(exposures: pa.Table, items: pa.Table, start: datetime, end: datetime) -> None:
    window = f"[{start.isoformat()}, {end.isoformat()})"
    if exposures.num_rows == 0:
        raise EmptyWindow(f"no exposure lies in {window}; ingest logs (`onerec ingest PATH`) or give another window")
    users = len(set(exposures["user_id"].to_pylist()))
    if users < MINIMUM_USERS:
        raise EmptyWindow(
            f"the exposures in {window} are of {users} user; at least {MINIMUM_USERS} are needed to learn from"
        )
    missing = set(exposures["item_id"].to_pylist()) - set(items["item_id"].to_pylist())
    if missing:
        shown = ", ".join(sorted(missing)[:5])
        raise EmptyWindow(
            f"{len(missing)} items of the exposures are not in the catalogue ({shown}); ingest their rows"
        )
