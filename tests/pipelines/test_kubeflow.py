"""Runs on Kubeflow Pipelines: what is submitted is accepted, and how it ends is told honestly."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded.kfp_api import KfpApi, serving
from typer.testing import CliRunner

from features.settings import settings
from pipelines.__main__ import app
from pipelines.compilation import compile_all
from pipelines.kubeflow import Kubeflow, KubeflowError
from pipelines.profiles import PROFILES


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpApi]:
    with serving() as api:
        monkeypatch.setenv("ONEREC_KFP_ENDPOINT", api.url)
        monkeypatch.setattr("pipelines.kubeflow.POLL_SECONDS", 0.01)
        settings.cache_clear()
        yield api
    settings.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    compile_all(folder, PROFILES["gpu"])
    return folder


def cli(api: KfpApi, *words: str) -> subprocess.CompletedProcess[str]:
    """The real ``kfp`` command."""
    command = [str(Path(sys.executable).parent / "kfp"), "--endpoint", api.url, *words]
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_kfp_run_create_takes_the_compiled_file(kfp: KfpApi, compiled: Path) -> None:
    """As docs/kubeflow.md says it; without arguments the pipeline chooses its window."""
    file = str(compiled / "retraining.yaml")
    done = cli(kfp, "run", "create", "-e", "onerec", "-f", file, "policy=on_drift", "preset=tiny")
    assert done.returncode == 0, done.stderr
    (run,) = kfp.runs.values()
    assert run["runtime_config"]["parameters"] == {"policy": "on_drift", "preset": "tiny"}
    assert set(run["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}


def test_kfp_run_create_reads_values_as_json(kfp: KfpApi, compiled: Path) -> None:
    """A trap of the CLI that the docs name: a value of digits is a number, which no parameter of ours is."""
    file = str(compiled / "training.yaml")
    assert cli(kfp, "run", "create", "-e", "onerec", "-f", file, "run_id=20260101").returncode != 0


def test_submit_and_wait_for_success(kfp: KfpApi) -> None:
    result = CliRunner().invoke(
        app, ["submit", "retraining", "policy=on_drift", "--profile", "gpu", "--wait", "--json"]
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["state"] == "SUCCEEDED"
    assert "PENDING" in result.stderr
    assert "RUNNING" in result.stderr
    assert kfp.runs[told["run_id"]]["runtime_config"]["parameters"] == {"policy": "on_drift"}


@pytest.mark.parametrize(
    ("state", "words"),
    [("FAILED", "task pretrain: loss is nan"), ("CANCELED", "KFP gives no reason"), ("SKIPPED", "KFP gives no reason")],
)
def test_submit_and_wait_for_anything_else(kfp: KfpApi, state: str, words: str) -> None:
    kfp.states = ["RUNNING", state]
    result = CliRunner().invoke(app, ["submit", "training", "--wait"])
    assert result.exit_code == 1
    assert f"ended as {state}: {words}" in result.stderr


def test_without_waiting_the_id_is_the_answer(kfp: KfpApi) -> None:
    result = CliRunner().invoke(app, ["submit", "training", "--json"])
    assert json.loads(result.stdout) == {"run_id": next(iter(kfp.runs))}
    assert kfp.looks == {}


def test_waiting_survives_an_api_that_is_away(kfp: KfpApi) -> None:
    kubeflow = Kubeflow.connect()
    kfp.states = ["RUNNING", "RUNNING", "SUCCEEDED"]
    kfp.experiments["e"] = {"experiment_id": "e", "display_name": "onerec"}
    kfp.runs["r"] = {"run_id": "r"}
    kfp.faults = [503, 500]
    states: list[str] = []
    assert kubeflow.wait("r", timeout=20, on_state=states.append).state == "SUCCEEDED"
    assert states == ["RUNNING", "SUCCEEDED"]
    kfp.states, kfp.faults = ["RUNNING"], [503] * 1000
    with pytest.raises(KubeflowError, match="answered 503"):
        kubeflow.wait("r", timeout=20, patience=0.1, on_state=states.append)


def test_waiting_ends(kfp: KfpApi) -> None:
    kfp.states = ["RUNNING"]
    result = CliRunner().invoke(app, ["submit", "training", "--wait", "--timeout", "1"])
    assert result.exit_code == 1
    assert "is RUNNING after 1 s" in result.stderr
    assert "it goes on" in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["submit", "deploy"], "there is no pipeline 'deploy'"),
        (["submit", "training", "policy=nightly"], "pipeline training has no policy"),
        (["submit", "training", "preset"], "preset is no argument"),
        (["submit", "training", "--profile", "tpu"], "profile 'tpu' is unknown"),
        (["submit", "training", "--profile", "gpu", "--gpus", "0"], "profile gpu needs at least 1 GPU"),
        (["submit", "training", "--gpus", "2"], "profile cpu has no GPUs"),
    ],
)
def test_bad_usage_submits_nothing(kfp: KfpApi, words: list[str], told: str) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert told in result.stderr
    assert kfp.headers == []


def test_without_an_endpoint_the_command_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEREC_KFP_ENDPOINT", raising=False)
    settings.cache_clear()
    result = CliRunner().invoke(app, ["submit", "training"])
    assert result.exit_code == 1
    assert "set ONEREC_KFP_ENDPOINT" in result.stderr


def test_the_token_of_the_pod_goes_along(kfp: KfpApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multi-user Kubeflow gives each pod a token for its namespace."""
    (tmp_path / "token").write_text("of-this-pod")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("ONEREC_KFP_NAMESPACE", "team-feeds")
    settings.cache_clear()
    Kubeflow.connect().recurring("onerec")
    assert [each["namespace"] for each in kfp.experiments.values()] == ["team-feeds"]
    assert all(headers["authorization"] == "Bearer of-this-pod" for headers in kfp.headers)
