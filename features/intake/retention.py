"""Keeps the stored events and exposures small: merges the parts of an hour, deletes what is superseded or too old.

A part is superseded when another part of its hour *is* the merge of all of them (content-addressed keys make that a
comparison of names) and has been there for ``grace``, longer than any reader needs; a reader that loses a part all the
same lists again and finds the merge. Segments claimed by a training run that has not finished are never deleted.
``prune`` may be interrupted and repeated at any time.
Run: ``python -m features.intake.retention [--dry-run]``, nightly.
Left out: retention of bundles, runs and catalogue parts.
"""

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.intake import partitions
from features.intake.exposures import CLAIMS, ROOT
from features.intake.join import merge
from features.intake.partitions import Part
from features.runs import Run
from features.schema import EVENTS, EXPOSURE, conform
from features.settings import settings
from features.storage import Storage, StorageUnavailable, connect

log = logging.getLogger(__name__)

MAX_DAYS = 36_500
"""A century: beyond it lies what a calendar does not hold."""

Merge = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """What is kept for how long."""

    retention_days: float = 90
    """By event time, counted back from the newest partition that does not lie in the future."""
    grace: timedelta = timedelta(days=1)
    """How long a merged part must have been there before those it replaces go."""
    abandoned: timedelta = timedelta(days=14)
    """A run that has not finished for so long after its claim does not hold segments any more."""

    def __post_init__(self) -> None:
        if not 0 < self.retention_days <= MAX_DAYS:
            raise ValueError(f"{self.retention_days} days cannot be kept; give more than 0 and at most {MAX_DAYS}")
        if self.grace < timedelta(0):
            raise ValueError(f"a grace of {self.grace} cannot be; give 0 or more")


def distinct(events: pa.Table) -> pa.Table:
    """Event rows without exact repeats, in an order that depends on the rows alone."""
    keyed = events.select(["event_time"])
    for field in events.schema:
        if pa.types.is_list(field.type):
            # Lists can be neither sorted nor grouped by, their text can.
            texts = events.column(field.name).cast(pa.list_(pa.string()))
            keyed = keyed.append_column(field.name, pc.binary_join(texts, ","))
        elif field.name != "event_time":
            keyed = keyed.append_column(field.name, events.column(field.name))
    names = keyed.column_names
    keyed = keyed.append_column("row", pa.array(np.arange(events.num_rows)))
    once = keyed.group_by(names, use_threads=False).aggregate([("row", "min")])
    return events.take(once.sort_by([(name, "ascending") for name in names]).column("row_min"))


ROOTS: dict[str, tuple[pa.Schema, Merge]] = {
    ROOT: (EXPOSURE, merge),
    **{partitions.events_root(kind): (schema, distinct) for kind, schema in EVENTS.items()},
}
"""Every root of hourly partitions, its schema, and how its parts are merged."""


def merged_part(storage: Storage, root: str, parts: Sequence[Part]) -> tuple[str, bytes]:
    """Key and bytes of the merge of the parts of one hour; the key is one of theirs when it is stored already."""
    schema, merged = ROOTS[root]
    tables = [conform(partitions.fetch(storage, part), schema) for part in parts]
    return partitions.encode(root, parts[0].hour, merged(pa.concat_tables(tables)))


def prune(
    storage: Storage, config: RetentionConfig | None = None, *, now: datetime | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Merges the parts of every hour, deletes superseded and expired ones; returns what was (or would be) done."""
    config, now = config or RetentionConfig(), now or datetime.now(UTC)
    listed = {root: partitions.parts(storage, root, None, None) for root in ROOTS}
    oldest = _newest(listed, now) - timedelta(days=config.retention_days)
    claimed = claims(storage, now - config.abandoned)
    merged = 0
    superseded: list[Part] = []
    expired: list[Part] = []
    for root, found in listed.items():
        hours: dict[datetime, list[Part]] = defaultdict(list)
        for part in found:
            (expired if part.hour + timedelta(hours=1) <= oldest else hours[part.hour]).append(part)
        for parts in filter(lambda parts: len(parts) > 1, hours.values()):
            replaced = _superseded(storage, root, parts, now - config.grace, dry_run)
            merged += replaced is None
            superseded += replaced or []
    doomed = [part for part in [*superseded, *expired] if part.key not in claimed]
    if not dry_run:
        # A run may have claimed segments since.
        claimed = claims(storage, now - config.abandoned)
        doomed = [part for part in doomed if part.key not in claimed]
        partitions.in_parallel(storage.remove, [part.key for part in doomed])
    return {
        "merged": merged,
        "superseded": len(superseded),
        "expired": len(expired),
        "kept_for_runs": len(superseded) + len(expired) - len(doomed),
        "deleted": 0 if dry_run else len(doomed),
        "bytes": sum(part.size for part in doomed),
        "oldest": oldest.isoformat(),
        "dry_run": dry_run,
    }


def claims(storage: Storage, since: datetime) -> set[str]:
    """The segments that training runs claimed after ``since`` and that have not finished."""
    held: set[str] = set()
    for key in storage.keys(f"{CLAIMS}/"):
        claim = storage.get_json(key)
        if datetime.fromisoformat(claim["claimed"]) > since and not finished(Run(storage, claim["run_id"])):
            held |= set(claim["segments"])
    return held


def finished(run: Run) -> bool:
    """Whether a run has published a model, or decided not to."""
    if run.done("publish") is not None:
        return True
    decision = f"{run.prefix('gate')}/decision.json"
    return run.storage.exists(decision) and not run.storage.get_json(decision)["blessed"]


def _superseded(storage: Storage, root: str, parts: list[Part], before: datetime, dry_run: bool) -> list[Part] | None:
    """The parts of an hour that an old merge replaces; None when the merge is new, and written unless ``dry_run``."""
    try:
        key, data = merged_part(storage, root, parts)
    except (ValueError, pa.ArrowException) as error:
        log.warning("%s is left as it is: %s", parts[0].key.rsplit("/", 1)[0], error)
        return []
    there = {part.key: part for part in parts}.get(key)
    if there is None:
        if not dry_run:
            storage.put(key, data, "application/vnd.apache.parquet")
        return None
    return [part for part in parts if part.key != key] if there.modified <= before else []


def _newest(listed: dict[str, list[Part]], now: datetime) -> datetime:
    """Logs may live in a time of their own, and a wrong clock must not make everything old."""
    hours = [part.hour + timedelta(hours=1) for found in listed.values() for part in found]
    return max((hour for hour in hours if hour <= now + timedelta(hours=1)), default=now)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prunes the configured bucket; prints the summary as JSON; returns 1 when S3 is away."""
    about = "Merges the parts of every hour, deletes superseded and expired ones."
    parser = argparse.ArgumentParser(prog="python -m features.intake.retention", description=about)
    parser.add_argument("--retention-days", type=float, default=settings().retention_days)
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    options = parser.parse_args(arguments)
    try:
        done = prune(connect(), RetentionConfig(retention_days=options.retention_days), dry_run=options.dry_run)
    except (StorageUnavailable, ValueError) as error:
        print(f"nothing more was pruned: {error}", file=sys.stderr)
        return 1
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
