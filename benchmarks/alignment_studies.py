"""What the tables of arms do not show: legality under RL, gradients off policy, rules, what holds recall,
self-generated data, duration.

Each study starts from one laboratory's pre-trained model (rules: from an aligned one) and makes the same steps with one
thing changed. Legality: OneRec V1 (arXiv 2506.13695) 2.4.2; rules: its 4.3.3; gradients: OneRec-V2 (2508.20900) 3.1.2;
self-generated data: its section 4. Left out: seeds, these are curves of one world.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.alignment_arms import ANCHORED, FAST, LOGGED, Arm, Budget, align, learned, train
from benchmarks.alignment_judge import Judge
from benchmarks.alignment_report import difference
from benchmarks.alignment_world import Lab
from models.generator import Generator
from models.rewards.duration import duration_aware_advantage

FORMATS = {"pretrained": None, "without_format": "none", "random_k": "random", "top_k": "top"}
ALPHAS = (0.85, 0.6)
BOOSTS = (1.15, 1.5)
BALANCES = (0.0, 0.1, 0.4, 1.6)
MIXES = (0.0, 0.25, 1.0)
NEVER = 10**9


def legality(lab: Lab, judge: Judge, budget: Budget) -> dict[str, Any]:
    """Share of free samples that name an item: before, and after RL from free samples with each format reward."""
    found: dict[str, Any] = {"after": {}, "curves": {}, "stay_s": {}}
    for name, choice in FORMATS.items():
        model: Generator = lab.model()
        history: list[dict[str, float]] = []
        if choice is not None:
            config = {**FAST, "objective": "ecpo", "search": "sample", "constrained": False, "format": choice}
            model, history = _once(lab, Arm(name=name, config=config), replace(budget, steps=2 * budget.steps))
        found["after"][name] = lab.recommender(model).legality(lab.asked, samples=32)
        found["curves"][name] = [each["rollouts/legality"] for each in history]
        found["stay_s"][name] = float(judge.stay_of(model).mean())
        print(f"legality {name}: {found['after'][name]:.3f}", file=sys.stderr)
    return found


def stability(lab: Lab, judge: Judge, budget: Budget) -> dict[str, Any]:
    """Largest gradient of each objective over the same roll-outs, all drawn by the pre-trained model; what it does."""
    found = {}
    for objective in ("grpo", "ecpo", "gbpo"):
        config = {**FAST, "objective": objective, "search": "sample", "push_every": NEVER}
        model, history = _once(lab, Arm(name=objective, config=config), budget, anchored=False)
        norms = [each["grad_norm"] for each in history]
        after = judge.of_model(model)
        found[objective] = {
            "max_gradient": max(norms),
            "gradients": norms,
            "stay_s": float(np.mean(after["users"]["play_s"])),
            "recall50": float(np.mean(after["recall50"])),
        }
        print(f"off policy {objective}: {max(norms):.2f}", file=sys.stderr)
    return found


def rules(lab: Lab, judge: Judge, budget: Budget, start: Path) -> dict[str, Any]:
    """Share of a damped kind and of boosted authors, and stay time, over the strength of the rule.

    One more night for the policy in ``start``, with the rule and, for the comparison, without.
    """
    served = judge.served(lab.model(start))
    tag, authors = common_tag(lab, served), new_authors(lab)
    kinds = {"damped": ("tag", [tag], "alpha", ALPHAS), "boosted": ("author", authors, "boost", BOOSTS)}
    found: dict[str, Any] = {"tag": tag, "authors": len(authors)}
    plain = _ruled(lab, judge, budget, "", start)
    for name, (attribute, values, kind, strengths) in kinds.items():
        members = of_kind(lab, attribute, values)
        points = [_point(1.0, plain, plain, members)]
        for strength in strengths:
            target = 0.0 if kind == "alpha" else 1.0
            text = rule(name, attribute, values, target, kind, strength)
            points.append(_point(strength, _ruled(lab, judge, budget, text, start), plain, members))
            print(f"{name} {strength}: {points[-1]}", file=sys.stderr)
        found[name] = points
    return found


def balances(lab: Lab, judge: Judge, budget: Budget) -> list[dict[str, Any]]:
    """Stay time and guard-rails after one night of the guarded GBPO, over the policy's weight beside the anchor.

    Weight 0 is the anchor alone; the first point is the pre-trained model.
    """
    found: list[dict[str, Any]] = []
    for weight in (None, *BALANCES):
        model, moved = lab.model(), 0.0
        if weight is not None:
            config = {**FAST, **ANCHORED, "objective": "gbpo", "policy_weight": weight}
            alone = {**ANCHORED, "objective": "rsft"}
            arm = Arm(name="balance", config=config if weight else alone, reward="stay" if weight else "none")
            model, history = _once(lab, arm, budget)
            moved = history[-1]["policy/kl_pretrained"]
        after = judge.of_model(model, select=True)
        point = {"policy_weight": weight, "kl": moved, "stay_s": float(np.mean(after["users"]["play_s"]))}
        point |= {"selected_s": float(np.mean(after["selected"]["users"]["play_s"]))}
        point |= {"recall50": float(np.mean(after["recall50"]))}
        found.append(point | {rail: after[rail] for rail in ("cold_start_share", "density", "distinct", "legality")})
        print(f"balance: {found[-1]}", file=sys.stderr)
    return found


def mixes(lab: Lab, judge: Judge, budget: Budget, folder: Path) -> dict[str, Any]:
    """Stay time of held-out users night after night, by the share of self-generated exposures in the feedback."""
    found = {}
    for share in MIXES:
        arm = Arm(name=f"own {share}", config={**LOGGED, "objective": "gbpo", "own_share": share}, reward="none")
        curve: list[float] = []

        def night(_: int, model: Generator, curve: list[float] = curve) -> None:
            curve.append(float(np.mean(judge.stay_of(model))))

        played = train(lab, arm, budget, folder / f"own-{share}", night)["played_s"]
        found[str(share)] = {"stay_s": curve, "played_s": played}
        print(f"own share {share}: {curve}", file=sys.stderr)
    return found


def durations(lab: Lab) -> dict[str, float]:
    """Rank correlation with the video's duration: of play time, and of the duration-aware advantage."""
    log = lab.log
    play, duration = log["play_ms"].to_numpy(), log["duration_ms"].to_numpy()
    users = np.array(log["user_id"].to_pylist(), object)
    judged = duration_aware_advantage(
        play, duration, log["dislike"].to_numpy(zero_copy_only=False), users, log["event_time"].cast("int64").to_numpy()
    )
    told = np.isfinite(judged.quantile)
    return {
        "raw": float(spearmanr(play, duration).statistic),
        "advantage": float(spearmanr(judged.advantage[told], duration[told]).statistic),
    }


