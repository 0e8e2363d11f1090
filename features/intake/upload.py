"""What is done with the events of logged segments: stored in S3 as Parquet, and folded into the on-line features.

``Upload`` and ``Update`` are callables on segments; the collector runs each in a process of its own
(``features.intake.child``), tests and small tools run them in theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from features.intake import partitions
from features.intake.events import Decoded, decode
from features.intake.rejected import reject
from features.intake.wal import Segment
from features.storage import ObjectMissing, Storage

Apply = Callable[[pa.Table, pa.Table, float], object]
"""Impressions, feedback and when the oldest of them was logged (seconds since the epoch)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one call worked off."""

    events: dict[str, int]
    """Rows by kind."""
    rejected: int
    metrics: str = field(default="", compare=False)
    """Prometheus text of the process that did it, when it is another one."""


@dataclass(frozen=True)
class Upload:
    """Stores events under ``events/kind=.../`` and refused ones under ``rejected/events/``."""

    storage: Storage

    def __call__(self, segments: Sequence[Segment]) -> Outcome:
        """Returns once everything is stored; raises StorageUnavailable."""
        decoded = read(segments)
        try:
            for kind, table in decoded.tables.items():
                partitions.write(self.storage, partitions.events_root(kind), table)
            reject(self.storage, "events", decoded.rejected)
        except ObjectMissing:
            self.storage.ensure_bucket()
            raise
        return _outcome(decoded)


@dataclass(frozen=True)
class Update:
    """Hands impressions and feedback to ``features.updater.Updater.apply``."""

    apply: Apply

    def __call__(self, segments: Sequence[Segment]) -> Outcome:
        """Returns once everything is applied; raises what ``apply`` raises."""
        decoded = read(segments)
        impressions, feedback = decoded.tables["impression"], decoded.tables["feedback"]
        if impressions.num_rows or feedback.num_rows:
            self.apply(impressions, feedback, segments[0].since)
        return _outcome(decoded)


def read(segments: Sequence[Segment]) -> Decoded:
    """The events of ``segments``."""
    return decode([body for segment in segments for body in segment.records()])


def _outcome(decoded: Decoded) -> Outcome:
    counts = {kind: table.num_rows for kind, table in decoded.tables.items()}
    return Outcome(events=counts, rejected=len(decoded.rejected))
