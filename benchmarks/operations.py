"""Does the platform run itself? Weeks of simulated trouble, each with the end it must have.

``python -m benchmarks.operations [--quick] [--output DIR]``. End to end, on real local services with pipelines through
``kfp.local``: quiet weeks, a drift of tastes, a day of bots, feedback that comes late, an S3 that dies while a bundle
is published, spoilt candidates, one that the canary alone must stop and one that it must promote. On simulated
exposures with the real gate, canary, drift detector and trigger: twenty seeds each of a bad and a good candidate, and
quiet nights of organic traffic. Nights of the quiet weeks measure drift and ask the trigger in this process, without
the pipeline's: what decides is the same code. Finished scenarios are kept in ``--output``; a killed run goes on after
them.
"""

import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import operations_scenarios as scenarios
from benchmarks import operations_trials as trials
from benchmarks.harness import finish, kept, table
from benchmarks.operations_log import quiet as quiet_log
from benchmarks.operations_platform import Platform, Size, outcome
from benchmarks.operations_trials import TrialSize
from pipelines.progress import Progress

SHORT = {
    "pretrain.epochs": 3,
    "incremental.epochs": 3,
    "incremental.max_steps": 300,
    "tokenizer.codes": 32,
    "align.max_steps": 60,
    "reward.max_steps": 60,
}
"""A short training: the scenarios are about operation, not about the best model."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is played."""

    size: Size = field(default_factory=lambda: Size(overrides=json.dumps(SHORT)))
    trials: TrialSize = field(default_factory=TrialSize)
    log_worlds: int = 3
    """Worlds whose organic logs are judged night by night."""
    log_users: int = 900
    quiet_days: int = 14
    drift_days: int = 8
    """The last is the third day after that of the drift."""
    end_to_end: bool = True


QUICK = Plan(trials=TrialSize(users=4000, worlds=1, seeds=4), log_worlds=1, end_to_end=False)
"""Nothing end to end: a first model takes longer to train than a quick run may last."""


