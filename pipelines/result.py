"""The state of a running loop and what is told of it: per day, per run and at the end (``loop.json``)."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.intake import exposures as exposure_store
from features.runs import Run
from features.storage import Storage
from features.world.world import World
from monitoring import trial
from monitoring.experiment import Assignment, Interval, adjusted_difference, bootstrap_mean, paired_difference
from monitoring.outcome import read_records
from monitoring.report import INTERACTIONS
from pipelines.arms import ARMS, Arm
from pipelines.client import Client
from pipelines.days import Day
from pipelines.progress import Progress

COLD_EXPOSURES = 20
"""An item with fewer earlier exposures counts as cold."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and with whom; ``data`` is a folder of logs, None for the simulator."""

    days: int = 5
    drift_day: int = 2
    users: int = 900
    seed: int = 0
    data: Path | None = None
    scenario: str = ""
    """A scenario of the simulator; it brings its own days of change, and ``drift_day`` is when they are looked at."""
    num_items: int = 10
    beam_width: int = 64
    select: str = "stay"
    """How both OneRec arms choose among what the beam found (``models.serving.selection``)."""
    context_days: int = 21
    policy: str = "nightly"
    canary: str = ""
    """How a blessed candidate is tried on users first (``monitoring.trial.config_of``); empty: it is not."""
    preset: str = "tiny"
    overrides: str = "{}"
    command: str = "onerec loop"


@dataclass(kw_only=True)
class Loop:
    """The state of a running loop."""

    config: LoopConfig
    world: World
    storage: Storage
    client: Client
    progress: Progress
    prefix: str
    arms: dict[str, Arm] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    daily: list[dict[str, Any]] = field(default_factory=list)
    records: list[Day] = field(default_factory=list)

    @property
    def start(self) -> datetime:
        """Midnight of day 0."""
        return self.world.start()

    def midnight(self, day: int) -> datetime:
        """When ``day`` begins."""
        return self.start + timedelta(days=day)


def describe_run(run: Run, *, curves: bool = True) -> dict[str, Any]:
    """What a run decided and measured, from what its stages stored; ``why`` says why it published nothing.

    ``canary`` is what became of the canary that its model began, empty when there was none.
    """
    decision, trigger = _stored(run, "gate/decision.json"), _stored(run, "drift_decision/decision.json")
    drift = run.done("drift")
    published = run.done("publish")
    trained = [stage for stage in ("pretrain", "align") if run.done(stage)]
    evaluated, outcome = run.done("evaluate"), _stored(run, "outcome.json")
    refused = "; ".join(decision["failed"]) if decision else ""
    waited = trigger["reason"] if trigger and not trigger["retrain"] else ""
    return {
        "run_id": run.run_id,
        "pipeline": outcome["pipeline"] if outcome else "",
        "state": outcome["state"] if outcome else "",
        "drift": drift["summary"]["verdict"] if drift else "",
        "drift_report": drift["summary"] if drift else {},
        "recorded_at": outcome["recorded_at"] if outcome else "",
        "cost": outcome.get("cost", {}) if outcome else {},
        "retrained": bool(trained),
        "blessed": bool(decision and decision["blessed"]),
        "reasons": decision["failed"] if decision else [],
        "why": (outcome or {}).get("error") or refused or waited,
        "version": published["summary"]["version"] if published else None,
        "canary": _canary(run),
        "evaluation": evaluated["summary"] if evaluated else None,
        "curves": {stage: _curve(run, stage) for stage in trained} if curves else {},
    }


def _stored(run: Run, name: str) -> dict[str, Any] | None:
    key = f"runs/{run.run_id}/{name}"
    return run.storage.get_json(key) if run.storage.exists(key) else None


def _canary(run: Run) -> str:
    released = _stored(run, "released.json") or {}
    if not released.get("tried"):
        return ""
    ended = read_records(run.storage, released["version"]).get("canary")
    return str(ended["status"]) if ended else trial.RUNNING


