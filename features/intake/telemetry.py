"""Prometheus metrics of the collector, in a registry of their own so that two collectors fit in one process.

What an operator watches: ``onerec_collector_oldest_unuploaded_seconds`` and ``onerec_collector_updater_lag_seconds``
grow while S3 or the on-line store is away; ``onerec_collector_wal_bytes`` says how long the disk lasts.
"""

from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, generate_latest

from features.intake.events import Decoded
from features.intake.upload import UPDATE, UPLOAD, Backlog
from features.intake.wal import WriteAheadLog


class Telemetry:
    """Counters that the collector moves, and gauges read from its log and backlog when scraped."""

    def __init__(self, log: WriteAheadLog, backlog: Backlog) -> None:
        self._log, self._backlog = log, backlog
        self.registry = CollectorRegistry()
        self.accepted = self._counter("events_accepted", "Events on disk and acknowledged.", "kind")
        self.refused = self._counter("requests_refused", "Requests answered with an error.", "reason")
        self.uploaded = self._counter("events_uploaded", "Events stored in S3, repeats included.", "kind")
        self.rejected = self._counter("events_rejected", "Logged events that no longer pass validation.")
        self.upload_failures = self._counter("upload_failures", "Tries to upload that failed.")
        self.update_failures = self._counter("updater_failures", "Tries to update on-line features that failed.")
        self.updates_skipped = self._counter("updater_skipped_events", "Events given up for the on-line features.")
        self._gauge("queue_records", "Batches that wait for the disk.").set_function(log.waiting)
        waiting = self._gauge("wal_bytes", "Bytes in the log that a step still needs.", "step")
        for step in backlog.steps:
            waiting.labels(step).set_function(partial(self._bytes, step))
        self._gauge("oldest_unuploaded_seconds", "Age of the oldest event that is not in S3.").set_function(
            lambda: max(backlog.age(UPLOAD), log.open_seconds())
        )
        if UPDATE in backlog.steps:
            self._gauge("updater_lag_seconds", "Age of the oldest event the on-line features miss.").set_function(
                lambda: max(backlog.age(UPDATE), log.open_seconds())
            )

    def count_uploaded(self, decoded: Decoded) -> None:
        """Counts what one upload stored."""
        for kind, table in decoded.tables.items():
            self.uploaded.labels(kind).inc(table.num_rows)
        self.rejected.inc(len(decoded.rejected))

    def count_skipped(self, decoded: Decoded) -> None:
        """Counts what the on-line features will miss."""
        self.updates_skipped.inc(decoded.tables["impression"].num_rows + decoded.tables["feedback"].num_rows)

    def skipped(self) -> int:
        """Events given up for the on-line features since the start."""
        return int(self.registry.get_sample_value("onerec_collector_updater_skipped_events_total") or 0)

    def render(self) -> bytes:
        """The text exposition format: these metrics, and those of the process and the updater."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)

    def _bytes(self, step: str) -> int:
        return self._backlog.bytes(step) + self._log.open_bytes()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"onerec_collector_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"onerec_collector_{name}", text, labels, registry=self.registry)