def main(
    quick: Annotated[bool, typer.Option(help="four seeds of candidates, one quiet log; nothing end to end")] = False,
    output: Annotated[Path | None, typer.Option(help="keeps finished scenarios; default: a new folder")] = None,
    seed: Annotated[int, typer.Option(help="seed of the end-to-end worlds")] = 0,
) -> None:
    """Plays the scenarios and prints how each ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the services go down as on Ctrl-C
    plan = QUICK if quick else Plan(size=Size(overrides=json.dumps(SHORT), seed=seed))
    folder = output or Path(tempfile.mkdtemp(prefix="onerec-operations-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"finished scenarios are kept in {folder}", file=sys.stderr)
    began = time.monotonic()
    found = candidates(plan, folder)
    if plan.end_to_end:
        found |= end_to_end(plan, folder, found)
    found["no_drift_organic"] = organic(plan, folder)
    record = summary(found) | {"quick": quick, "seconds": time.monotonic() - began}
    table("operations", ("scenario", "end"), [(name, told["end"]) for name, told in found.items()])
    finish(record)


def candidates(plan: Plan, folder: Path) -> dict[str, dict[str, Any]]:
    """Bad and good candidates before gate and canary, over seeds."""
    bad, good = (trials.run(plan.trials, change, folder) for change in (-0.1, 0.1))
    seeds = plan.trials.seeds
    wanted = round(0.9 * seeds)
    return {
        "bad_candidate": {
            "end": outcome([(bad["promoted"] == 0, f"{bad['promoted']} of {seeds} were promoted")]),
            **bad,
        },
        "good_candidate": {
            "end": outcome(
                [(good["promoted"] >= wanted, f"{good['promoted']} of {seeds} were promoted, {wanted} are wanted")]
            ),
            **good,
        },
    }


def organic(plan: Plan, folder: Path) -> dict[str, Any]:
    """Quiet nights of organic traffic in several worlds."""
    worlds = []
    for seed in range(plan.log_worlds):
        of = {"users": plan.log_users, "days": plan.quiet_days, "seed": seed}

        def work(place: Path, of: dict[str, int] = of) -> dict[str, Any]:
            return quiet_log(**of)

        worlds.append(kept(folder, "organic", of, work))
    false = sum(world["false_triggers"] for world in worlds)
    held = sum(world["held_back"] for world in worlds)
    checks = [(false == 0, f"{false} false triggers"), (held == 0, f"the data gate held {held} quiet nights back")]
    figures = {"nights": plan.log_worlds * plan.quiet_days, "nearest": max(world["nearest"] for world in worlds)}
    return {"end": outcome(checks), "false_triggers": false, **figures}


def end_to_end(plan: Plan, folder: Path, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The scenarios on the real platform; ``found`` has the bad candidates of the seeds, to which two are added."""
    platform, progress = Platform(folder=folder / "platform", size=plan.size), Progress()
    of = asdict(plan.size)

    def keep(name: str, play: Callable[[], dict[str, Any]], **more: int) -> dict[str, Any]:
        def work(place: Path) -> dict[str, Any]:
            platform.build(progress)
            start = time.monotonic()
            return {**play(), "seconds": time.monotonic() - start}

        try:
            return kept(folder, name, {**of, **more}, work)
        except Exception as error:  # a scenario that breaks has failed, the others have not; nothing of it is kept
            traceback.print_exc()
            return {"end": f"failed: {type(error).__name__}: {error}"[:500]}

    days = plan.drift_days
    week = keep("week", lambda: scenarios.week(platform, progress))
    poisoned = keep("poisoned", lambda: scenarios.poisoned(platform, progress))
    frozen = keep("frozen", lambda: scenarios.drift_frozen(platform, progress, days), days=days)
    retrained = keep("retrained", lambda: scenarios.drift_retrained(platform, progress, days), days=days)
    quiet = keep("quiet", lambda: scenarios.quiet(platform, progress, plan.quiet_days), days=plan.quiet_days)
    return {
        "no_drift": quiet,
        "taste_drift": _drift(quiet, frozen, retrained),
        "poisoned_day": poisoned,
        "bad_candidate": _bad(found["bad_candidate"], week),
        "canary_rollback": week.get("canary_rollback", week),
        "canary_promotion": week.get("canary_promotion", week),
        "feedback_outage": week.get("feedback_outage", week),
        "s3_outage_mid_publish": week.get("s3_outage", week),
    }


def _drift(quiet: dict[str, Any], frozen: dict[str, Any], retrained: dict[str, Any]) -> dict[str, Any]:
    """The drift's end, which takes three plays to tell."""
    broken = next((each["end"] for each in (quiet, frozen, retrained) if "seconds" not in each), "")
    if broken:
        return {"end": broken}
    return scenarios.taste_drift([night["stay"] for night in quiet["nights"]], frozen["stay"], retrained)


def _bad(seeds: dict[str, Any], week: dict[str, Any]) -> dict[str, Any]:
    """The bad candidates of the seeds together with the two end to end."""
    spoilt = week.get("bad_candidate", [week])
    ends = [seeds["end"], *(each["end"] for each in spoilt)]
    return {**seeds, "end_to_end": spoilt, "end": next((end for end in ends if end != "passed"), "passed")}


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The last line: how each scenario ended, the figures asked for, and the details."""
    drift, quiet = found.get("taste_drift", {}), found.get("no_drift", {})
    return {
        "scenarios": {name: told["end"] for name, told in found.items()},
        "false_triggers": found["no_drift_organic"]["false_triggers"] + quiet.get("false_triggers", 0),
        "quiet_nights": found["no_drift_organic"]["nights"] + quiet.get("nights_judged", 0),
        "detected_within_days": drift.get("detected_within_days"),
        "stay_recovered": drift.get("stay_recovered"),
        "bad_promoted": found["bad_candidate"]["promoted"],
        "good_promoted": found["good_candidate"]["promoted"],
        "seeds": found["bad_candidate"]["seeds"],
        "details": found,
    }


if __name__ == "__main__":
    typer.run(main)
