"""The state of the loop as metrics: read from a real bucket, told by a real process."""

import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from features.intake import partitions
from features.schema import IMPRESSION, conform
from features.storage import Storage, StorageUnavailable
from monitoring.exporter import Exporter, main, samples
from monitoring.metrics import EXPORTER, METRICS
from monitoring.state import Runs, State, read_state

NOW = datetime(2026, 1, 10, 12, tzinfo=UTC)
DRIFT = {
    "verdict": "drift",
    "rows_current": 900,
    "rows_reference": 1800,
    "validation": {"passed": False, "failed": ["bot_share = 0.2"]},
    "columns": {"play_ratio": {"score": 0.2, "threshold": 0.1, "decides": True}},
}


def stage(storage: Storage, run: str, name: str, summary: dict[str, Any]) -> None:
    storage.put_json(f"runs/{run}/{name}/done.json", {"digest": "d", "inputs": {}, "summary": summary})


def values(state: State) -> dict[tuple[str, ...], float]:
    return {(name, *labels): value for name, labels, value in samples(state)}


def published(storage: Storage, run: str) -> None:
    """A whole run with everything the exporter looks at."""
    stage(storage, run, "data", {"exposures": 1})
    stage(storage, run, "drift", DRIFT)
    storage.put_json(f"runs/{run}/drift_decision/decision.json", {"retrain": True})
    summary = {"loss": 3.0, "holdout/loss": 3.1, "mfu": 0.3, "seconds": 60.0, "examples_per_s": 1000.0, "stopped": None}
    stage(storage, run, "pretrain", summary)
    stage(storage, run, "evaluate", {"candidate": {"recall@50": 0.2, "odd": None}, "production": {"recall@50": 0.1}})
    storage.put_json(f"runs/{run}/gate/decision.json", {"blessed": True})
    stage(storage, run, "publish", {"version": "v1"})
    storage.put_json("models/onerec/v1/manifest.json", {"data_time": "2026-01-10T00:00:00+00:00"})
    storage.put_json("models/onerec/aliases/production.json", {"version": "v1", "set_at": "2026-01-10T06:00:00+00:00"})
    impression = {"exposure_id": ["e"], "request_id": ["r"], "user_id": ["u"], "item_id": ["i"], "position": [0]}
    impression |= {"source": ["onerec"], "duration_ms": [1000]}
    time_ = pa.array([NOW - timedelta(hours=3)], pa.timestamp("ms", "UTC"))
    partitions.write(
        storage,
        partitions.events_root("impression"),
        conform(pa.table({**impression, "event_time": time_}), IMPRESSION),
    )


def test_an_empty_bucket_tells_nothing(s3: Storage) -> None:
    assert values(read_state(s3, NOW)) == {}


def test_a_published_run_is_told_with_names_and_labels_of_the_list(s3: Storage) -> None:
    published(s3, "r1")
    told = values(read_state(s3, NOW))
    assert told["onerec_run_open",] == 0
    assert told["onerec_run_finished_timestamp_seconds", "published"] > 0
    assert told["onerec_stage_finished_timestamp_seconds", "data"] > 0
    assert told["onerec_drift_verdict", "drift"] == 1
    assert told["onerec_drift_verdict", "stable"] == 0
    assert told["onerec_data_gate_passed",] == 0
    assert told["onerec_drift_score", "play_ratio"] == 0.2
    assert told["onerec_drift_threshold", "play_ratio", "yes"] == 0.1
    assert told["onerec_training_loss", "pretrain", "holdout"] == 3.1
    assert told["onerec_evaluation", "production", "recall@50"] == 0.1
    assert told["onerec_gate_blessed",] == 1
    assert (
        told["onerec_alias_set_timestamp_seconds", "production", "v1"]
        == datetime(2026, 1, 10, 6, tzinfo=UTC).timestamp()
    )
    assert told["onerec_bundle_data_timestamp_seconds", "production"] == datetime(2026, 1, 10, tzinfo=UTC).timestamp()
    assert told["onerec_impressions_newest_timestamp_seconds",] == (NOW - timedelta(hours=2)).timestamp()
    for name, *labels in told:
        assert len(labels) == len(METRICS[name].labels), name
    told_of = {name for name, *_ in told}
    assert told_of == {metric.name for metric in EXPORTER if not metric.name.startswith("onerec_state_")}


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        (("drift_decision/decision.json", {"retrain": False}), "not_needed"),
        (("gate/decision.json", {"blessed": False}), "refused"),
        (("outcome.json", {"state": "FAILED", "error": "out of memory"}), "failed"),
    ],
)
def test_a_run_ends_without_a_model_too(s3: Storage, record: tuple[str, dict[str, Any]], outcome: str) -> None:
    stage(s3, "r1", "data", {})
    assert values(read_state(s3, NOW))["onerec_run_open",] == 1
    s3.put_json(f"runs/r1/{record[0]}", record[1])
    told = values(read_state(s3, NOW))
    assert told["onerec_run_open",] == 0
    assert told["onerec_run_finished_timestamp_seconds", outcome] == told["onerec_run_progress_timestamp_seconds",]


