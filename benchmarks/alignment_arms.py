"""The arms of the alignment benchmark, and how each is trained within the same budget.

Every arm starts from the same pre-trained weights, lives through the same simulated days with the same visitors, and
makes the same number of steps on the log of the others and its own: OneRec's loop (V1, arXiv 2506.13695, 3.3) in small.
Roll-outs are judged by predicted stay or by the P-Score; both were learned from logs. Each night the items'
records and the tastes are brought up to date; the reward model's weights stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.alignment_data import write_log
from benchmarks.alignment_days import OfModel, Town
from benchmarks.alignment_reward import organic_stay
from benchmarks.alignment_taste import taste_of
from benchmarks.alignment_world import Lab, save_weights
from models.generator import Generator
from models.presets import WEIGHTS
from models.rewards.duration import DurationConfig, duration_aware_advantage
from models.rewards.reward import RewardModel
from models.training.align import AlignJob, told_of
from models.training.alignment import AlignConfig
from models.training.data import Batches, RunData
from models.training.groups import Reward, rewarded
from models.training.judged import Judged
from models.training.on_policy import Asked, Logged, Rollouts, align_on_rollouts
from models.training.rollouts import InProcessSampler
from models.training.stage import Workshop

Judging = Callable[[RunData, np.ndarray], Reward]
"""What rewards roll-outs once the log of a day is known, and whose requests (user ids) may be rolled out."""
ANCHOR = 8
"""Logged requests of a step, beside roll-outs."""
LOGGED: dict[str, Any] = {"batch_requests": 32, "learning_rate": 2e-4}
"""Of arms that learn from logs alone: with fewer requests and a higher rate they only forget (docs/log.md)."""
NEWEST = 0.5
"""Share of the log's requests, the newest, that may be rolled out: users nearly as they are served next."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every arm may use."""

    days: int = 2
    visitors: int = 200
    """People served on a day, at most."""
    steps: int = 60
    """Optimizer steps of a night."""
    requests: int = 24
    """Requests rolled out in a step: with eight of them the policy learns what everybody likes before it learns who
    likes what, and serves all the same few videos (44 of them after twelve steps, 121 before)."""
    group: int = 192
    """Roll-outs of each, from the beam. Its width decides how much is learned (docs/log.md): what a policy compares
    must reach far beyond the ten it serves."""
    learned: int = 24
    """Of a group, its best and its worst: a third of the cost of a step, and better than learning from all."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to align; ``config`` are fields of ``AlignConfig``."""

    name: str
    config: dict[str, Any]
    reward: Literal["stay", "watch", "pscore", "none"] = "stay"
    """Predicted seconds, predicted place among views of like duration, P-Score, or no roll-outs."""

    def configured(self, budget: Budget, seed: int) -> AlignConfig:
        """The stage's configuration."""
        common: dict[str, Any] = {
            "learning_rate": 4e-4,
            "batch_requests": ANCHOR,
            "search": "beam",
            "max_steps": budget.steps,
            "log_every": 1,
            "warmup_steps": 5,
            "checkpoint_every": 10**6,
            "rollout_requests": budget.requests,
            "group": budget.group,
            "learned": budget.learned,
            "precision": "auto",
            "users_share": 1.0,
            "push_every": 1,
            "seed": seed,
            "threads": 1,
            **WEIGHTS,
        }
        return AlignConfig(**{**common, **self.config})


FAST: dict[str, Any] = {"signal": "rollouts", "learning_rate": 1e-3}
"""Of objectives that learn from many judged roll-outs; the rate was chosen on a world (seed 100) that is not
reported."""
GBPO: dict[str, Any] = {**FAST, "objective": "gbpo", "policy_weight": 3.0}
"""A bounded gradient is a small one: it bears, and needs, more weight beside the anchor."""
ANCHORED: dict[str, Any] = {
    "batch_requests": 64,
    "learning_rate": 3e-4,
    "exposure_weight": "engaged",
    "propensity_power": 0.0,
    "drop_sessions": 0.0,
}
"""The guarded recipe: the anchor imitates the whole log as it is, nothing dropped and no popularity taken out, and the
policy counts for a fraction of it. What the anchor adds to recall pays for what the policy takes. Chosen on seed 100
like the others."""
ARMS = (
    Arm(name="rsft+ecpo", config={**FAST, "objective": "ecpo"}),
    Arm(name="rsft+gbpo", config=GBPO),
    Arm(name="rsft", config={**LOGGED, "objective": "rsft"}, reward="none"),
    Arm(name="rsft+grpo", config={**FAST, "objective": "grpo"}),
    Arm(name="rsft+dpo", config={"objective": "dpo", "signal": "rollouts"}),
    Arm(name="feedback", config={**LOGGED, "objective": "gbpo"}, reward="none"),
    Arm(name="p-score", config=GBPO, reward="pscore"),
    Arm(name="hybrid", config={**GBPO, "signal": "hybrid"}),
    Arm(name="duration-aware", config=GBPO, reward="watch"),
    Arm(name="guarded rsft", config={**ANCHORED, "objective": "rsft"}, reward="none"),
    Arm(name="guarded rsft+ecpo", config={**FAST, **ANCHORED, "objective": "ecpo", "policy_weight": 0.1}),
    Arm(name="guarded rsft+gbpo", config={**FAST, **ANCHORED, "objective": "gbpo", "policy_weight": 0.4}),
)


