"""Every Prometheus metric of the platform: what alert rules (alerts.yaml) and dashboards may speak of.

The processes register their metrics beside the code that moves them, since features may not import this layer; a test
scrapes each and holds it equal to this list. Left out: what Prometheus's client and KServe add on their own
(``process_*``, ``python_*``, ``request_*_seconds``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric as it is scraped; ``labels`` in the order they are declared."""

    kind: Kind
    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names under which Prometheus stores it."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


SERVER = (
    Metric(
        "counter", "onerec_requests_total", "Recommendation requests by outcome, an HTTP status", ("model", "status")
    ),
    Metric("histogram", "onerec_request_seconds", "Answered requests, from the body to the answer", ("model",)),
    Metric("gauge", "onerec_in_flight_requests", "Requests accepted and not yet answered", ("model",)),
    Metric("gauge", "onerec_waiting_rows", "Users waiting for a batch", ("model",)),
    Metric("histogram", "onerec_batch_rows", "Users per run of the model", ("model",)),
    Metric("histogram", "onerec_beam_width", "Beams that requests ask for", ("model",)),
    Metric(
        "histogram",
        "onerec_stage_seconds",
        "Time of a request by stage: parse, queue, features, model, respond",
        ("model", "stage"),
    ),
    Metric("counter", "onerec_recommended_users_total", "Users recommended to, by flag", ("model", "flag")),
    Metric("counter", "onerec_feature_cache_total", "Contexts taken from the cache, by outcome", ("model", "outcome")),
    Metric(
        "gauge",
        "onerec_illegal_share",
        "Share of unconstrained samples whose SID names no item: a health metric",
        ("model",),
    ),
    Metric("counter", "onerec_bundle_refused_total", "Bundles refused by a model server", ("model", "version")),
    Metric("counter", "onerec_bundle_loaded_total", "Bundles put into service by a model server", ("model",)),
    Metric(
        "gauge",
        "onerec_bundle_serving",
        "1 for the version a model serves now, 0 for those before",
        ("model", "version"),
    ),
    Metric("counter", "onerec_catalogue_moved_total", "Times a server applied deltas of the catalogue", ("model",)),
    Metric("gauge", "onerec_catalogue_items", "Items a model can name now, by kind", ("model", "kind")),
    Metric(
        "gauge", "onerec_catalogue_deltas_refused", "Deltas of the version in service that are unreadable", ("model",)
    ),
    Metric("gauge", "onerec_served_queue", "Served events not yet acknowledged by the collector, in memory"),
    Metric("gauge", "onerec_served_spooled", "Served events waiting on disk for the collector"),
    Metric("counter", "onerec_served_sent_total", "Served events acknowledged by the collector"),
    Metric(
        "counter",
        "onerec_served_lost_total",
        "Served events that neither the collector nor the spool took",
        ("reason",),
    ),
    Metric("counter", "onerec_log_lines_lost_total", "Log lines dropped because they could not be written fast enough"),
)
"""A model server, ``GET /metrics`` of its REST port."""

COLLECTOR = (
    Metric("counter", "onerec_collector_events_accepted_total", "Events on disk and acknowledged.", ("kind",)),
    Metric("counter", "onerec_collector_requests_refused_total", "Requests answered with an error.", ("reason",)),
    Metric("counter", "onerec_collector_events_skewed_total", "Accepted events whose time is far from now."),
    Metric("histogram", "onerec_collector_ack_seconds", "From the request to its batch being on disk."),
    Metric("histogram", "onerec_collector_commit_seconds", "One write and flush of the log."),
    Metric(
        "counter",
        "onerec_collector_batches_committed_total",
        "Batches on disk; over commits: how many share a flush.",
    ),
    Metric("counter", "onerec_collector_events_uploaded_total", "Events stored in S3, repeats included.", ("kind",)),
    Metric("counter", "onerec_collector_events_rejected_total", "Logged events that no longer pass validation."),
    Metric("counter", "onerec_collector_upload_failures_total", "Tries to upload that failed."),
    Metric("counter", "onerec_collector_updater_failures_total", "Tries to update on-line features that failed."),
    Metric("counter", "onerec_collector_updater_skipped_events_total", "Events given up for the on-line features."),
    Metric("gauge", "onerec_collector_queue_records", "Batches that wait for the disk."),
    Metric("gauge", "onerec_collector_wal_bytes", "Bytes in the log that a step still needs.", ("step",)),
    Metric("gauge", "onerec_collector_wal_budget_bytes", "At how many such bytes new events are refused."),
    Metric("gauge", "onerec_collector_oldest_unuploaded_seconds", "Age of the oldest event that is not in S3."),
    Metric("gauge", "onerec_collector_updater_lag_seconds", "Age of the oldest event the on-line features miss."),
)
"""The collector, ``GET /metrics``."""

