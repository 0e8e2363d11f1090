"""Puts a log into the platform: catalogue, exposure store and on-line features, all idempotent.

Items and users come first, the exposures in hourly partitions after them, the on-line windows last: an interrupted
ingest is simply run again.
"""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from features import catalog, offline
from features.datasets.dataset import TOO_FEW, Dataset
from features.histories.lifelong import daily_lifelong
from features.histories.windows import Limits
from features.intake import exposures as exposure_store
from features.intake.rejected import Rejected, reject
from features.online import OnlineFeatures
from features.repository import feast_home
from features.storage import Storage
from features.updater import seed_windows


def ingest(dataset: Dataset, storage: Storage, home: Path) -> dict[str, Any]:
    """Stores the data set and seeds the features; returns counts. ``home`` is the platform's home folder.

    Raises ValueError, before anything is stored, when the log has fewer than two users.
    """
    users = pc.count_distinct(dataset.exposures["user_id"]).as_py()
    if users < 2:
        raise ValueError(f"the log {dataset.name!r} has {users} user{'s' * (users != 1)}; {TOO_FEW}")
    storage.ensure_bucket()
    catalog.append_items(storage, dataset.items)
    catalog.append_users(storage, dataset.users)
    segments = exposure_store.write(storage, dataset.exposures)
    if dataset.rejected.num_rows:
        rows = dataset.rejected.to_pylist()
        reject(storage, "ingest", [Rejected("log", str(row["reason"]), row) for row in rows])
    seeded = seed_features(dataset, home)
    return {
        "exposures": dataset.exposures.num_rows,
        "items": dataset.items.num_rows,
        "users": dataset.users.num_rows,
        "duplicates_removed": dataset.duplicates,
        "rejected": dataset.rejected.num_rows,
        "segments": len(segments),
        "users_seeded": seeded,
    }


def seed_features(dataset: Dataset, home: Path) -> int:
    """Registers the feature views and writes every user's current features on-line; returns how many users."""
    folder = feast_home().absolute()
    since = int(dataset.exposures["event_time"][0].as_py().timestamp() * 1000)
    offline.write_snapshots(folder, dataset.users, daily_lifelong(dataset.exposures, Limits().lifelong), since)
    offline.apply(folder)
    offline.materialize(folder)
    return seed_windows(OnlineFeatures.connect(folder), dataset.exposures, Limits())
