"""What the processes register is what monitoring.metrics lists, name by name."""

from collections.abc import Iterable

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import features.updater
import models.serving.events
import models.serving.logs
import models.serving.telemetry
from features.intake.telemetry import Telemetry
from features.intake.worker import UPDATE, UPLOAD
from monitoring.metrics import COLLECTOR, METRICS, SERVER, UPDATER, Metric, series


def registered(registry: CollectorRegistry) -> Iterable[MetricWrapperBase]:
    found = registry._collector_to_names
    return [collector for collector in found if isinstance(collector, MetricWrapperBase)]


def described(metric: MetricWrapperBase) -> Metric:
    name = metric._name + ("_total" if metric._type == "counter" else "")
    return Metric(metric._type, name, metric._documentation, tuple(metric._labelnames))  # type: ignore[arg-type]


def by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


class NoLog:
    """What a collector's telemetry reads when it is scraped."""

    steps = (UPLOAD, UPDATE)

    def bytes(self, step: str) -> int:
        return 0

    def age(self, step: str) -> float:
        return 0.0

    def waiting(self) -> int:
        return 0

    def open_seconds(self) -> float:
        return 0.0

    def open_bytes(self) -> int:
        return 0


def test_a_model_server_and_the_updater_register_what_is_listed() -> None:
    for module in (models.serving.events, models.serving.logs, models.serving.telemetry, features.updater):
        assert module.__name__
    ours = [m for m in map(described, registered(REGISTRY)) if m.name.startswith("onerec_")]
    assert by_name(ours) == by_name((*SERVER, *UPDATER))


def test_a_collector_registers_what_is_listed() -> None:
    telemetry = Telemetry(NoLog(), 1)  # type: ignore[arg-type]
    telemetry.watch(NoLog())  # type: ignore[arg-type]
    assert by_name(map(described, registered(telemetry.registry))) == by_name(COLLECTOR)
    assert b"onerec_collector_updater_lag_seconds 0.0" in telemetry.render()


def test_names_are_unique_and_follow_prometheus() -> None:
    names = list(series())
    assert len(names) == len(set(names))
    for metric in METRICS.values():
        assert metric.help
        assert metric.name.endswith("_total") == (metric.kind == "counter")


@pytest.mark.parametrize("kind", ["counter", "gauge", "histogram"])
def test_series_are_what_prometheus_stores(kind: str) -> None:
    metric = Metric(kind, "onerec_x", "help")  # type: ignore[arg-type]
    assert metric.series == (
        ("onerec_x_bucket", "onerec_x_sum", "onerec_x_count") if kind == "histogram" else ("onerec_x",)
    )
