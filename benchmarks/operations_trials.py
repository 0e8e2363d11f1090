"""Bad and good candidates before gate and canary, twenty seeds each: the real decisions on simulated exposures.

A seed draws which requests are held out and who is in the canary. The gate judges recall of both policies on the same
held-out requests (``models.evaluation``, ``monitoring.quality``); whom it blesses is tried on users, look by look
(``monitoring.trial``, ``monitoring.canary``). A candidate is promoted when both say so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import kept, spread
from benchmarks.operations_users import Planted, Played, Policy, Users, plant, user_id
from features.histories.windows import is_positive
from features.schema import FLAGS
from features.world.calibration import kuairand_responses
from features.world.responses import DRAWS
from models.evaluation import CUTOFFS, accuracy
from monitoring.canary import CONTINUE, PROMOTE, judge
from monitoring.experiment import bootstrap_mean
from monitoring.quality import decide
from monitoring.trial import Trial, TrialConfig, arms_of

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
REQUESTS = 400
SLOTS = 10
SAME = {"legality": 1.0, "illegal_items": 0.0, "density": 0.1, "calibration_error": 0.01, "latency_ms": 10.0}
"""What the gate measures of a model beside its choices: alike for both, since only the choices are planted."""


@dataclass(frozen=True, kw_only=True)
class TrialSize:
    """How many people, worlds and seeds."""

    users: int = 6000
    items: int = 600
    worlds: int = 4
    seeds: int = 20
    looks: int = 6
    share: float = 0.5
    stable_chance: float = 0.3


def run(size: TrialSize, change: float, folder: Path) -> dict[str, Any]:
    """What became of candidates whose stay time is planted to differ by ``change``, over all seeds."""
    found: list[dict[str, Any]] = []
    per_world = size.seeds // size.worlds
    for number in range(size.worlds):
        of = {"size": vars(size), "change": change, "world": number}

        def work(place: Path, number: int = number) -> dict[str, Any]:
            return {"seeds": list(_world(size, change, number, per_world))}

        found += kept(folder, "trials", of, work)["seeds"]
    promoted = [each["seed"] for each in found if each["promoted"]]
    return {
        "seeds": len(found),
        "promoted": len(promoted),
        "refused_by_gate": sum(not each["blessed"] for each in found),
        "rolled_back": sum(each["blessed"] and not each["promoted"] for each in found),
        "looks": spread([each["looks"] for each in found if each["blessed"]] or [0]),
        "planted_change": spread(each["change"] for each in found),
    }


def _world(size: TrialSize, change: float, number: int, seeds: int) -> Iterator[dict[str, Any]]:
    users, stable = (
        Users(users=size.users, items=size.items, seed=number),
        Policy(name="stable", chance=size.stable_chance),
    )
    days = range(-size.looks, 0), range(size.looks)
    base = users.play((stable, days[0]), (stable, days[1]))
    candidate = plant(users, stable, days, change)
    for k in range(seeds):
        seed = number * seeds + k
        blessed, why = _gate(users, stable, candidate.policy, seed)
        promoted, looks = _canary(size, base, candidate, seed) if blessed else (False, 0)
        yield {
            "seed": seed,
            "blessed": blessed,
            "promoted": promoted,
            "looks": looks,
            "change": candidate.change,
            "refused_because": why,
        }


def _gate(users: Users, stable: Policy, candidate: Policy, seed: int) -> tuple[bool, list[str]]:
    """Whether the gate blesses, and why not."""
    chosen, relevant = _held_out(users, seed)
    rankings = {each.name: _lists(users.ranking(each)[chosen]) for each in (stable, candidate)}
    scores = {name: accuracy(lists, relevant) for name, lists in rankings.items()}
    metrics = {name: _metrics(users, chosen, rankings[name], scores[name]) for name in rankings}
    interval = bootstrap_mean(scores["candidate"]["recall@50"] - scores["stable"]["recall@50"], samples=1000, seed=seed)
    metrics["candidate"]["over_production_high"] = interval.high
    decision = decide(metrics["candidate"], metrics["stable"])
    return decision.blessed, list(decision.failed)


def _held_out(users: Users, seed: int) -> tuple[np.ndarray, list[set[str]]]:
    """Rows of the users of R requests that chance answered, and the items each engaged with."""
    rng = np.random.default_rng([seed, 3])
    chosen = rng.permutation(users.users)[:REQUESTS]
    shown = rng.integers(0, users.items, (len(chosen), SLOTS))
    duration = users.durations[shown]
    views = kuairand_responses(0.6).views(users.z[chosen[:, None], shown], duration, rng.random((DRAWS, *shown.shape)))
    labels = sum(values.astype(np.int64) << bit for bit, values in enumerate(views.flags[f] for f in FLAGS))
    liked = is_positive(views.play_ms, duration, np.asarray(labels))
    return chosen, [{str(item) for item in row[own]} for row, own in zip(shown, liked, strict=True)]


def _lists(ranking: np.ndarray) -> list[list[str]]:
    """The first items of each ranking, repeats left out."""
    return [list(dict.fromkeys(map(str, row[: 2 * max(CUTOFFS)])))[: max(CUTOFFS)] for row in ranking]


def _metrics(
    users: Users, chosen: np.ndarray, lists: list[list[str]], scores: dict[str, np.ndarray]
) -> dict[str, float]:
    top = np.array([[int(item) for item in items[:SLOTS]] for items in lists])
    z = np.take_along_axis(users.z[chosen], top, axis=1)
    reward, by_chance = (float((1 / (1 + np.exp(-1.7 * each))).mean()) for each in (z, users.z[chosen]))
    return {
        **SAME,
        **{name: float(values.mean()) for name, values in scores.items()},
        "requests": float(len(scores["recall@50"])),
        "coverage": len(np.unique(top)) / min(users.items, top.size),
        "cold_start_share": 0.0,
        "reward": reward,
        "reward_lift": reward / by_chance,
    }


def _canary(size: TrialSize, base: Played, candidate: Planted, seed: int) -> tuple[bool, int]:
    """(promoted, number of the look that decided)."""
    config = TrialConfig(share=size.share, looks=size.looks, hours=24)
    trial = Trial(version=f"candidate-{seed}", stable="stable", started=EPOCH.isoformat(), unit="user", config=config)
    there = np.array([trial.split.arm(user_id(row)) == "canary" for row in range(size.users)])
    plan = config.plan()
    for look in range(1, size.looks + 1):
        now, before = range(look), range(-look, 0)
        seen = [_served(base.table(~there, now), "stable"), _served(candidate.played.table(there, now), trial.version)]
        past = _served(base.table(np.ones(size.users, bool), before), "stable")
        verdict = judge(look, arms_of(trial, pa.concat_tables(seen), past), plan)
        if verdict.action != CONTINUE:
            return verdict.action == PROMOTE, look
    return False, size.looks


def _served(rows: pa.Table, version: str) -> pa.Table:
    """The rows as a model of ours answered them."""
    return rows.append_column("source", pa.array(["onerec"] * len(rows))).append_column(
        "model_version", pa.array([version] * len(rows))
    )