def train(
    lab: Lab, arm: Arm, budget: Budget, folder: Path, night: Callable[[int, Generator], None] = lambda *_: None
) -> dict[str, Any]:
    """The arm after its days, weights in ``folder``; ``night(day, model)`` may look on. Returns what was recorded."""
    town, model, history = Town(lab, budget.visitors, folder.name), lab.model(), []
    judge = learned(lab, arm)
    served = []
    for day in range(budget.days):
        served.append(town.play(OfModel(lab, model, seed=day), day))
        data = write_log(lab.dataset, town.log, folder / "data")
        model, records = align(lab, arm, budget, data, model, judge, day)
        history += records
        night(day, model)
    save_weights(model, folder)
    return {
        "history": thinned(history),
        "exposures": sum(table.num_rows for table in served),
        "played_s": [float(np.mean(table["play_ms"].to_numpy())) / 1000 for table in served],
    }


def align(
    lab: Lab,
    arm: Arm,
    budget: Budget,
    data: Path,
    model: Generator,
    judge: Judging | None,
    day: int,
    *,
    anchored: bool = True,
) -> tuple[Generator, list[dict[str, float]]]:
    """One night on the log in ``data``: the aligned model, and a record of every step.

    Not ``anchored``: without the next-token loss on the log.
    """
    config = arm.configured(budget, 1000 * lab.seed + day)
    shop = Workshop(
        AlignJob(
            stage="align", data=data, catalogue=lab.catalogue, model=lab.size, config=config, output=data, init=None
        )
    )
    shop.model.load_state_dict(model.state_dict())
    rollouts = None
    if judge is not None:
        newest = shop.contexts.trainable[-int(NEWEST * len(shop.contexts.trainable)) :]
        users = np.array(shop.contexts.requests.users.to_pylist(), object)[shop.contexts.requests.user[newest]]
        rollouts = Rollouts(
            asked=Asked(count=len(newest), of=lambda numbers: shop.contexts.of(newest[numbers])),
            reward=judge(shop.data, users),
            sampler=InProcessSampler(
                shop.model, lab.catalogue, config.draw, every=config.push_every, precision=config.precision
            ),
            catalogue=lab.catalogue,
            items=lab.dataset.items,
            now_ms=int(shop.data.times_ms.max()),
        )
    found = align_on_rollouts(
        shop.model, config, rollouts=rollouts, logged=exposures(shop, config) if anchored else None
    )
    return shop.model.eval(), found["history"]


def learned(lab: Lab, arm: Arm) -> Judging | None:
    """What judges the arm's roll-outs."""
    if arm.reward == "none":
        return None
    if arm.reward == "pscore":
        return lambda data, _: rewarded(renewed(lab.reward(), lab, data), lab.catalogue)
    judge = replace(organic_stay(lab), timed=arm.reward == "stay")

    def judging(data: RunData, users: np.ndarray) -> Reward:
        of_today = replace(judge, reward=renewed(judge.reward, lab, data))
        return of_today.asked_by(users, taste_of(data, lab.catalogue)[0])

    return judging


def renewed(reward: RewardModel, lab: Lab, data: RunData) -> RewardModel:
    """The reward model with every item's record as ``data`` tells it."""
    everything = Judged(data, lab.catalogue, np.ones(len(data), bool))
    return replace(reward, numbers=everything.numbers_now())


def exposures(shop: Workshop[AlignConfig], config: AlignConfig) -> Callable[[int], Logged]:
    """Batches of the whole log, shuffled, with what they teach; nobody in it is judged, so nothing is held out."""
    data = shop.data
    everything = np.ones(len(data), bool)
    batches = Batches(
        data,
        shop.contexts,
        shop.catalogue,
        everything,
        batch_requests=config.batch_requests,
        shuffle_window=10**9,
        seed=config.seed,
    )
    judged = duration_aware_advantage(
        data.column("play_ms"),
        data.column("duration_ms"),
        data.column("dislike"),
        data.column("user_id"),
        data.times_ms,
        config=DurationConfig(top_share=config.top_share),
    )
    told = told_of(shop, judged.advantage)
    return lambda number: told(shop.example(batches(number)))


def thinned(history: list[dict[str, float]], points: int = 60) -> list[dict[str, float]]:
    """At most so many records."""
    return history[:: max(1, len(history) // points)]
