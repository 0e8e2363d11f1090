"""The lab: what each way to align makes of a pre-trained model, in a world whose true preferences are known.

``python -m benchmarks.alignment [--quick] [--seeds N] [--studies/--no-studies] [--data LOG] [--arms A,B] [--output
DIR]``. In the world of the scenario ``laboratory`` (or of the user model fitted on a log) a lazy decoder (preset
``tiny``) is pre-trained on organic exposures, a P-Score is learned from the same log, and every arm then lives
through the same simulated days: it serves people, gets their feedback, and is aligned at night within one budget
(``benchmarks.alignment_arms.Budget``). Everybody is judged by what the world truly expects of the lists they serve to
users nobody learned from, beside an oracle and a cascade that lived through the same days. Parts that are done are
kept in ``--output``: a killed benchmark goes on where it stopped.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.alignment_arms import ARMS, Arm, Budget, train
from benchmarks.alignment_days import OfCascade, Town
from benchmarks.alignment_judge import Judge
from benchmarks.alignment_report import draw, show, summary
from benchmarks.alignment_studies import balances, durations, legality, mixes, rules, stability
from benchmarks.alignment_world import WORLD, Lab, Make, Sizes, fitted, simulated
from benchmarks.harness import finish, kept, place
from features.world.sessions import DAY_MS
from features.world.simulator import world_hash
from models.cascade import Cascade

QUICK_SIZES = Sizes(users=300, items=600, held=80, pretrain_steps=80, reward_steps=40)
QUICK = Budget(days=1, visitors=60, steps=5, requests=6, group=32, learned=12)
DRAWN = 32
"""Roll-outs of a request where they are drawn, not searched: all are learned from."""
RECIPES = {"": ("", "rsft+ecpo"), "guarded_": ("guarded ", "guarded rsft+gbpo")}
"""Of each recipe: what begins its keys in the headline, what begins its arms, and the arm whose guard-rails are told.
The first goes as far as it can; the second, which keeps recall, is the one to choose."""
ENDS = {"": "value", "_low": "low", "_high": "high"}
STRONG = "rsft+ecpo"
"""Whose policy the study of rules goes on from."""


def played(lab: Lab, judge: Judge, arm: Arm, budget: Budget, folder: Path) -> dict[str, Any]:
    """The arm's record; its list is also judged after selection by predicted stay."""
    history = train(lab, arm, budget, folder)
    return {**judge.of_model(lab.model(folder), select=True), **history}


def of_pretrained(lab: Lab, judge: Judge, _: Path) -> dict[str, Any]:
    """The model before alignment, and what selection alone makes of its beam."""
    return judge.of_model(lab.model(), select=True)


def of_cascade(lab: Lab, judge: Judge, budget: Budget, _: Path) -> dict[str, Any]:
    """The cascade: fitted on the log, then each night on the days it served itself as well."""
    town = Town(lab, budget.visitors, "cascade")
    for day in range(budget.days):
        town.play(OfCascade(_fitted(lab, town, day)), day)
    return judge.of_cascade(_fitted(lab, town, budget.days))


def _fitted(lab: Lab, town: Town, day: int) -> Cascade:
    return Cascade.fit(town.log, lab.dataset.items, now_ms=lab.start_ms + day * DAY_MS)


def world(
    seed: int, sizes: Sizes, budget: Budget, output: Path, make: Make = simulated, arms: Sequence[Arm] = ARMS
) -> dict[str, Any]:
    """The arms in the world of one seed."""
    lab = Lab(seed, sizes, output, make)
    judge = Judge(lab)
    works: dict[str, Any] = {
        "oracle": lambda _: judge.of_oracle(),
        "chance": lambda _: judge.of_chance(),
        "pretrained": partial(of_pretrained, lab, judge),
        "cascade": partial(of_cascade, lab, judge, budget),
    }
    works |= {arm.name: partial(played, lab, judge, arm, budget) for arm in arms}
    found: dict[str, Any] = {}
    for name, work in works.items():
        found[name] = kept(lab.folder, name, inputs(lab, budget, name), work)
        mean = sum(found[name]["users"]["play_s"]) / len(found[name]["users"]["play_s"])
        print(f"seed {seed} {name}: {mean:.1f} s a list", file=sys.stderr)
        if "selected" in found[name]:
            found[f"{name}, selected"] = found[name].pop("selected")
    return {"seed": seed, "arms": found, "reward_auc": lab.rewarding["reward/auc"], "duration": durations(lab)}


def inputs(lab: Lab, budget: Budget, name: str) -> dict[str, Any]:
    """What the record called ``name`` is made of."""
    recipes = {arm.name: asdict(arm) for arm in ARMS}
    return {**lab.of, "budget": asdict(budget), "arm": recipes.get(name, name)}


