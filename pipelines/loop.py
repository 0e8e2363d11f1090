"""``onerec loop``: the platform lives through simulated days, on real servers, and the days are written down.

Day by day users ask the model server over HTTP, watch, and their events go to the collector; each night the
retraining pipeline measures drift, trains, gates and swaps the served model. Three arms of matched users compare
OneRec retrained nightly, OneRec frozen at day 1 and a retrained cascade. The result is ``loop.json``, from which
``monitoring.report`` draws the page; every night leaves a daily report beside it (``monitoring.daily``).
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from features import catalog
from features.datasets import load
from features.intake import exposures as exposure_store
from features.runs import Run
from features.settings import settings
from features.storage import connect
from features.world.simulator import Simulator, SimulatorConfig, world_hash
from features.world.usermodel import UserModel, UserModelConfig
from features.world.world import World
from models.bundle import read_alias, set_alias
from models.cascade import Cascade
from models.deltas import catch_up_served
from monitoring import trial
from monitoring.daily import write_day
from monitoring.experiment import Assignment, assign
from monitoring.report import write
from pipelines.arms import ARMS, CANDIDATE, MODELS, CascadeArm, RoutedArm, ServerArm
from pipelines.client import Client
from pipelines.days import DayConfig, play_day
from pipelines.ingest import ingest
from pipelines.local import run as run_pipeline
from pipelines.progress import Progress
from pipelines.result import Loop, LoopConfig, daily, describe_run, summarise


class HomeInUse(RuntimeError):
    """The home folder holds another loop's data."""

    hint = "give --fresh to remove that data and begin anew, or another folder with --home"


class NoFirstModel(RuntimeError):
    """The gate refused the first model: there is nothing to serve."""

    hint = "give a longer log or more users, or train longer: --overrides '{\"pretrain.epochs\": 10}'"


def run_loop(config: LoopConfig, output: Path) -> dict[str, Any]:
    """Plays the whole loop against the running stack; returns the result and writes JSON and report to ``output``."""
    if config.days < 1:
        raise ValueError(f"the loop was asked to run {config.days} days; give at least 1")
    progress = Progress()
    world = build_world(config, progress)
    storage = connect()
    storage.ensure_bucket()
    if any(True for _ in storage.keys(f"{exposure_store.ROOT}/")):
        raise HomeInUse(
            f"{settings().home} already holds exposures; a loop needs a home of its own, "
            "or its days would mix with them"
        )
    current = settings()
    client = Client(current.server_url, current.collector_url, current.client_token.get_secret_value())
    prefix = f"loop{config.seed}-{datetime.now(UTC):%Y%m%d%H%M%S}"
    with client:
        loop = Loop(config=config, world=world, storage=storage, client=client, progress=progress, prefix=prefix)
        assignment = _begin(loop)
        for day in range(config.days):
            _day(loop, day, assignment)
            date = loop.midnight(day).date()
            write_day(storage, date, output / "days" / f"{date}.html")
        result = summarise(loop, assignment)
        if config.data is None:
            result |= {"scenario": config.scenario or None, "world_hash": world_hash(simulated(config))}
    output.mkdir(parents=True, exist_ok=True)
    (output / "loop.json").write_text(json.dumps(result, indent=1, default=str))
    write(result, output / "report.html")
    return result


def build_world(config: LoopConfig, progress: Progress) -> World:
    """The simulator, or a user model fitted on the log in ``config.data``."""
    if config.data is None:
        with progress.step("building the simulated world"):
            return Simulator(simulated(config))
    with progress.step(f"reading {config.data} and fitting a user model on it"):
        dataset = load(config.data)
        return UserModel.fit(dataset, UserModelConfig(users=config.users, drift_day=config.drift_day, seed=config.seed))


def simulated(config: LoopConfig) -> SimulatorConfig:
    """The simulated world of a loop: the scenario's, or one whose tastes change on ``config.drift_day``."""
    if config.scenario:
        return SimulatorConfig.scenario(config.scenario, users=config.users, seed=config.seed)
    return SimulatorConfig(users=config.users, drift_day=config.drift_day, seed=config.seed)