def test_a_failed_run_that_is_resumed_is_open_again(s3: Storage) -> None:
    stage(s3, "r1", "data", {})
    s3.put_json("runs/r1/outcome.json", {"state": "FAILED"})
    time.sleep(1.1)  # S3 keeps whole seconds
    stage(s3, "r1", "tokenizer", {})
    assert values(read_state(s3, NOW))["onerec_run_open",] == 1


def test_runs_that_ended_well_are_listed_once(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        stage(s3, f"r{number}", "publish", {"version": "v1"})
        s3.put_json(f"runs/r{number}/outcome.json", {"state": "SUCCEEDED"})
    stage(s3, "failed", "data", {})
    s3.put_json("runs/failed/outcome.json", {"state": "FAILED"})
    runs, listed = Runs(s3), list[str]()
    first = values(read_state(s3, NOW, runs))
    objects = s3.objects

    def counting(storage: Storage, prefix: str) -> Any:
        listed.append(prefix)
        return objects(prefix)

    monkeypatch.setattr(Storage, "objects", counting)
    assert values(read_state(s3, NOW, runs)) == first
    again = {prefix for prefix in listed if prefix.startswith("runs/")}
    assert "runs/failed/" in again, "it may be resumed"
    assert len(again) == 2, "of those that ended well only the newest is looked at"
    time.sleep(1.1)  # S3 keeps whole seconds
    stage(s3, "r9", "data", {})
    assert values(read_state(s3, NOW, runs))["onerec_run_open",] == 1


def test_a_reading_that_fails_is_counted_and_keeps_what_was_known() -> None:
    answers: list[State | Exception] = [
        State(blessed=True),
        StorageUnavailable("S3 is away"),
        KeyError("broken record"),
    ]

    def read() -> State:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    exporter, registry = Exporter(read), CollectorRegistry()
    registry.register(exporter)
    assert registry.get_sample_value("onerec_state_read_timestamp_seconds") is None
    exporter.refresh()
    first = registry.get_sample_value("onerec_state_read_timestamp_seconds")
    for failures in (1, 2):
        exporter.refresh()
        assert registry.get_sample_value("onerec_gate_blessed") == 1
        assert registry.get_sample_value("onerec_state_read_timestamp_seconds") == first
        assert registry.get_sample_value("onerec_state_read_failures_total") == failures


@pytest.mark.usefixtures("environment")
def test_the_process_serves_what_it_read_and_ends_in_order(s3: Storage) -> None:
    published(s3, "r1")
    command = [sys.executable, "-m", "monitoring.exporter", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().split(" at ")[1].strip()
        families = {}
        for _ in range(100):
            with urllib.request.urlopen(address) as page:
                families = {f.name: f for f in text_string_to_metric_families(page.read().decode())}
            if "onerec_gate_blessed" in families:
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(20) == 0
    for metric in EXPORTER:
        if metric.name == "onerec_impressions_newest_timestamp_seconds":
            continue  # the impression is older than the process looks back
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)


def test_an_interval_of_zero_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--interval", "0"])
    assert "give seconds above 0" in capsys.readouterr().err