def _once(
    lab: Lab, arm: Arm, budget: Budget, model: Generator | None = None, *, anchored: bool = True
) -> tuple[Generator, list[dict[str, float]]]:
    """One night's steps on the organic log alone, from the pre-trained model or ``model``."""
    return align(lab, arm, budget, lab.data, model or lab.model(), learned(lab, arm), 0, anchored=anchored)


def _ruled(lab: Lab, judge: Judge, budget: Budget, text: str, start: Path) -> dict[str, Any]:
    """What is served after a night with the rules in ``text``, as the judge sees it, and the ``lists`` themselves."""
    config = {"objective": "ecpo", "signal": "rollouts", "rules": text}
    model, _ = _once(lab, Arm(name="rules", config=config), budget, lab.model(start))
    lists = judge.served(model)
    return {**judge.of_lists(lists), "lists": lists}


def _point(strength: float, outcome: dict[str, Any], plain: dict[str, Any], members: set[str]) -> dict[str, Any]:
    """A kind's share of what is served, true seconds, and both as relative changes against ``plain``."""
    shares = [float(np.mean([item in members for each in one["lists"] for item in each])) for one in (outcome, plain)]
    seconds = [np.array(one["users"]["play_s"]) for one in (outcome, plain)]
    moved = difference(seconds[0], seconds[1])
    before = seconds[1].mean()
    return {
        "strength": strength,
        "share": shares[0],
        "share_change": shares[0] / max(shares[1], 1e-9) - 1,
        "stay_s": float(seconds[0].mean()),
        "stay_change": {name: value / before for name, value in moved.items()},
        **{rail: outcome[rail] for rail in ("cold_start_share", "density")},
    }


def rule(name: str, attribute: str, values: list[str], target: float, kind: str, strength: float) -> str:
    """The TOML text of one rule."""
    named = ", ".join(f'"{value}"' for value in values)
    lines = [f'name = "{name}"', f'attribute = "{attribute}"', f"values = [{named}]", f"target_share = {target}"]
    return "\n".join(["[[rule]]", *lines, f"{kind} = {strength}"])


def common_tag(lab: Lab, lists: list[list[str]]) -> str:
    """The first tag served most."""
    items = lab.dataset.items
    first = dict(zip(items["item_id"].to_pylist(), (tags[0] for tags in items["tags"].to_pylist()), strict=True))
    names, counts = np.unique([first[item] for each in lists for item in each], return_counts=True)
    return str(names[counts.argmax()])


def new_authors(lab: Lab, share: float = 0.3) -> list[str]:
    """The authors shown least in the log, this share of all."""
    items = lab.dataset.items
    author = dict(zip(items["item_id"].to_pylist(), items["author_id"].to_pylist(), strict=True))
    names, counts = np.unique([author[item] for item in lab.log["item_id"].to_pylist()], return_counts=True)
    shown = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return sorted(set(author.values()), key=lambda name: (shown.get(name, 0), name))[
        : int(share * len(set(author.values())))
    ]


def of_kind(lab: Lab, attribute: str, values: list[str]) -> set[str]:
    """Items of a rule's kind."""
    items, wanted = lab.dataset.items, set(values)
    if attribute == "tag":
        rows = [not wanted.isdisjoint(tags) for tags in items["tags"].to_pylist()]
    else:
        rows = [name in wanted for name in items["author_id"].to_pylist()]
    return {item for item, mine in zip(items["item_id"].to_pylist(), rows, strict=True) if mine}