def _begin(loop: Loop) -> Assignment:
    """Ingests the history, trains the first model, assigns the arms."""
    config, dataset = loop.config, loop.world.history()
    with loop.progress.step(f"ingesting {dataset.exposures.num_rows:,} exposures ({loop.world.name})"):
        ingest(dataset, loop.storage, settings().home)
    first = dataset.exposures["event_time"][0].as_py()
    arguments = {
        "run_id": f"{loop.prefix}-initial",
        "start": first.isoformat(),
        "end": loop.start.isoformat(),
        "preset": config.preset,
        "overrides": config.overrides,
    }
    _pipeline(loop, "training", "initial", arguments)
    version = read_alias(loop.storage, "production")
    if version is None:
        reasons = "; ".join(loop.runs[-1]["reasons"])
        raise NoFirstModel(f"the first model was not blessed ({reasons}); the loop cannot start without one")
    set_alias(loop.storage, "frozen", version)
    for model in MODELS.values():
        loop.client.wait_for_version(model, version)
    before = _stay_before(dataset.exposures)
    people = set(loop.world.population())
    assignment = assign({user: before.get(user, 0.0) for user in people}, ARMS, salt=str(config.seed))
    cascade = Cascade.fit(dataset.exposures, dataset.items, now_ms=int(loop.start.timestamp() * 1000))
    loop.arms = {
        **{arm: _served_by(loop, model) for arm, model in MODELS.items()},
        "cascade": CascadeArm(cascade=cascade),
    }
    return assignment


def _served_by(loop: Loop, model: str) -> ServerArm:
    return ServerArm(client=loop.client, model=model, beam_width=loop.config.beam_width, select=loop.config.select)


def _route(loop: Loop) -> None:
    """Before a day: production answers the retrained arm, or it and the candidate of the canary under way do."""
    stable, trying = _served_by(loop, MODELS["onerec"]), trial.read(loop.storage)
    loop.arms["onerec"] = stable
    if trying is not None:
        loop.client.wait_for_version(CANDIDATE, trying.version)
        loop.arms["onerec"] = RoutedArm(stable=stable, canary=_served_by(loop, CANDIDATE), split=trying.split)


def _stay_before(exposures: pa.Table) -> dict[str, float]:
    """user id -> minutes watched in the history: what users are matched on."""
    total = pa.table({"user": exposures["user_id"], "play": exposures["play_ms"]}).group_by("user")
    table = total.aggregate([("play", "sum")])
    return dict(zip(table["user"].to_pylist(), (v / 60_000 for v in table["play_sum"].to_pylist()), strict=True))


def _day(loop: Loop, day: int, assignment: Assignment) -> None:
    arrivals = loop.world.new_items(day)
    if arrivals.num_rows:
        catalog.append_items(loop.storage, arrivals)
        if loop.config.scenario:  # what scenarios are about is the platform's answer: uploads are servable at once
            catch_up_served(loop.storage, settings().home / "bundles")
    items = catalog.read_items(loop.storage)
    durations = dict(zip(items["item_id"].to_pylist(), items["duration_ms"].to_pylist(), strict=True))
    cascade = loop.arms["cascade"]
    assert isinstance(cascade, CascadeArm)
    if arrivals.num_rows:
        cascade.cascade.add_items(arrivals)
    config = DayConfig(num_items=loop.config.num_items, prefix=loop.prefix)
    _route(loop)
    with loop.progress.step(f"day {day}: users browse") as bar:
        record = play_day(loop.world, day, loop.arms, assignment.arm_of(), loop.client, durations, config, bar.update)
    loop.records.append(record)
    exposures_before = exposure_store.read(
        loop.storage, loop.midnight(day - loop.config.context_days), loop.midnight(day)
    )
    _night(loop, day)
    loop.daily.append(daily(loop, day, record, assignment, exposures_before, items))


def _night(loop: Loop, day: int) -> None:
    base = read_alias(loop.storage, "production")
    arguments = {
        "run_id": f"{loop.prefix}-night{day}",
        "start": loop.midnight(day + 1 - loop.config.context_days).isoformat(),
        "reference_start": loop.midnight(day - 2).isoformat(),
        "current_start": loop.midnight(day).isoformat(),
        "end": loop.midnight(day + 1).isoformat(),
        "base": "production",  # followed after the look at the canary, which may have moved it
        "policy": loop.config.policy,
        "canary": loop.config.canary,
        "preset": loop.config.preset,
        "overrides": loop.config.overrides,
    }
    _pipeline(loop, "retraining", f"night {day}", arguments)
    version = read_alias(loop.storage, "production")
    if version is not None and version != base:
        loop.client.wait_for_version(MODELS["onerec"], version)
    cascade = loop.arms["cascade"]
    assert isinstance(cascade, CascadeArm)
    with loop.progress.step(f"night {day}: cascade refit"):
        window = exposure_store.read(
            loop.storage, loop.midnight(day + 1 - loop.config.context_days), loop.midnight(day + 1)
        )
        cascade.refit(window, catalog.read_items(loop.storage), loop.midnight(day + 1))


def _pipeline(loop: Loop, name: str, label: str, arguments: dict[str, str]) -> None:
    """Runs a pipeline and notes what became of it."""
    began = time.monotonic()
    log = settings().home / "logs" / f"{arguments['run_id']}.log"
    with loop.progress.step(f"{label}: {name}") as bar:
        run_pipeline(name, arguments, log, bar.note)
    loop.runs.append(
        {"label": label, "seconds": time.monotonic() - began, **describe_run(Run(loop.storage, arguments["run_id"]))}
    )