def studied(sizes: Sizes, budget: Budget, output: Path) -> dict[str, Any]:
    """The studies, in the world of seed 0, whose arms are there."""
    lab = Lab(0, sizes, output)
    judge = Judge(lab)
    night = replace(budget, group=min(budget.group, DRAWN), learned=0)
    nights = replace(budget, days=10 if budget.days > 1 else 2, steps=max(budget.steps // 4, 2))
    aligned = place(lab.folder, STRONG, inputs(lab, budget, STRONG))
    works: dict[str, Any] = {
        "legality": lambda _: legality(lab, judge, night),
        "stability": lambda _: stability(lab, judge, night),
        "rules": lambda _: rules(lab, judge, budget, aligned),
        "balances": lambda _: {"points": balances(lab, judge, budget)},
        "mixes": lambda folder: mixes(lab, judge, nights, folder),
    }
    found = {}
    for name, work in works.items():
        record = kept(lab.folder, f"study {name}", {**lab.of, "budget": asdict(budget), "study": name}, work)
        found[name] = {key: value for key, value in record.items() if key != "of"}
    return found


def main(
    quick: Annotated[bool, typer.Option(help="one small world, few steps")] = False,
    seeds: Annotated[int, typer.Option(help="how many worlds")] = 3,
    studies: Annotated[bool, typer.Option(help="also legality, gradients, rules and mixes, in one world")] = True,
    data: Annotated[Path | None, typer.Option(help="a log, whose user model is the world; no studies")] = None,
    arms: Annotated[str, typer.Option(help="names of arms, with commas between; default: all")] = "",
    output: Annotated[Path | None, typer.Option(help="where runs are kept; default: a temporary folder")] = None,
) -> None:
    """Trains, plays, judges and prints the record."""
    if seeds < 1:
        raise typer.BadParameter(f"{seeds} seeds; give at least 1", param_hint="--seeds")
    studies = studies and data is None
    chosen = wanted(arms, studies)
    torch.set_num_threads(1)
    folder = output or Path(tempfile.mkdtemp(prefix="onerec-alignment-"))
    sizes, budget = (QUICK_SIZES, QUICK) if quick else (Sizes(), Budget())
    make = simulated if data is None else fitted(data)
    records = [world(0, sizes, budget, folder, make, chosen)]
    curves = studied(sizes, budget, folder) if studies else {}
    records += [world(seed, sizes, budget, folder, make, chosen) for seed in range(1, 1 if quick else seeds)]
    rows = summary(records)
    show(rows)
    plot = folder / "alignment.html"
    draw(rows, curves, plot)
    finish(
        {
            **headline(rows, records, curves),
            "quick": quick,
            "data": data.name if data else "simulator",
            "budget": asdict(budget),
            "sizes": asdict(sizes),
            "arms": rows,
            "studies": curves,
            "plot": str(plot),
        }
    )


def wanted(names: str, studies: bool) -> tuple[Arm, ...]:
    """The arms called ``names``, all without any; the studies go on from one of them."""
    known = {arm.name: arm for arm in ARMS}
    asked = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    if wrong := [name for name in asked if name not in known]:
        raise typer.BadParameter(f"no arm is called {', '.join(wrong)}; give some of {', '.join(known)}")
    if studies and STRONG not in asked:
        raise typer.BadParameter(f"the studies go on from {STRONG!r}; ask for that arm too, or give --no-studies")
    return tuple(known[name] for name in asked)


def headline(rows: list[dict[str, Any]], records: list[dict[str, Any]], curves: dict[str, Any]) -> dict[str, Any]:
    """The keys every run is compared by; None where a study was left out."""
    by_name = {row["arm"]: row for row in rows}
    after = curves.get("legality", {}).get("after", {})
    found: dict[str, Any] = {"world_hash": world_hash(WORLD), "seeds": len(records)}
    for prefix, (recipe, guarded) in RECIPES.items():
        found |= {f"{prefix}{key}": value for key, value in of_recipe(by_name, recipe, guarded).items()}
    found |= {f"legality_{name}": after.get(name) for name in ("pretrained", "without_format", "random_k", "top_k")}
    found |= {
        f"max_gradient_{name}": curves.get("stability", {}).get(name, {}).get("max_gradient")
        for name in ("grpo", "ecpo", "gbpo")
    }
    found["duration_rho"] = sum(record["duration"]["advantage"] for record in records) / len(records)
    found["duration_rho_raw"] = sum(record["duration"]["raw"] for record in records) / len(records)
    found["reward_auc"] = [record["reward_auc"] for record in records]
    return found


def of_recipe(by_name: dict[str, dict[str, Any]], recipe: str, guarded: str) -> dict[str, Any]:
    """Share of the gap closed by both objectives, bare and selected, and the guard-rails of the arm ``guarded``."""

    def told(arm: str, figure: str, end: str) -> float | None:
        row = by_name.get(arm)
        return None if row is None else float(row[figure][end])

    found: dict[str, Any] = {"guard_rails_of": guarded}
    for key in ("gbpo", "ecpo"):
        bare = f"{recipe}rsft+{key}"
        selected = f"{bare}, selected"
        found |= {f"{key}_over_cascade_low": told(bare, "over_cascade", "low")}
        found |= {f"{key}_over_selection_low": told(selected, "over_selection", "low")}
        found |= {f"recall_change_{key}": told(bare, "recall_change", "value")}
        for name, arm in ((f"gap_closed_{key}", bare), (f"gap_closed_{key}_selected", selected)):
            found |= {name: told(arm, "gap_closed", "value"), f"{name}_low": told(arm, "gap_closed", "low")}
    for name, rail in (("cold_start_change", "cold_start_share"), ("density_change", "density")):
        found[name] = _moved(by_name, guarded, rail)
    return found | {f"recall_change{end}": told(guarded, "recall_change", at) for end, at in ENDS.items()}


def _moved(by_name: dict[str, dict[str, Any]], arm: str, rail: str) -> float | None:
    """Relative change of a guard-rail against pre-trained."""
    before = by_name["pretrained"][rail]
    return float(by_name[arm][rail] / before - 1) if arm in by_name and before else None


if __name__ == "__main__":
    typer.run(main)
