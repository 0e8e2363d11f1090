"""Prometheus metrics of the collector, in a registry of their own so that two collectors fit in one process.

What an operator watches: ``onerec_collector_oldest_unuploaded_seconds`` and ``onerec_collector_updater_lag_seconds``
grow while S3 or the on-line store is away; ``onerec_collector_wal_bytes`` over the budget says how long the disk lasts.
All of them are listed in docs/intake.md.
"""

from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from features.intake.events import KINDS, Decoded
from features.intake.upload import Outcome
from features.intake.wal import WriteAheadLog
from features.intake.worker import UPDATE, UPLOAD, Backlog

_FAST = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Telemetry:
    """Counters that the collector moves, and gauges read from its log and backlog when scraped."""

    def __init__(self, backlog: Backlog, budget_bytes: int) -> None:
        self._backlog = backlog
        self._update_metrics = ""
        self.registry = CollectorRegistry()
        self._gauge("wal_budget_bytes", "At how many such bytes new events are refused.").set(budget_bytes)
        accepted = self._counter("events_accepted", "Events on disk and acknowledged.", "kind")
        self._accepted = {kind: accepted.labels(kind) for kind in KINDS.values()}
        self.refused = self._counter("requests_refused", "Requests answered with an error.", "reason")
        self.skewed = self._counter("events_skewed", "Accepted events whose time is far from now.")
        self.ack_seconds = self._histogram("ack_seconds", "From the request to its batch being on disk.")
        self._commit_seconds = self._histogram("commit_seconds", "One write and flush of the log.")
        self._batches = self._counter("batches_committed", "Batches on disk; over commits: how many share a flush.")
        self.uploaded = self._counter("events_uploaded", "Events stored in S3, repeats included.", "kind")
        for kind in KINDS.values():
            self.uploaded.labels(kind)  # a rate needs the zero
        self.rejected = self._counter("events_rejected", "Logged events that no longer pass validation.")
        self.upload_failures = self._counter("upload_failures", "Tries to upload that failed.")
        self.update_failures = self._counter("updater_failures", "Tries to update on-line features that failed.")
        self.updates_skipped = self._counter("updater_skipped_events", "Events given up for the on-line features.")

    def watch(self, log: WriteAheadLog) -> None:
        """Adds the gauges that read from ``log`` and the backlog."""
        backlog = self._backlog
        self._gauge("queue_records", "Batches that wait for the disk.").set_function(log.waiting)
        waiting = self._gauge("wal_bytes", "Bytes in the log that a step still needs.", "step")
        for step in backlog.steps:
            waiting.labels(step).set_function(partial(_bytes, backlog, log, step))
        self._gauge("oldest_unuploaded_seconds", "Age of the oldest event that is not in S3.").set_function(
            lambda: max(backlog.age(UPLOAD), log.open_seconds())
        )
        if UPDATE in backlog.steps:
            self._gauge("updater_lag_seconds", "Age of the oldest event the on-line features miss.").set_function(
                lambda: max(backlog.age(UPDATE), log.open_seconds())
            )

    def count_accepted(self, kind: str, events: int) -> None:
        """Counts acknowledged events."""
        self._accepted[kind].inc(events)

    def committed(self, records: int, seconds: float) -> None:
        """Notes one flush of the log."""
        self._batches.inc(records)
        self._commit_seconds.observe(seconds)

    def count_uploaded(self, outcome: Outcome) -> None:
        """Counts what one upload stored."""
        for kind, events in outcome.events.items():
            self.uploaded.labels(kind).inc(events)
        self.rejected.inc(outcome.rejected)

    def count_skipped(self, decoded: Decoded) -> None:
        """Counts what the on-line features will miss."""
        self.updates_skipped.inc(decoded.tables["impression"].num_rows + decoded.tables["feedback"].num_rows)

    def keep_update(self, outcome: Outcome) -> None:
        """Keeps the metrics of the process that updates the features."""
        self._update_metrics = outcome.metrics

    def skipped(self) -> int:
        """Events given up for the on-line features since the start."""
        return int(self.registry.get_sample_value("onerec_collector_updater_skipped_events_total") or 0)

    def render(self) -> bytes:
        """The text exposition format: these metrics, those of this process, and those of the updater."""
        return generate_latest(self.registry) + generate_latest(REGISTRY) + self._update_metrics.encode()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"onerec_collector_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"onerec_collector_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"onerec_collector_{name}", text, buckets=_FAST, registry=self.registry)


def _bytes(backlog: Backlog, log: WriteAheadLog, step: str) -> int:
    return backlog.bytes(step) + log.open_bytes()
