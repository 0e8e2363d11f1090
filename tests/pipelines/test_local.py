"""Pipelines as the platform runs them on one machine: in a child, task by task, with everything said in a log."""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from features.runs import Run
from features.settings import Settings
from features.storage import connect
from features.world.simulator import Simulator, SimulatorConfig
from pipelines.ingest import ingest
from pipelines.local import PipelineFailed, run

WINDOW = {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-02T00:00:00+00:00"}


def processes_of(run_id: str) -> list[psutil.Process]:
    """Live processes that were told to work on ``run_id``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        if run_id in command and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(process)
    return found


def test_a_failing_pipeline_says_why_and_where(environment: Settings, tmp_path: Path) -> None:
    """An empty bucket: the first task fails, nothing after it runs, and the message holds its reason."""
    tasks: list[str] = []
    log = tmp_path / "logs/run.log"
    with pytest.raises(PipelineFailed) as failure:
        run("training", {"run_id": "run-empty", **WINDOW}, log, tasks.append)
    assert tasks == ["prepare-data", "record-outcome"]
    message = str(failure.value)
    assert "'training' failed in task 'prepare-data': " in message
    assert "EmptyWindow: no exposure lies in [2026-01-01T00:00:00+00:00, 2026-01-02" in message
    assert str(log) in message
    outcome = connect().get_json("runs/run-empty/outcome.json")
    assert (outcome["state"], outcome["stages"]) == ("FAILED", [])
    whole = log.read_text()
    assert "Running pipeline: 'onerec-training'" in whole
    assert "Traceback (most recent call last)" in whole
    assert "\x1b" not in whole


def test_a_quiet_night_ends_well_without_training(environment: Settings, tmp_path: Path) -> None:
    """Too few new exposures to judge: the branch of the real pipeline that trains and publishes is not taken."""
    world = Simulator(SimulatorConfig(users=20, items=100, history_days=3))
    ingest(world.history(), connect(), environment.home)
    midnights = [(world.start() - timedelta(days=days)).isoformat() for days in (3, 2, 1, 0)]
    arguments = dict(zip(("start", "reference_start", "current_start", "end"), midnights, strict=True))
    tasks: list[str] = []
    run("retraining", {"run_id": "quiet", "base": "", **arguments}, tmp_path / "log", tasks.append)
    assert sorted(tasks) == ["detect-drift", "prepare-window", "record-outcome", "should-retrain"]
    outcome = connect().get_json("runs/quiet/outcome.json")
    assert (outcome["state"], outcome["pipeline"], outcome["version"]) == ("SUCCEEDED", "retraining", None)
    assert Run(connect(), "quiet").summary("drift")["verdict"] == "insufficient data"
    assert "finished with status SUCCESS" in (tmp_path / "log").read_text().splitlines()[-1]


def test_wrong_arguments_fail_before_any_task(tmp_path: Path) -> None:
    tasks: list[str] = []
    with pytest.raises(PipelineFailed, match=r"in task 'none': TypeError: .*got an unexpected keyword argument.*days"):
        run("training", {**WINDOW, "days": "3"}, tmp_path / "log", tasks.append)
    assert tasks == []


def test_giving_up_ends_the_task_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store that accepts and never answers keeps the first task waiting; then the caller is interrupted."""
    run_id = f"run-interrupted-{os.getpid()}"

    def interrupt(task: str) -> None:
        deadline = time.monotonic() + 30
        while not any("executor_main" in " ".join(process.cmdline()) for process in processes_of(run_id)):
            assert time.monotonic() < deadline, f"{task} did not start"
            time.sleep(0.05)
        raise KeyboardInterrupt

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("ONEREC_S3_ENDPOINT", f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
        (tmp_path / "scratch").mkdir()
        with pytest.raises(KeyboardInterrupt):
            run("training", {"run_id": run_id, **WINDOW}, tmp_path / "log", interrupt)
        _, left = psutil.wait_procs(processes_of(run_id), timeout=5)
    assert left == []
    assert list((tmp_path / "scratch").glob("onerec-kfp-*")) == []
