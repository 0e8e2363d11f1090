"""Rebuilds users' on-line windows from the object store, after the on-line store was lost or emptied.

Windows are derived data: folding the stored exposures, and the events that no run has joined yet, gives those that were
there. The fold is idempotent and commutative, so that collectors may go on meanwhile and a broken run is repeated.
Run: ``python -m features.reseed --days 30``. Left out: static and lifelong features, which the data stage of the
next pipeline run loads, and windows of users who have not been seen for so many days.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from features.histories.windows import Limits
from features.intake import exposures, partitions
from features.online import FeaturesUnavailable, OnlineFeatures
from features.repository import feast_home, write_registry
from features.storage import Storage, StorageUnavailable, connect
from features.updater import Updater, seed_windows

DAY = timedelta(days=1)


def newest(storage: Storage) -> datetime | None:
    """The end of the newest hour of which anything is stored; None when nothing is."""
    roots = (exposures.ROOT, partitions.events_root("impression"))
    hours = [partitions.hour_of(key) for root in roots for key in partitions.keys(storage, root, None, None)]
    return max(hours) + timedelta(hours=1) if hours else None


def reseed(
    storage: Storage,
    online: OnlineFeatures,
    days: int,
    limits: Limits | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Folds the newest ``days`` days into the windows, day by day; returns how many windows of a day changed in all.

    Raises FeaturesUnavailable and StorageUnavailable; what was folded by then stays.
    """
    end = newest(storage)
    if end is None:
        return 0
    updater, changed = Updater(online, limits), 0
    for day in range(days, 0, -1):
        start = end - day * DAY
        joined = exposures.read(storage, start, start + DAY)
        # Feedback may come a day after what it belongs to: the updater remembers.
        told = [exposures.read_events(storage, kind, start, start + DAY) for kind in ("impression", "feedback")]
        found = seed_windows(online, joined, limits) if joined.num_rows else 0
        found += updater.apply(*told) if any(table.num_rows for table in told) else 0
        changed += found
        say(f"{start:%Y-%m-%d %H:%M}: {joined.num_rows} exposures, {told[0].num_rows} impressions, {found} windows")
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Reseeds the configured store; returns 1 when one of the stores is away, 2 when ``--days`` makes no sense."""
    parser = argparse.ArgumentParser(prog="python -m features.reseed", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--days", type=int, default=30, help="how many days back from the newest stored hour")
    options = parser.parse_args(arguments)
    if options.days < 1:
        parser.error(f"--days is {options.days}; give 1 or more")
    if not (feast_home() / "registry.db").exists():
        write_registry()
    try:
        changed = reseed(connect(), OnlineFeatures.connect(), options.days, say=lambda line: print(line, flush=True))
    except (FeaturesUnavailable, StorageUnavailable) as error:
        print(f"not finished, repeat it: {error}", file=sys.stderr)
        return 1
    print(f"{changed} windows changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
