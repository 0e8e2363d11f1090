"""One day of the whole loop on real servers: users, events, features, pipelines, gate, swap, drift, report."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow.compute as pc
import pytest

from features.intake import exposures as exposure_store
from features.storage import Storage, connect
from features.world.simulator import Simulator, SimulatorConfig
from models.bundle import list_versions, read_alias, read_manifest
from monitoring import trial
from monitoring.trial import Trial, TrialConfig
from pipelines import loop, processes, stack
from pipelines.arms import RoutedArm, ServerArm
from pipelines.loop import LoopConfig, run_loop
from pipelines.progress import Progress
from pipelines.result import Loop

# 300 items among 512 semantic ids: a short training suffices for the gate to bless.
OVERRIDES = {"pretrain.epochs": 1, "pretrain.batch_requests": 16, "incremental.epochs": 1, "tokenizer.codes": 8}


def left(home: Path) -> list[psutil.Process]:
    """Live processes that were started for ``home``, this one apart."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            values = process.environ()
        except psutil.Error:
            continue
        ours = values.get("ONEREC_HOME") == str(home) or values.get(processes.MARKER, "").endswith(f"@{home}")
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.mark.timeout(900)
def test_the_loop_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulator(SimulatorConfig(users=60, items=300, history_days=3, drift_day=1))
    monkeypatch.setattr(loop, "build_world", lambda config, progress: world)
    home, output = (tmp_path / "home").resolve(), tmp_path / "out"
    # Trained in the steps' own processes: Ray Train has tests of its own, and each of its starts costs many seconds.
    with stack.running(home, ["server", "collector"]):
        result = run_loop(LoopConfig(days=1, users=60, drift_day=1, overrides=json.dumps(OVERRIDES)), output)
        ports = [port for entry in stack.entries(home).values() for port in entry.ports.values()]
        version, storage = read_alias(connect(), "production"), connect()
        assert version in list_versions(storage)
        assert version is not None
        assert stack.models(home)["onerec"].version == version
        first = next(run["version"] for run in result["runs"] if run["label"] == "initial")
        assert stack.models(home)["onerec-frozen"].version == read_alias(storage, "frozen") == first
        assert version == first or read_manifest(storage, version)["parents"] == [first]
        stored = exposure_store.read(storage, world.start(), world.start().replace(year=2100))

    totals = result["totals"]
    assert totals["impressions_acked"] == totals["exposures_stored"] == stored.num_rows > 0
    assert totals["illegal_items_served"] == 0
    assert totals["served_versions"] >= 1
    assert {"stable", "drift", "insufficient data"}.issuperset(totals["drift_verdicts"].values())
    assert list(totals["drift_verdicts"]) == ["0"]
    onerec = stored.filter(pc.equal(stored["source"], "onerec")).to_pylist()
    assert onerec
    assert all(row["model_version"] == first and row["sid"] and row["log_probs"] for row in onerec)

    assert json.loads((output / "loop.json").read_text())["totals"]["illegal_items_served"] == 0
    report = (output / "report.html").read_text()
    assert first in report
    assert not re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?(?!data:)|<link[^>]+href=[\"']?(?!data:)", report)

    assert stack.entries(home) == {}
    assert left(home) == []
    assert [port for port in ports if not processes.is_free(port)] == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_canary_meets_people_and_the_loop_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate is put behind the router by a night, answers its share of a day, and goes or stays the night after.

    Which of the two is a matter of what few people do; that it happened to the right model is what is tested.
    """
    world = Simulator(SimulatorConfig(users=120, items=300, history_days=3, drift_day=0))
    monkeypatch.setattr(loop, "build_world", lambda config, progress: world)
    home = (tmp_path / "home").resolve()
    config = LoopConfig(
        days=2,
        users=120,
        drift_day=0,
        policy='{"when": "nightly", "budget_runs": 1}',
        canary='{"share": 0.5, "looks": 1, "minimum_users": 3}',
        overrides=json.dumps(OVERRIDES),
    )
    with stack.running(home, ["server", "collector"]):
        result = run_loop(config, tmp_path / "out")
        production, candidate = (read_alias(connect(), alias) for alias in ("production", "candidate"))
        assert trial.read(connect()) is None
    first, tried = (run["version"] for run in result["runs"][:2])
    (canary,) = result["canaries"]
    assert (canary["version"], canary["stable"]) == (tried, first)
    assert [day["arms"]["onerec"]["versions"] for day in result["daily"]] == [[first], sorted([first, tried])]
    assert all(day["arms"]["frozen"]["versions"] == [first] for day in result["daily"])
    (look,) = canary["looks"]
    assert all(arm["users"] >= 3 for arm in look["figures"]["stay_seconds"].values())
    assert canary["status"] == (trial.PROMOTED if look["action"] == "promote" else trial.ROLLED_BACK)
    assert production == (tried if look["action"] == "promote" else first)
    assert candidate is None
    assert [run["retrained"] for run in result["runs"]] == [True, True, False]


def test_while_a_canary_is_under_way_its_split_routes_the_retrained_arm(s3: Storage) -> None:
    """And only then; the candidate is waited for, so that nobody is answered by production in its place."""
    waited = []
    client = SimpleNamespace(wait_for_version=lambda model, version: waited.append((model, version)))
    config, world = LoopConfig(), Simulator(SimulatorConfig(users=6, items=100, history_days=1))
    playing = Loop(config=config, world=world, storage=s3, client=client, progress=Progress(), prefix="p")  # type: ignore[arg-type]
    loop._route(playing)
    assert isinstance(playing.arms["onerec"], ServerArm)
    trying = Trial(version="v2", stable="v1", started="2026-01-02", unit="user", config=TrialConfig(share=0.4))
    s3.put_json(trial.OPEN, asdict(trying))
    loop._route(playing)
    router = playing.arms["onerec"]
    assert isinstance(router, RoutedArm)
    assert router.split == trying.split
    assert [arm.model for arm in (router.stable, router.canary)] == ["onerec", "onerec-candidate"]
    assert waited == [("onerec-candidate", "v2")]
    s3.remove(trial.OPEN)
    loop._route(playing)
    assert isinstance(playing.arms["onerec"], ServerArm)
