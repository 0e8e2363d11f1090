"""Alignment on logged exposures: RSFT and GBPO together.

RSFT (OneRec V1, arXiv 2506.13695, 3.3) drops the bottom half of the exposure sessions by play time and keeps the
pre-training loss on the rest; a session is a request here. GBPO (OneRec-V2, arXiv 2508.20900, 3.1.2) learns from the
duration-aware advantage of every exposure (3.1.1), against the probability logged when we served it ourselves, else
against the current one. One forward pass serves both; the NTP loss is the anchor in place of a KL term. Left out:
roll-outs and reward models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from models.objectives.gbpo import gbpo_loss
from models.objectives.ntp import ntp_loss
from models.objectives.policy import guards
from models.rewards.duration import DurationAdvantage, DurationConfig, duration_aware_advantage
from models.tokenizer.vocabulary import Catalogue
from models.training import checkpoint
from models.training.data import Contexts, RunData
from models.training.loop import Loss, fit
from models.training.ray import launch
from models.training.sessions import per_request
from models.training.stage import Example, Job, StageConfig, Workshop


@dataclass(frozen=True, kw_only=True)
class AlignConfig(StageConfig):
    """Alignment; all constants but ``drop_sessions`` and the top quartile are ours."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """fp32, as the server computes the log-probabilities it logs: GBPO compares the two."""
    checkpoint_every: int = 50
    drop_sessions: float = 0.5
    """Share of sessions, those with the least play time, that RSFT leaves out (V1 3.3)."""
    gbpo_weight: float = 1.0
    """Loss = NTP on the kept sessions + this times GBPO on all exposures; 0 is RSFT alone."""
    top_share: float = 0.25
    """Share of exposures whose advantage is +1 (V2 3.1.1: the top quartile)."""
    guard_drop: float = 0.2
    """Stop when held-out recall of the first code falls by more than this share of its value before."""
    guard_targets: int = 100
    """Below this many held-out targets there is no guard: it would react to noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_sessions < 1 or not 0 < self.guard_drop <= 1 or self.gbpo_weight < 0:
            raise ValueError(
                f"drop_sessions {self.drop_sessions} must be in [0, 1), guard_drop {self.guard_drop} in (0, 1] and "
                f"gbpo_weight {self.gbpo_weight} at least 0"
            )


def align(
    data: Path,
    catalogue: Catalogue,
    config: AlignConfig,
    output: Path,
    *,
    init: Path,
    ray_address: str = "",
    name: str = "align",
    workers: int = 1,
    store: str = "",
) -> dict[str, Any]:
    """Aligns the weights in folder ``init`` on the run's exposures; outputs and resumption as ``pretrain``."""
    model = checkpoint.read_config(init)
    job = Job(
        stage="align",
        data=data,
        catalogue=catalogue,
        model=model,
        config=config,
        output=output,
        init=init,
        store=store,
    )
    return launch(train, job, ray_address=ray_address, name=name, workers=workers)


def train(job: Job[AlignConfig]) -> dict[str, Any]:
    """What each worker runs."""
    shop = Workshop(job)
    before = shop.measure()
    reward = advantages(shop.data, job.config)
    plan = shop.plan(shop.batches(), _objective(shop, reward.advantage), _guard(shop, before))
    metrics = fit(shop.model, plan, job.config, job.output)
    kept = {f"{name}_before": value for name, value in before.items() if name != "holdout/targets"}
    return shop.finish({**metrics, **reward.metrics, **kept})


def _objective(shop: Workshop[AlignConfig], advantage: np.ndarray) -> Callable[[nn.Module, Example], Loss]:
    config, levels = shop.config, shop.catalogue.levels
    weights = shop.weights * kept_sessions(shop.data, shop.contexts, config.drop_sessions)
    logged = logged_log_probs(shop.data, shop.catalogue)

    def objective(model: nn.Module, example: Example) -> Loss:
        logits = model(example.context, example.targets)
        ntp = ntp_loss(logits, example.targets, shop.of_exposures(weights, example), shop.model.level_loss)
        wanted = shop.of_exposures(advantage, example)
        old = shop.of_exposures(logged, example, padding=np.nan)
        gbpo, parts = gbpo_loss(logits, example.targets, wanted, old, example.mask)
        count = int((example.batch.items >= 0).sum())
        parts |= guards(logits, example.targets, wanted, old, example.mask)
        parts |= {"ntp": float(ntp.detach()), "gbpo": float(gbpo.detach()), "entropy": entropy(logits, example.mask)}
        return Loss(ntp + config.gbpo_weight * gbpo, parts, count, count * levels, weight=count)

    return objective


def _guard(shop: Workshop[AlignConfig], before: dict[str, float]) -> Callable[[], str | None] | None:
    """Compares held-out recall with the one before alignment: a weak reward destroys it silently."""
    name, limit = "holdout/recall_level1", shop.config.guard_drop
    if before["holdout/targets"] < shop.config.guard_targets:
        return None

    def guard() -> str | None:
        now = shop.measure()[name]
        if now >= before[name] * (1 - limit):
            return None
        return f"held-out recall of the first code fell from {before[name]:.4f} to {now:.4f}, by more than {limit:.0%}"

    return guard


def advantages(data: RunData, config: AlignConfig) -> DurationAdvantage:
    """Duration-aware advantage of every exposure that is not held out (0 there); tau is taken over all of them."""
    return duration_aware_advantage(
        data.column("play_ms"),
        data.column("duration_ms"),
        data.column("dislike"),
        data.column("user_id"),
        data.times_ms,
        batch=~data.held_out,
        config=DurationConfig(top_share=config.top_share),
    )


def kept_sessions(data: RunData, contexts: Contexts, drop: float) -> np.ndarray:
    """float32 [N]: 1 for exposures of the sessions left after dropping the share ``drop`` with the least play time."""
    grouped = contexts.requests
    sizes = np.diff(grouped.offsets)
    play = per_request(grouped, data.column("play_ms"))[contexts.trainable]
    worst = contexts.trainable[np.argsort(play, kind="stable")[: int(drop * len(play))]]
    keep = np.ones(len(grouped), np.float32)
    keep[worst] = 0
    weights = np.empty(len(data), np.float32)
    weights[grouped.rows] = np.repeat(keep, sizes)
    return weights


def logged_log_probs(data: RunData, catalogue: Catalogue) -> np.ndarray:
    """float32 [N, L] as logged by the server for our own exposures whose SID still names the item, NaN elsewhere."""
    levels = catalogue.levels
    logged = np.full((len(data), levels), np.nan, np.float32)
    rows = catalogue.rows(data.column("item_id"))
    lengths = (pc.list_value_length(data.exposures.column(name)) for name in ("sid", "log_probs"))
    complete = pc.and_(*(pc.equal(length, levels) for length in lengths))
    ours = pc.and_(pc.fill_null(complete, False), pc.equal(data.exposures.column("source"), "onerec"))
    ours = np.flatnonzero(ours.to_numpy() & (rows >= 0))

    def values(name: str) -> np.ndarray:
        lists = data.exposures.column(name).take(pa.array(ours)).combine_chunks()
        found: np.ndarray = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, levels)
        return found

    same = (values("sid") == catalogue.sids[rows[ours]]).all(1)
    logged[ours[same]] = values("log_probs")[same]
    return logged


@torch.no_grad()
def entropy(logits_BTLC: Tensor, mask_BT: Tensor) -> float:
    """Mean entropy in nats of the first code's distribution over requests: falls when the policy collapses."""
    log_p = logits_BTLC[:, 0, 0].float().log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1)[mask_BT.any(1)].mean())
