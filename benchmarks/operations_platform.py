"""The real platform for operational scenarios: local services, a first model, days and nights played on it.

A home folder is built (services up, history ingested, the training pipeline run through ``kfp.local``) and kept aside;
every scenario begins from that copy, at the same path, in a world of its own that shares the history. Users ask the
model server over HTTP, their events go to the collector, nights run the retraining pipeline. A third of the users meet
the cascade, refitted each night: the gate judges candidates on requests that another policy answered.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from features import catalog
from features.intake import exposures as exposure_store
from features.runs import Run
from features.settings import settings
from features.storage import Storage, connect
from features.world.simulator import Simulator, SimulatorConfig
from models.bundle import read_alias
from models.cascade import Cascade
from models.deltas import catch_up_served
from monitoring import trial, trigger
from monitoring.drift import DriftReport, measure
from pipelines import stack
from pipelines.arms import CANDIDATE, Arm, CascadeArm, RoutedArm, ServerArm
from pipelines.client import Client
from pipelines.days import Day, DayConfig, play_day
from pipelines.ingest import ingest
from pipelines.local import run as run_pipeline
from pipelines.progress import Progress
from pipelines.result import describe_run

SERVICES = ("server", "collector")
BEAM, ITEMS_A_REQUEST, CONTEXT_DAYS = 32, 10, 21
CASCADE_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the world is and how short the training; small, so that a week fits into minutes."""

    users: int = 600
    items: int = 1500
    new_items_per_day: int = 100
    """About as many as people use up: with less supply lists grow stale, and a quiet week is none."""
    history_days: int = 8
    overrides: str = "{}"
    seed: int = 0

    def world(self, **changes: Any) -> Simulator:
        """The world of a scenario: one history for all, whatever happens from day 0 on."""
        names = ("users", "items", "new_items_per_day", "history_days", "seed")
        common = {name: getattr(self, name) for name in names}
        return Simulator(SimulatorConfig(**{"drift_day": None, **common, **changes}))


