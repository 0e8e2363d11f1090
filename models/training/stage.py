"""What pre-training and alignment share: the job a worker gets, its tensors, exposure weights, the held-out check."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from features.histories.windows import Limits
from models.architectures import model_of
from models.generator import GeneratorConfig
from models.objectives.ntp import ntp_loss
from models.pathways import ContextTensors, to_tensors
from models.rewards.duration import DurationConfig, duration_bucket
from models.tokenizer.vocabulary import Catalogue
from models.training import checkpoint, remote
from models.training.config import FitConfig
from models.training.data import Batch, Batches, Contexts, RunData
from models.training.device import autocast, prepare_device, rank, world
from models.training.loop import Loss, Plan
from models.training.sessions import SessionQuality, session_targets

HELD_OUT_SAMPLES = 1024
"""How many held-out samples are scored; a fixed slice, so that before and after are paired."""
TOP_SHARE = 1 / 8
"""Recall of the first code is counted in the likeliest eighth of the codes: chance is 1/8 for every codebook size."""
WATCHED_SECONDS = (0.2, 240.0)
"""Bounds of a play time that counts as a weight: a skip is not nothing, a video left running is not everything."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(FitConfig):
    """A stage's optimisation and how much each exposure counts in its NTP loss."""

    exposure_weight: Literal["all", "engaged", "watched"] = "all"
    """``all``: every exposure alike, as V2 trains. The others are ours, because training on all exposures imitates the
    policy that chose them. ``engaged``: 0.1 + the play time's quantile among exposures of like duration. ``watched``:
    seconds played, so that the model leans to what is watched long."""
    propensity_power: float = 0.0
    """Weights are divided by (exposures of the item + 10) to this power: 0 is V2's; 1 forgets how often the logging
    policy chose an item, so that what is shown most is not taken for what is liked most. Ours."""
    positive_weight: float = 1.0
    """Factor for exposures with high engagement; 1 is V2's."""
    session_seconds: int = 60
    """Watch time that makes a session worth learning from, for a model of sessions (models.training.sessions)."""
    session_engagements: int = 1
    """Items liked, collected, forwarded, commented on or followed in it; 0 for logs without such flags."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exposure_weight not in ("all", "engaged", "watched") or self.positive_weight < 0:
            raise ValueError(
                f"exposure_weight {self.exposure_weight!r} must be 'all', 'engaged' or 'watched' and "
                f"positive_weight {self.positive_weight} at least 0"
            )
        if not 0 <= self.propensity_power <= 1:
            raise ValueError(f"propensity_power is {self.propensity_power}; it must lie in [0, 1]")


Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True, kw_only=True, eq=False)
class Job(Generic[Config]):
    """One stage of one run: everything a worker needs, and nothing that is not a value or a path."""

    stage: str
    data: Path
    catalogue: Catalogue
    model: GeneratorConfig
    config: Config
    output: Path
    init: Path | None
    code_vectors: np.ndarray | None = None
    """float32 [L, C, embed], the tokenizer's codebooks: where code embeddings start when there is no ``init``."""
    store: str = ""
    """Prefix of a copy of the checkpoint in object storage; empty: checkpoints stay in ``output``."""

    def __post_init__(self) -> None:
        if (self.model.codes, self.model.levels) != (self.catalogue.codes, self.catalogue.levels):
            raise ValueError(
                f"the model has {self.model.levels} levels of {self.model.codes} codes, the catalogue "
                f"{self.catalogue.levels} of {self.catalogue.codes}; build the model's configuration for this catalogue"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What decides the outcome; see ``checkpoint.fingerprint``."""
        config = asdict(self.config)
        return checkpoint.fingerprint(self.stage, config, self.model, self.data, self.catalogue.sids, self.init)

    @property
    def remote(self) -> str:
        """Key of the copy, "" without a store: one for each outcome, so that other inputs start afresh."""
        digest = hashlib.sha256(json.dumps(self.fingerprint(), sort_keys=True).encode()).hexdigest()
        return f"{self.store}/{digest[:16]}.safetensors" if self.store else ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A batch as tensors; padding has mask False and codes -1."""

    context: ContextTensors
    targets: Tensor
    """[B, T, L] long."""
    mask: Tensor
    """[B, T] bool."""
    batch: Batch
    number: int = 0
    """Which part of the training it is."""


class Workshop(Generic[Config]):
    """A job opened by a worker: data in memory, the model with its initial weights on its device."""

    def __init__(self, job: Job[Config]) -> None:
        self.job, self.config, self.catalogue = job, job.config, job.catalogue
        self.device = prepare_device(job.config.threads, world())
        torch.manual_seed(job.config.seed)
        self.model = model_of(job.model)
        self.model.remember(torch.from_numpy(job.catalogue.sids.astype(np.int64)))
        if job.init is not None:
            checkpoint.load_weights(self.model, job.init, job.model)
        elif job.code_vectors is not None:
            self.model.start_from_codebooks(torch.from_numpy(job.code_vectors))
        self.model.to(self.device)
        self.data = RunData.load(job.data)
        self.contexts = Contexts(self.data, job.catalogue, Limits())

    def batches(self) -> Batches:
        """Parts of this worker's training steps: all exposures not held out; raises ValueError without any."""
        made = Batches(
            self.data,
            self.contexts,
            self.catalogue,
            self.targets & ~self.data.held_out,
            batch_requests=self.config.batch_requests // self.config.accumulate,
            shuffle_window=self.config.shuffle_window,
            seed=self.config.seed,
            rank=rank(),
            workers=world(),
        )
        if not len(made):
            raise ValueError(
                f"no request in {self.job.data} can be trained on: {len(self.data)} exposures, "
                f"{len(self.contexts.trainable)} requests with features, {self.data.held_out.sum()} exposures held "
                f"out, {self.targets.sum()} fit to be a target"
            )
        return made

    def plan(
        self,
        batches: Batches,
        objective: Callable[[nn.Module, Example], Loss],
        guard: Callable[[], str | None] | None = None,
    ) -> Plan[Example]:
        """All epochs of ``batches``; when ``max_steps`` is fewer, the oldest data are left out."""
        parts, available = self.config.accumulate, len(batches) * self.config.epochs
        steps = max(available // parts, 1)
        steps = min(steps, self.config.max_steps) if self.config.max_steps else steps
        skipped = max(available - steps * parts, 0)
        return Plan(
            steps=steps,
            example=lambda number: replace(self.example(batches(number + skipped)), number=number),
            objective=objective,
            training=self.job.fingerprint(),
            guard=guard,
            remote=self.job.remote,
        )

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the stage's outcome with ``metrics`` and the held-out measures; every worker calls it."""
        complete = rounded({**metrics, **self.measure()})
        checkpoint.finish(self.job.output, self.model, self.job.fingerprint(), complete)
        if rank() == 0:
            remote.remove(self.job.remote)
        return complete

    def example(self, batch: Batch) -> Example:
        """The batch as tensors on this worker's device."""
        mask = batch.items >= 0
        sids = self.catalogue.sids.astype(np.int64)[np.where(mask, batch.items, 0)]
        targets = np.where(mask[..., None], sids, -1)
        return Example(
            context=to_tensors(batch.context, self.catalogue, self.device),
            targets=torch.from_numpy(targets).to(self.device),
            mask=torch.from_numpy(mask).to(self.device),
            batch=batch,
        )

    def of_exposures(self, values: np.ndarray, example: Example, padding: float = 0.0) -> Tensor:
        """``values`` [N, ...] of each target's exposure, [B, T, ...] float32; ``padding`` where there is none."""
        rows = example.batch.exposures
        absent = (rows < 0).reshape(rows.shape + (1,) * (values.ndim - 1))
        found = np.where(absent, padding, values[np.maximum(rows, 0)]).astype(np.float32)
        return torch.from_numpy(found).to(self.device)

    @cached_property
    def weights(self) -> np.ndarray:
        """float32 [N], how much each exposure counts in the NTP loss."""
        data, config = self.data, self.config
        weights = np.ones(len(data), np.float32)
        if config.exposure_weight == "engaged":
            weights = (0.1 + play_quantile(data.column("play_ms"), data.column("duration_ms"))).astype(np.float32)
        if config.exposure_weight == "watched":
            weights = np.clip(data.watched_seconds(), *WATCHED_SECONDS)
        if config.positive_weight != 1:
            weights[data.positive()] *= config.positive_weight
        if config.propensity_power:
            item = pd.factorize(data.column("item_id"))[0]
            weights /= ((np.bincount(item) + 10.0) ** config.propensity_power)[item]
        return (weights / max(weights.mean(), 1e-9)).astype(np.float32)

    @cached_property
    def targets(self) -> np.ndarray:
        """bool [N]: exposures worth being a target; a model of sessions learns whole good ones."""
        if self.model.items == 1:
            return np.ones(len(self.data), bool)
        quality = SessionQuality(
            watched=self.model.items,
            total_ms=1000 * self.config.session_seconds,
            engagements=self.config.session_engagements,
        )
        return session_targets(self.data, self.contexts, self.model.items, quality)

    @cached_property
    def _held_out(self) -> list[Example]:
        select = self.data.held_out & (self.targets if self.model.items > 1 else self.data.positive())
        batches = Batches(self.data, self.contexts, self.catalogue, select, batch_requests=128)
        return [self.example(batches(step)) for step in range(min(len(batches), HELD_OUT_SAMPLES // 128))]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Teacher-forced on held-out engaged exposures: mean loss, how often the first code is in the top eighth."""
        self.model.eval()
        loss = hits = targets = 0.0
        for example in self._held_out:
            with autocast(self.config.precision, self.device):
                logits = self.model(example.context, example.targets)
            count = float(example.mask.sum())
            loss += float(ntp_loss(logits, example.targets, example.mask.float())) * count
            first = logits[:, :, 0].topk(max(int(TOP_SHARE * logits.shape[-1]), 1)).indices == example.targets[:, :, :1]
            hits += float((first.any(-1) & example.mask).sum())
            targets += count
        count = max(targets, 1.0)
        return {"holdout/targets": targets, "holdout/loss": loss / count, "holdout/recall_level1": hits / count}


def play_quantile(play_ms: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
    """float64 [N] in (0, 1]: mid-rank of each play time among exposures in the same duration bucket."""
    bucket = duration_bucket(duration_ms, DurationConfig())
    order = np.lexsort((play_ms, bucket))
    b, p = bucket[order], play_ms[order]
    group = np.r_[True, b[1:] != b[:-1]][: len(b)]
    tie = group | np.r_[True, p[1:] != p[:-1]][: len(p)]
    sizes = np.bincount(np.cumsum(group) - 1) if len(b) else np.empty(0, np.int64)
    place = np.arange(len(b)) - np.repeat(np.flatnonzero(group), sizes)
    run = np.cumsum(tie) - 1
    mean = np.bincount(run, place) / np.bincount(run) if len(b) else np.empty(0)
    quantile = np.empty(len(b))
    quantile[order] = (mean[run] + 0.5) / np.repeat(sizes, sizes) if len(b) else quantile
    return quantile


def rounded(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """``metrics`` with floats cut to six digits, as files and dashboards want them."""
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in metrics.items()}
