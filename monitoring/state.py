"""Where the loop stands, read from object storage alone: runs, training, drift, the gate, aliases, newest impressions.

Pipelines are jobs: no process of theirs lives long enough to be scraped, and what they decided is stored anyway
(``features.runs``, ``monitoring.outcome``). A run killed with its exit handler leaves no word; it shows as one that
neither ends nor moves. A process that reads again and again keeps ``Runs``: what ended well is not listed twice. Left
out: runs of the orchestrator that stored nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from features.intake.partitions import events_root
from features.storage import ObjectMissing, Storage

BUNDLES = "models/onerec"
TRAININGS = ("pretrain", "align")
GATE, DECISION, END = "gate/decision.json", "drift_decision/decision.json", "outcome.json"
OUTCOMES = ("published", "refused", "not_needed", "failed")
LOOK_BACK_DAYS = 7
"""How far back the newest impressions are looked for."""
LOOK_BACK_RUNS = 50
"""How many of the newest runs are looked into."""


@dataclass(frozen=True, kw_only=True)
class RunTimes:
    """One run: when each of its objects was stored, by name inside the run."""

    run_id: str
    times: Mapping[str, datetime]

    @property
    def started(self) -> datetime:
        """When its first object was stored."""
        return min(self.times.values())

    @property
    def progress(self) -> datetime:
        """When its last object was stored."""
        return max(self.times.values())


@dataclass(frozen=True, kw_only=True)
class State:
    """What the exporter tells; absent where nothing is known."""

    newest: RunTimes | None = None
    open: bool = False
    """Whether the newest run has not ended yet."""
    finished: Mapping[str, datetime] = field(default_factory=dict)
    """Outcome: when a run last ended so."""
    stages: Mapping[str, datetime] = field(default_factory=dict)
    """Stage: when one last finished."""
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stage: summary of the newest finished training."""
    drift: Mapping[str, Any] = field(default_factory=dict)
    """Summary of the newest drift stage (``monitoring.drift.DriftReport``)."""
    blessed: bool | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Alias: version, set_at and, when the bundle is complete, data_time."""
    impressions_until: datetime | None = None


class Runs:
    """The runs of a bucket; those that ended well are remembered, since nothing of theirs changes any more.

    The newest run is always looked at again: a run resumed under other inputs is the newest.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._settled: dict[str, tuple[RunTimes, str, datetime | None]] = {}

    def read(self) -> list[tuple[RunTimes, str, datetime | None]]:
        """(times, outcome, when) of the newest runs, the oldest first; outcome as ``_outcome`` says."""
        ids = self._storage.folders("runs/")
        newest = max(self._settled.values(), key=lambda each: each[0].progress, default=None)
        known = {run_id: each for run_id, each in self._settled.items() if newest is None or each is not newest}
        found = [known.get(run_id) or self._look(run_id) for run_id in ids]
        kept = sorted((each for each in found if each), key=lambda each: each[0].started)
        self._settled = {run.run_id: (run, outcome, time) for run, outcome, time in kept if _settled(run, outcome)}
        return kept[-LOOK_BACK_RUNS:]

    def _look(self, run_id: str) -> tuple[RunTimes, str, datetime | None] | None:
        prefix = f"runs/{run_id}/"
        times = {key.removeprefix(prefix): time for key, _, time in self._storage.objects(prefix)}
        if not times:  # removed meanwhile
            return None
        run = RunTimes(run_id=run_id, times=times)
        return (run, *_outcome(self._storage, run))


def _settled(run: RunTimes, outcome: str) -> bool:
    return END in run.times and outcome not in ("", "failed")


def read_state(storage: Storage, now: datetime, known: Runs | None = None) -> State:
    """Reads everything; raises StorageUnavailable. ``known`` is kept from one reading to the next."""
    looked = (known or Runs(storage)).read()
    runs = [run for run, _, _ in looked]
    ends = {run.run_id: (outcome, time) for run, outcome, time in looked}
    finished: dict[str, datetime] = {}
    for run in runs:
        outcome, time = ends[run.run_id]
        if outcome and time:
            finished[outcome] = max(time, finished.get(outcome, time))
    gate = _newest(storage, runs, GATE)
    return State(
        newest=runs[-1] if runs else None,
        open=bool(runs) and not ends[runs[-1].run_id][0],
        finished=finished,
        stages=_stages(runs),
        trainings={stage: found for stage in TRAININGS if (found := _summary(storage, runs, stage))},
        drift=_summary(storage, runs, "drift"),
        blessed=bool(gate["blessed"]) if gate else None,
        evaluation=_summary(storage, runs, "evaluate"),
        aliases=_aliases(storage),
        impressions_until=_impressions_until(storage, now),
    )


def _outcome(storage: Storage, run: RunTimes) -> tuple[str, datetime | None]:
    """How the run ended, and when; ("", None) while it has not."""
    if (time := run.times.get("publish/done.json")) is not None:
        return "published", time
    for name, outcome, good in ((GATE, "refused", "blessed"), (DECISION, "not_needed", "retrain")):
        if name in run.times and not storage.get_json(f"runs/{run.run_id}/{name}")[good]:
            return outcome, run.times[name]
    # Something newer than the record of a failure: the run is being resumed.
    if END in run.times and run.times[END] == run.progress:
        state = storage.get_json(f"runs/{run.run_id}/{END}")["state"]
        return ("failed", run.times[END]) if state != "SUCCEEDED" else ("", None)
    return "", None


def _stages(runs: list[RunTimes]) -> dict[str, datetime]:
    latest: dict[str, datetime] = {}
    for run in runs:
        for name, time in run.times.items():
            stage, _, rest = name.partition("/")
            if rest == "done.json":
                latest[stage] = max(time, latest.get(stage, time))
    return latest


def _newest(storage: Storage, runs: list[RunTimes], name: str) -> dict[str, Any]:
    """The object ``name`` of the run that stored it last; empty when none did or it was removed meanwhile."""
    having = [run for run in runs if name in run.times]
    if not having:
        return {}
    newest = max(having, key=lambda run: run.times[name])
    try:
        record: dict[str, Any] = storage.get_json(f"runs/{newest.run_id}/{name}")
    except ObjectMissing:
        return {}
    return record


def _summary(storage: Storage, runs: list[RunTimes], stage: str) -> dict[str, Any]:
    summary: dict[str, Any] = _newest(storage, runs, f"{stage}/done.json").get("summary", {})
    return summary


def _aliases(storage: Storage) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    prefix = f"{BUNDLES}/aliases/"
    for key in storage.keys(prefix):
        alias = storage.get_json(key)
        try:
            manifest = storage.get_json(f"{BUNDLES}/{alias['version']}/manifest.json")
        except ObjectMissing:
            manifest = {}
        found[key.removeprefix(prefix).removesuffix(".json")] = {**alias, "data_time": manifest.get("data_time")}
    return found


def _impressions_until(storage: Storage, now: datetime) -> datetime | None:
    """End of the newest hour that has impressions, of the last days up to tomorrow (clocks differ)."""
    root = events_root("impression")
    for days in range(-1, LOOK_BACK_DAYS):
        date = (now.astimezone(UTC) - timedelta(days=days)).date()
        hours = [key.split("hour=")[1][:2] for key in storage.keys(f"{root}/date={date}/") if "hour=" in key]
        if hours:
            midnight = datetime(date.year, date.month, date.day, tzinfo=UTC)
            return midnight + timedelta(hours=int(max(hours)) + 1)
    return None