def _curve(run: Run, stage: str, points: int = 200) -> dict[str, list[float]]:
    """Step and loss of a training stage, thinned to at most ``points``."""
    key = f"{run.prefix(stage)}/metrics.jsonl"
    if not run.storage.exists(key):
        return {"step": [], "loss": []}
    rows = [json.loads(line) for line in run.storage.get(key).decode().splitlines() if line]
    rows = [row for row in rows if "loss" in row]
    kept = rows[:: max(1, len(rows) // points)]
    return {"step": [row["step"] for row in kept], "loss": [row["loss"] for row in kept]}


def daily(
    loop: Loop, day: int, record: Day, assignment: Assignment, before: pa.Table, items: pa.Table
) -> dict[str, Any]:
    """What one day and the night after it brought; ``before`` are the exposures known when the day began."""
    seen = pc.value_counts(before["item_id"]).to_pylist()
    warm = {row["values"] for row in seen if row["counts"] >= COLD_EXPOSURES}
    members: dict[str, list[str]] = {arm: [block[arm] for block in assignment.blocks] for arm in ARMS}
    arms = {}
    for arm in ARMS:
        views, stay = record.views[arm], record.stay_minutes(arm)
        per_user = np.array([stay.get(user, 0.0) for user in members[arm]])
        arms[arm] = {
            "users": len(members[arm]),
            "active": len(record.visitors[arm]),
            "views": len(views),
            "stay": asdict(bootstrap_mean(per_user, samples=1000)),
            "stay_total": float(per_user.sum()),
            "lt7": _lt7(loop, day, arm, members[arm]),
            "cold_start_share": float(np.mean([v.item_id not in warm for v in views])) if views else 0.0,
            "items": len({view.item_id for view in views}),
            "versions": sorted(record.versions[arm]),
            **{name: sum(view.flags[name] for view in views) for name in INTERACTIONS},
        }
    run = loop.runs[-1]
    return {
        "day": day,
        "date": loop.midnight(day).date().isoformat(),
        "arms": arms,
        "requests": record.requests,
        "acked": record.acked,
        "illegal": record.illegal,
        "flags": dict(record.flags),
        "drifts": loop.world.drifts_on(day),
        "drift": run["drift_report"],
        "catalogue": items.num_rows,
    }


def _lt7(loop: Loop, day: int, arm: str, members: list[str]) -> float:
    """Mean over users of the days with a visit among the loop's last seven days."""
    window = loop.records[max(0, day - 6) : day + 1]
    return float(np.mean([sum(user in record.visitors[arm] for record in window) for user in members]))


def summarise(loop: Loop, assignment: Assignment) -> dict[str, Any]:
    """Everything the report and the benchmark need, as plain JSON values."""
    config = loop.config
    after = [d for d in range(config.days) if d > config.drift_day] or list(range(1, config.days))
    # Visits begun before the last midnight run on after it: their events are joined here, as the next night would.
    after_midnight = loop.midnight(config.days) + timedelta(days=1)
    exposure_store.compact(loop.storage, loop.midnight(config.days), after_midnight)
    stored = exposure_store.read(loop.storage, loop.start, after_midnight)
    comparisons = {
        "onerec_over_frozen": asdict(_compare(loop, assignment, "frozen", after)),
        "onerec_over_cascade": asdict(_compare(loop, assignment, "cascade", after)),
        # Day 0 is an A/A test of these two: one model serves both until the first night.
        "onerec_over_frozen_adjusted": asdict(
            adjusted_difference(assignment, _stay(loop, after), _stay(loop, [0]), "onerec", "frozen")
        ),
    }
    drifting = [d for d in loop.daily if d["drifts"]]
    detected = [d["day"] for d in loop.daily if d["drift"].get("verdict") == "drift"]
    return {
        "world": loop.world.name,
        "seed": config.seed,
        "days": config.days,
        "drift_day": config.drift_day,
        "select": config.select,
        "compared_days": after,
        "command": config.command,
        "hardware": hardware(),
        "arms": list(ARMS),
        "daily": loop.daily,
        "runs": loop.runs,
        "comparisons": comparisons,
        "canaries": [asdict(each) for each in trial.ended(loop.storage)],
        "totals": {
            "impressions_acked": sum(day["acked"] for day in loop.daily),
            "exposures_stored": stored.num_rows,
            "illegal_items_served": sum(day["illegal"] for day in loop.daily),
            "served_versions": len({v for day in loop.daily for v in day["arms"]["onerec"]["versions"]}),
            "retrained": sum(run["retrained"] for run in loop.runs[1:]),
            "drift_detected": bool(drifting) and any(d["day"] in detected for d in drifting),
            "drift_verdicts": {str(d["day"]): d["drift"].get("verdict", "") for d in loop.daily},
        },
    }


def _compare(loop: Loop, assignment: Assignment, rival: str, days: list[int]) -> Interval:
    """Paired difference of minutes a user a day over ``days``."""
    return paired_difference(assignment, _stay(loop, days), "onerec", rival)


def _stay(loop: Loop, days: list[int]) -> dict[str, float]:
    """user id -> minutes a day over ``days``; who never came is absent."""
    stay: dict[str, float] = {}
    for day in days:
        for arm in ARMS:
            for user, minutes in loop.records[day].stay_minutes(arm).items():
                stay[user] = stay.get(user, 0.0) + minutes / len(days)
    return stay


def hardware() -> str:
    """One line on the machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores, {model}"


def stay_of(result: Mapping[str, Any], arm: str) -> float:
    """Mean minutes a user a day over the compared days."""
    days = [d for d in result["daily"] if d["day"] in result["compared_days"]]
    return float(np.mean([day["arms"][arm]["stay"]["mean"] for day in days])) if days else float("nan")