UPDATER = (
    Metric("counter", "onerec_updater_events_total", "Events folded into the on-line windows.", ("kind",)),
    Metric("counter", "onerec_updater_pushed_users_total", "Users whose windows changed and were pushed."),
    Metric(
        "counter",
        "onerec_updater_unpaired_feedback_total",
        "Feedback whose impression was not known when it came.",
    ),
    Metric("histogram", "onerec_updater_batch_seconds", "Time to read, fold and push one batch."),
    Metric(
        "histogram",
        "onerec_updater_lag_seconds",
        "From the acknowledgement of a batch's oldest event to its push.",
    ),
)
"""The updater of on-line features, a child of the collector, on the collector's page."""

EXPORTER = (
    Metric("gauge", "onerec_state_read_timestamp_seconds", "When the state below was last read from object storage."),
    Metric("counter", "onerec_state_read_failures_total", "Tries to read the state that failed."),
    Metric("gauge", "onerec_run_started_timestamp_seconds", "When the newest run stored its first object."),
    Metric("gauge", "onerec_run_progress_timestamp_seconds", "When the newest run stored its last object."),
    Metric("gauge", "onerec_run_open", "1 while the newest run has not ended in any of the outcomes, else 0."),
    Metric(
        "gauge",
        "onerec_run_finished_timestamp_seconds",
        "When a run last ended: published, refused (by the gate), not_needed (no retraining) or failed.",
        ("outcome",),
    ),
    Metric("gauge", "onerec_stage_finished_timestamp_seconds", "When a stage of any run last finished.", ("stage",)),
    Metric(
        "gauge",
        "onerec_training_loss",
        "Loss of the newest finished training, on its data (train) or held out (holdout).",
        ("stage", "split"),
    ),
    Metric("gauge", "onerec_training_seconds", "Duration of the newest finished training.", ("stage",)),
    Metric("gauge", "onerec_training_examples_per_second", "Exposures the newest training took in.", ("stage",)),
    Metric("gauge", "onerec_training_mfu", "Model FLOP utilisation of the newest finished training.", ("stage",)),
    Metric("gauge", "onerec_drift_verdict", "1 for the newest verdict, 0 for the others.", ("verdict",)),
    Metric("gauge", "onerec_drift_score", "Distance of the newest window from its reference.", ("column",)),
    Metric("gauge", "onerec_drift_threshold", "Where a column counts as drifted.", ("column", "decides")),
    Metric("gauge", "onerec_drift_rows", "Exposures compared: current or reference.", ("window",)),
    Metric("gauge", "onerec_data_gate_passed", "1 when the data gate let the newest window pass, else 0."),
    Metric("gauge", "onerec_gate_blessed", "1 when the newest decision of the gate blessed its candidate, else 0."),
    Metric(
        "gauge",
        "onerec_evaluation",
        "Metrics of the newest evaluation, of the candidate and of the model then in production.",
        ("model", "metric"),
    ),
    Metric(
        "gauge", "onerec_alias_set_timestamp_seconds", "When an alias was pointed at its version.", ("alias", "version")
    ),
    Metric(
        "gauge",
        "onerec_bundle_data_timestamp_seconds",
        "End of the data that an alias's bundle learned from.",
        ("alias",),
    ),
    Metric("gauge", "onerec_impressions_newest_timestamp_seconds", "End of the newest hour with stored impressions."),
)
"""The exporter of the loop's state (monitoring.exporter)."""

METRICS = {metric.name: metric for metric in (*SERVER, *COLLECTOR, *UPDATER, *EXPORTER)}


def series() -> Iterator[str]:
    """Every name an expression may use."""
    for metric in METRICS.values():
        yield from metric.series