@dataclass(kw_only=True)
class Session:
    """A running platform in a scenario's world; days are numbered from the first after the history."""

    home: Path
    world: Simulator
    storage: Storage
    client: Client
    progress: Progress
    size: Size
    name: str
    cascade: CascadeArm
    days: dict[int, Day] = field(default_factory=dict)

    def midnight(self, day: int) -> datetime:
        """When ``day`` begins."""
        return self.world.start() + timedelta(days=day)

    @property
    def arm_of(self) -> dict[str, str]:
        """user -> who answers."""
        return {user: "cascade" if _hash(user) < CASCADE_SHARE else "onerec" for user in self.world.population()}

    def production(self) -> str:
        """The version in production."""
        version = read_alias(self.storage, "production")
        assert version is not None, "a session begins with a model"
        return version

    def play(self, day: int) -> Day:
        """A day of users on the real servers, new items in the morning; in the evening its events are joined."""
        arrivals = self.world.new_items(day)
        if arrivals.num_rows:
            catalog.append_items(self.storage, arrivals)
            catch_up_served(self.storage, self.home / "bundles")
            self.cascade.cascade.add_items(arrivals)
        items = catalog.read_items(self.storage)
        durations = dict(zip(items["item_id"].to_pylist(), items["duration_ms"].to_pylist(), strict=True))
        arms: dict[str, Arm] = {"onerec": self._onerec(), "cascade": self.cascade}
        config = DayConfig(num_items=ITEMS_A_REQUEST, prefix=self.name)
        with self.progress.step(f"{self.name}, day {day}: users browse") as bar:
            self.days[day] = play_day(self.world, day, arms, self.arm_of, self.client, durations, config, bar.update)
        exposure_store.compact(self.storage, self.midnight(day), self.midnight(day + 1))
        return self.days[day]

    def _onerec(self) -> Arm:
        """Production, and the candidate for its share while a canary is under way."""
        stable = ServerArm(client=self.client, model="onerec", beam_width=BEAM)
        trying = trial.read(self.storage)
        if trying is None:
            return stable
        self.client.wait_for_version(CANDIDATE, trying.version)
        canary = ServerArm(client=self.client, model=CANDIDATE, beam_width=BEAM)
        return RoutedArm(stable=stable, canary=canary, split=trying.split)

    def stay(self, day: int) -> float:
        """Minutes watched on ``day`` by the users of OneRec, a user."""
        people = sum(arm == "onerec" for arm in self.arm_of.values())
        return sum(self.days[day].stay_minutes("onerec").values()) / people

    def night(self, day: int, policy: str, *, run_id: str = "", **arguments: str) -> dict[str, Any]:
        """The retraining pipeline after ``day``; waits until the server follows; raises PipelineFailed."""
        base, run_id = self.production(), run_id or f"{self.name}-night{day}"
        given = {
            "run_id": run_id,
            "start": self.midnight(day + 1 - CONTEXT_DAYS).isoformat(),
            "reference_start": self.midnight(day - 2).isoformat(),
            "current_start": self.midnight(day).isoformat(),
            "end": self.midnight(day + 1).isoformat(),
            "base": base,
            "policy": policy,
            "overrides": self.size.overrides,
            **arguments,
        }
        with self.progress.step(f"{self.name}, night {day}: retraining") as bar:
            run_pipeline("retraining", given, self.home / "logs" / f"{run_id}.log", bar.note)
        if self.production() != base:
            self.client.wait_for_version("onerec", self.production())
        told = describe_run(Run(self.storage, run_id))
        told["decision"] = self.storage.get_json(f"runs/{run_id}/drift_decision/decision.json")
        return {key: value for key, value in told.items() if key != "curves"}

    def refit_cascade(self, day: int) -> None:
        """The cascade's own night."""
        window = exposure_store.read(self.storage, self.midnight(day + 1 - CONTEXT_DAYS), self.midnight(day + 1))
        self.cascade.refit(window, catalog.read_items(self.storage), self.midnight(day + 1))

    def look(self, day: int, policy: str) -> tuple[DriftReport, dict[str, Any]]:
        """A night without the pipeline's processes: the same drift measurement, data gate and trigger, in here."""
        start, current, end = self.midnight(day - 2), self.midnight(day), self.midnight(day + 1)
        rows = exposure_store.read(self.storage, self.midnight(day - CONTEXT_DAYS), end)
        time = rows["event_time"]
        first, split = (pa.scalar(moment, time.type) for moment in (start, current))
        report = measure(
            rows.filter(pc.and_(pc.greater_equal(time, first), pc.less(time, split))),
            rows.filter(pc.greater_equal(time, split)),
            catalog.read_items(self.storage),
            before=rows.filter(pc.less(time, first)),
        )
        told = {key: value for key, value in asdict(report).items() if key != "html"}
        summary = {**json.loads(json.dumps(told, default=str)), "window_end": end.isoformat()}
        run_id = f"{self.name}-look{day}"
        return report, trigger.decide_once(self.storage, run_id, trigger.parse(policy), summary)


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The folder in which the platform is built once and every scenario runs."""

    folder: Path
    size: Size

    @property
    def home(self) -> Path:
        """Where the platform lives: at one path always, since what it stores names paths."""
        return (self.folder / "home").resolve()

    def build(self, progress: Progress) -> None:
        """Ingests the history and trains the first model, unless that was done; raises RuntimeError when refused."""
        if (self.folder / "built").exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        world = self.size.world()
        with stack.running(self.home, SERVICES):
            storage = connect()
            storage.ensure_bucket()
            dataset = world.history()
            with progress.step(f"ingesting {dataset.exposures.num_rows:,} exposures"):
                ingest(dataset, storage, settings().home)
            arguments = {
                "run_id": "first",
                "start": dataset.exposures["event_time"][0].as_py().isoformat(),
                "end": world.start().isoformat(),
                "overrides": self.size.overrides,
            }
            with progress.step("the first model: training") as bar:
                run_pipeline("training", arguments, self.home / "logs" / "first.log", bar.note)
            if read_alias(storage, "production") is None:
                reasons = "; ".join(describe_run(Run(storage, "first"))["reasons"])
                raise RuntimeError(f"the first model was refused: {reasons}; train longer with other overrides")
        shutil.copytree(self.home, self.folder / "kept", symlinks=True)
        (self.folder / "built").write_text(datetime.now(UTC).isoformat())

    @contextmanager
    def session(self, name: str, progress: Progress, **world: Any) -> Iterator[Session]:
        """The platform as it was when the first model went into service, in the world of a scenario."""
        stack.down(self.home)
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.folder / "kept", self.home, symlinks=True)
        chosen = self.size.world(**world)
        with stack.running(self.home, SERVICES):
            current, storage = settings(), connect()
            history = chosen.history()
            cascade = Cascade.fit(history.exposures, history.items, now_ms=int(chosen.start().timestamp() * 1000))
            token = current.client_token.get_secret_value()
            with Client(current.server_url, current.collector_url, token) as client:
                session = Session(
                    home=self.home,
                    world=chosen,
                    storage=storage,
                    client=client,
                    progress=progress,
                    size=self.size,
                    name=name,
                    cascade=CascadeArm(cascade=cascade),
                )
                client.wait_for_version("onerec", session.production())
                yield session


def outcome(checks: Sequence[tuple[bool, str]]) -> str:
    """ "passed", or what went wrong."""
    wrong = [sentence for passed, sentence in checks if not passed]
    return f"failed: {'; '.join(wrong)}" if wrong else "passed"


def _hash(user: str) -> float:
    """Stable and uniform in [0, 1)."""
    return int.from_bytes(blake2b(f"operations\x1f{user}".encode(), digest_size=8).digest(), "little") / 2**64
