"""Trains the bundle's reward model on logged exposures: P-Score, predicted stay, a session reward for session models.

OneRec V1 (arXiv 2506.13695) 2.4.1 and O1 (2502.18965) 2.4; the models are in models.rewards. Same pattern as the other
stages: the outcome lies in an output folder with the fingerprint of what it was made from; a killed training goes on
from its checkpoint. It is judged on the held-out requests: AUC of every objective with positives, calibration fitted on
one half of the held-out users and measured on the other. ``require`` is RL's gate. Left out: continuing from an older
reward model (it trains in seconds), exposures of users who hid their history.

Shapes: N exposures, B requests, T items of each, X objectives, K numbers.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.rewards.base import BaseConfig
from models.rewards.fusion import by_information
from models.rewards.measures import auc_interval, stay_agreement
from models.rewards.pscore import OBJECTIVES, PScore, fused_loss, tower_loss
from models.rewards.reward import REWARD, WATCH, RewardModel, save_reward, sids_digest
from models.rewards.session import SESSION_OBJECTIVES, SessionReward, session_labels, session_loss
from models.rewards.stay import Stay
from models.tokenizer.vocabulary import Catalogue
from models.training import checkpoint
from models.training.config import FitConfig
from models.training.data import RunData
from models.training.device import prepare_device, rank, world
from models.training.fusion import FUSION_ROWS, refit
from models.training.judged import Example, Judged, finite, measure, predict
from models.training.loop import Loss, Plan, fit
from models.training.ray import launch
from models.training.stage import rounded

WHOLE = 5
"""Items of a session worth judging a session reward on: in shorter ones chance decides what share was liked."""


class RewardTooWeak(RuntimeError):
    """The reward model knows too little to learn from by RL; the message says how little and what to do."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(FitConfig):
    """Training of the reward model; all constants are ours."""

    epochs: int = 2
    batch_requests: int = 128
    max_steps: int = 600
    learning_rate: float = 2e-3
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    d_model: int = 64
    heads: int = 4
    tower: int = 32
    embed: int = 16
    dropout: float = 0.1
    weights: tuple[float, ...] = ()
    """Of every objective in the fused score, in the order of ``OBJECTIVES``; empty: ``fusion.by_information``."""
    sessions: bool = False
    """Also train the session reward, for models that write whole lists."""
    least_auc: float = 0.55
    """RL does not start while the reward model's AUC of ``gate`` is below; 0 = no gate."""
    gate: str = "long_view"
    least_positives: int = 100
    """With fewer positives (or negatives) held out the gate cannot tell and lets RL start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in OBJECTIVES or not 0 <= self.least_auc < 1:
            raise ValueError(
                f"gate {self.gate!r} must be one of {', '.join(OBJECTIVES)}, least_auc {self.least_auc} in [0, 1)"
            )
        if self.weights and (len(self.weights) != len(OBJECTIVES) or min(self.weights) < 0 or not sum(self.weights)):
            raise ValueError(
                f"weights are {self.weights}; expected one each for {', '.join(OBJECTIVES)}, at least 0 and not all 0"
            )

    def sizes(self, catalogue: Catalogue) -> BaseConfig:
        """The models' sizes for this catalogue."""
        return BaseConfig(
            levels=catalogue.levels,
            codes=catalogue.codes,
            embed=self.embed,
            d_model=self.d_model,
            heads=self.heads,
            tower=self.tower,
            dropout=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class RewardJob:
    """One training: everything a worker needs."""

    data: Path
    catalogue: Catalogue
    config: RewardConfig
    output: Path
    init: None = None

    def fingerprint(self) -> dict[str, Any]:
        """What decides the outcome."""
        files = {name: checkpoint.sha256(self.data / name) for name in checkpoint.DATA}
        sids = hashlib.sha256(self.catalogue.sids.tobytes()).hexdigest()
        decoded: dict[str, Any] = json.loads(
            json.dumps({"stage": "reward", "config": asdict(self.config), "catalogue": sids, **files})
        )
        return decoded


def train_reward(
    data: Path, catalogue: Catalogue, config: RewardConfig, output: Path, *, ray_address: str = "", name: str = "reward"
) -> dict[str, Any]:
    """Trains into ``output`` (reward.safetensors, config.json, metrics.json, metrics.jsonl); returns the metrics.

    A rerun resumes; a finished one returns its metrics. Raises ValueError when nothing can be trained on,
    TrainingDiverged.
    """
    job = RewardJob(data=data, catalogue=catalogue, config=config, output=output)
    return launch(train, job, ray_address=ray_address, name=name)


def train(job: RewardJob) -> dict[str, Any]:
    """What the worker runs."""
    data = RunData.load(job.data)
    held = data.held_out
    judged = Judged(data, job.catalogue, ~held)
    pscore, metrics = fit_pscore(judged, job.config, job.output, job.fingerprint())
    # The last MLP learned from towers that moved; now that they stand it learns once more, in seconds.
    known = predict(pscore, judged, judged.newest(FUSION_ROWS), job.config)
    device = pscore.bias.device
    pscore.fuse = refit(pscore.fuse, known, fusion_weights(job.config, judged.rates)).to(device)
    unseen = predict(pscore, judged, held, job.config)
    measured, constants = measure(unseen, job.config.gate)
    pscore.calibrate(*constants)
    stay = Stay.fit(known.logits[:, WATCH], known.labels[:, WATCH], judged.play_times())
    play_ms, duration_ms = (data.column(name)[unseen.rows] for name in ("play_ms", "duration_ms"))
    told = stay.seconds(unseen.logits[:, WATCH], duration_ms)
    measured["reward/stay"] = finite(stay_agreement(told, play_ms / 1000))
    session = None
    if job.config.sessions:
        session, metrics["session"] = fit_session(judged, job.config, job.output / "session", job.fingerprint())
    metrics = rounded({**metrics, **measured})
    if rank() == 0:
        reward = assembled(judged, pscore, stay, session, measured)
        save_reward(job.output / REWARD, reward)
        checkpoint.write_json(job.output / checkpoint.CONFIG, {"training": job.fingerprint()})
        checkpoint.write_json(job.output / checkpoint.METRICS, metrics)
        for folder in (job.output, job.output / "session"):
            (folder / checkpoint.CHECKPOINT).unlink(missing_ok=True)
    return metrics


def assembled(
    judged: Judged, pscore: PScore, stay: Stay, session: SessionReward | None, metrics: Mapping[str, Any]
) -> RewardModel:
    """The parts as a bundle carries them."""
    return RewardModel(
        pscore=pscore.eval().requires_grad_(False),
        stay=stay,
        session=None if session is None else session.eval().requires_grad_(False),
        numbers=judged.numbers_now(),
        sids=sids_digest(judged.catalogue, len(judged.catalogue)),
        metrics=dict(metrics),
    )


def fusion_weights(config: RewardConfig, rates: np.ndarray) -> np.ndarray:
    """float64 [X], as configured or by information."""
    return np.asarray(config.weights, float) if config.weights else by_information(rates)


def fit_pscore(
    judged: Judged, config: RewardConfig, output: Path, fingerprint: Mapping[str, Any]
) -> tuple[PScore, dict[str, Any]]:
    """P-Score trained on ``judged.train``; raises ValueError when no request can be trained on."""
    device = prepare_device(config.threads, world())
    torch.manual_seed(config.seed)
    model = PScore(config.sizes(judged.catalogue))
    model.start(torch.from_numpy(judged.rates))
    weights = torch.from_numpy(fusion_weights(config, judged.rates)).float().to(device)

    def objective(called: nn.Module, example: Example) -> Loss:
        logits, fused = called(example.context, example.items)
        towers, parts = tower_loss(logits, example.labels, example.mask)
        value = towers + fused_loss(fused, example.labels, weights, example.mask) / weights.sum().clamp(min=1e-9)
        count = int(example.mask.sum())
        return Loss(value, {f"bce/{name}": each for name, each in parts.items()}, count, count, weight=count)

    metrics = _fit(model.to(device), judged, config, output, fingerprint, objective)
    return model.eval(), metrics


def fit_session(
    judged: Judged, config: RewardConfig, output: Path, fingerprint: Mapping[str, Any]
) -> tuple[SessionReward, dict[str, Any]]:
    """The session reward trained on whole requests of ``judged.train``, and its losses."""
    device = prepare_device(config.threads, world())
    torch.manual_seed(config.seed)
    model = SessionReward(config.sizes(judged.catalogue))
    model.start(torch.from_numpy(judged.rates), average_session(judged, config))

    def objective(called: nn.Module, example: Example) -> Loss:
        logits = called(example.context, example.items, example.mask)
        labels = session_labels(example.labels, example.seconds, example.mask)
        value, sessions = session_loss(logits, labels, example.mask), int(example.mask.any(1).sum())
        return Loss(value, {}, sessions, int(example.mask.sum()), weight=sessions)

    metrics = _fit(model.to(device), judged, config, output, fingerprint, objective)
    logits, labels, users = _predict_sessions(model.eval(), judged, config)
    columns = enumerate(SESSION_OBJECTIVES)
    middle = np.median(labels[:, :2], 0) if len(labels) else np.zeros(2)  # of seconds and share of long views
    cut = labels > np.r_[middle, 0, 0]
    metrics["auc"] = {name: finite(asdict(auc_interval(cut[:, x], logits[:, x], users))) for x, name in columns}
    return model, metrics


def average_session(judged: Judged, config: RewardConfig, parts: int = 20) -> Tensor:
    """float32 [4], the mean session label over the first ``parts`` batches of training."""
    batches = judged.batches(judged.train, config, shuffle=True)
    found = [judged.example(batches(step)) for step in range(min(parts, len(batches)))]
    if not found:
        return torch.full((len(SESSION_OBJECTIVES),), 0.5)
    return torch.cat([session_labels(each.labels, each.seconds, each.mask) for each in found]).mean(0)


def _fit(
    model: nn.Module,
    judged: Judged,
    config: RewardConfig,
    output: Path,
    fingerprint: Mapping[str, Any],
    objective: Any,
) -> dict[str, Any]:
    """The one fit loop on this worker's batches; all epochs, or the newest ``max_steps``."""
    batches, device = judged.batches(judged.train, config, shuffle=True), next(model.parameters()).device
    if not len(batches):
        raise ValueError(
            f"no request can train the reward model: {len(judged.data)} exposures, {int(judged.train.sum())} not held "
            f"out, {len(judged.contexts.trainable)} requests with features"
        )
    available = len(batches) * config.epochs
    steps = max(available // config.accumulate, 1)
    steps = min(steps, config.max_steps) if config.max_steps else steps
    skipped = max(available - steps * config.accumulate, 0)
    plan = Plan(
        steps=steps,
        example=lambda number: judged.example(batches(number + skipped), device),
        objective=objective,
        training=fingerprint,
    )
    metrics = fit(model, plan, config, output)
    return {name: value for name, value in metrics.items() if not name.startswith("load")}


@torch.no_grad()
def _predict_sessions(
    model: SessionReward, judged: Judged, config: RewardConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, labels) float32 [R, 4] and users [R] of held-out requests with at least ``WHOLE`` items."""
    device = next(model.parameters()).device
    batches = judged.batches(~judged.train, config, shuffle=False)
    none = np.empty((0, len(SESSION_OBJECTIVES)), np.float32)
    found: list[tuple[np.ndarray, ...]] = [(none, none, np.empty(0, np.int32))]
    for step in range(len(batches)):
        example = judged.example(batches(step), device)
        logits = model(example.context, example.items, example.mask).float().cpu().numpy()
        labels = session_labels(example.labels, example.seconds, example.mask).cpu().numpy()
        users = judged.data.sequences.events["user"][example.batch.exposures[:, 0]]
        whole = (example.batch.exposures >= 0).sum(1) >= WHOLE
        found.append((logits[whole], labels[whole], users[whole]))
    logits, labels, users = (np.concatenate(part) for part in zip(*found, strict=True))
    return logits, labels, users


def require(metrics: Mapping[str, Any], config: RewardConfig) -> None:
    """RL's gate: raises RewardTooWeak when the reward model's AUC of ``config.gate`` is below ``least_auc``.

    With too few held-out positives or negatives nobody can tell, and RL may start.
    """
    found = metrics["reward/auc"][config.gate]
    rare = min(found["positives"], found["rows"] - found["positives"])
    if not config.least_auc or found["value"] is None or rare < config.least_positives:
        return
    if found["value"] < config.least_auc:
        raise RewardTooWeak(
            f"the reward model's AUC of {config.gate} is {found['value']:.3f} on {found['rows']} held-out exposures "
            f"({found['positives']} positive), below {config.least_auc}: reinforcement learning from such labels makes "
            "recommendations worse. Give it more data, look at the feedback that arrives, align by RSFT alone "
            "(align.objective rsft), or lower reward.least_auc"
        )
