"""Tells Prometheus where the loop stands: ``python -m monitoring.exporter``, one replica, read access to the bucket.

Object storage is read once a minute by a thread of its own (``monitoring.state``), a scrape shows what was read last:
it is fast, and goes on while S3 is away, when ``onerec_state_read_timestamp_seconds`` stands still. Any path of the
port answers with the metrics, so probes may ask any.
"""

import argparse
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from features.storage import StorageUnavailable, connect
from monitoring.drift import DRIFT, INSUFFICIENT, STABLE
from monitoring.metrics import METRICS
from monitoring.state import OUTCOMES, Runs, State, read_state

Sample = tuple[str, tuple[str, ...], float]
"""Name of the metric, values of its labels, value."""

log = logging.getLogger(__name__)


class Exporter(Collector):
    """The state as metrics; ``refresh`` reads it anew with ``read``."""

    def __init__(self, read: Callable[[], State]) -> None:
        self._read = read
        self._state: State | None = None
        self._read_at = 0.0
        self._failures = 0

    def refresh(self) -> None:
        """Reads the state; when that fails the old one is kept and the failure counted."""
        try:
            self._state = self._read()
            self._read_at = time.time()
        except (StorageUnavailable, KeyError, TypeError, ValueError) as error:  # away, or an object that is no record
            self._failures += 1
            log.warning("the state was not read: %s", error.args[0] if error.args else error)

    def collect(self) -> Iterator[Family]:
        """Families of all samples of the state read last, named and described as monitoring.metrics does."""
        families: dict[str, Family] = {}
        for name, labels, value in self._samples():
            metric = METRICS[name]
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = families.setdefault(name, kind(name, metric.help, labels=metric.labels))
            family.add_metric(labels, value)  # type: ignore[attr-defined]
        yield from families.values()

    def _samples(self) -> Iterator[Sample]:
        yield "onerec_state_read_failures_total", (), float(self._failures)
        if self._state is not None:
            yield "onerec_state_read_timestamp_seconds", (), self._read_at
            yield from samples(self._state)


def samples(state: State) -> Iterator[Sample]:
    """What is known, and nothing where nothing is."""
    yield from _of_runs(state)
    for stage, summary in state.trainings.items():
        yield from _of_training(stage, summary)
    yield from _of_drift(state.drift)
    if state.blessed is not None:
        yield "onerec_gate_blessed", (), float(state.blessed)
    for model in ("candidate", "production"):
        for metric, value in (state.evaluation.get(model) or {}).items():
            yield from _number("onerec_evaluation", (model, metric), value)
    for alias, about in state.aliases.items():
        yield "onerec_alias_set_timestamp_seconds", (alias, str(about["version"])), _seconds(about["set_at"])
        if about["data_time"]:
            yield "onerec_bundle_data_timestamp_seconds", (alias,), _seconds(about["data_time"])
    if state.impressions_until is not None:
        yield "onerec_impressions_newest_timestamp_seconds", (), state.impressions_until.timestamp()


def _of_runs(state: State) -> Iterator[Sample]:
    if state.newest is not None:
        yield "onerec_run_started_timestamp_seconds", (), state.newest.started.timestamp()
        yield "onerec_run_progress_timestamp_seconds", (), state.newest.progress.timestamp()
        yield "onerec_run_open", (), float(state.open)
    for outcome in OUTCOMES:
        if outcome in state.finished:
            yield "onerec_run_finished_timestamp_seconds", (outcome,), state.finished[outcome].timestamp()
    for stage, finished in state.stages.items():
        yield "onerec_stage_finished_timestamp_seconds", (stage,), finished.timestamp()


def _of_training(stage: str, summary: Mapping[str, Any]) -> Iterator[Sample]:
    for key, name, labels in (
        ("loss", "onerec_training_loss", (stage, "train")),
        ("holdout/loss", "onerec_training_loss", (stage, "holdout")),
        ("seconds", "onerec_training_seconds", (stage,)),
        ("examples_per_s", "onerec_training_examples_per_second", (stage,)),
        ("mfu", "onerec_training_mfu", (stage,)),
    ):
        yield from _number(name, labels, summary.get(key))


def _of_drift(drift: Mapping[str, Any]) -> Iterator[Sample]:
    if not drift:
        return
    for verdict in (DRIFT, STABLE, INSUFFICIENT):
        yield "onerec_drift_verdict", (verdict,), float(drift["verdict"] == verdict)
    for window in ("current", "reference"):
        yield from _number("onerec_drift_rows", (window,), drift.get(f"rows_{window}"))
    if "validation" in drift:
        yield "onerec_data_gate_passed", (), float(drift["validation"]["passed"])
    for column, found in drift["columns"].items():
        decides = "yes" if found["decides"] else "no"
        yield from _number("onerec_drift_score", (column,), found["score"])
        yield from _number("onerec_drift_threshold", (column, decides), found["threshold"])


def _number(name: str, labels: tuple[str, ...], value: object) -> Iterator[Sample]:
    if isinstance(value, int | float) and math.isfinite(value):
        yield name, labels, float(value)


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main(arguments: list[str] | None = None) -> None:
    """Serves the metrics until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m monitoring.exporter", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9464)
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between two readings of object storage")
    given = parser.parse_args(arguments)
    if given.interval <= 0:
        parser.error(f"--interval is {given.interval:g}; give seconds above 0")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    storage, stopped = connect(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    runs = Runs(storage)
    exporter = Exporter(lambda: read_state(storage, datetime.now(UTC), runs))
    registry = CollectorRegistry()
    registry.register(exporter)
    try:
        server, thread = start_http_server(given.port, given.host, registry)
    except OSError as error:
        sys.exit(f"cannot listen on {given.host}:{given.port}: {error.strerror}; give another --port")
    log.info("metrics of the loop's state at http://%s:%d/metrics", given.host, server.server_port)
    while not stopped.is_set():
        exporter.refresh()
        stopped.wait(given.interval)
    server.shutdown()
    thread.join()


if __name__ == "__main__":
    main()
