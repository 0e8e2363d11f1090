"""Pre-training: next-token prediction of the SIDs of exposed items (OneRec-V2, arXiv 2508.20900, 2.2-2.3).

The loss is the mean over SID levels, on the newest impressions only; incremental training is the same with ``init``,
the weights of an earlier stage or bundle, on a newer window. Left out: mixing in samples of other tasks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from models.generator import Generator, GeneratorConfig
from models.objectives.item import item_loss
from models.objectives.ntp import ntp_loss
from models.pathways import ContextTensors
from models.tokenizer.vocabulary import Catalogue
from models.training.loop import Loss, fit
from models.training.ray import launch
from models.training.stage import Example, Job, StageConfig, Workshop


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Pre-training; V2 goes once through the data, small data allow several ``epochs``."""

    item_weight: float = 1.0
    """Factor of the item head's loss, for a model that has one (ours)."""


def pretrain(
    data: Path,
    catalogue: Catalogue,
    model: GeneratorConfig,
    config: PretrainConfig,
    output: Path,
    *,
    init: Path | None = None,
    code_vectors: np.ndarray | None = None,
    ray_address: str = "",
    name: str = "pretrain",
    workers: int = 1,
    store: str = "",
) -> dict[str, Any]:
    """Trains on the run's data into ``output`` (model.safetensors, config.json, metrics.json, metrics.jsonl).

    ``init`` is a folder whose weights to go on from; without it code embeddings start from ``code_vectors``. With
    ``ray_address`` it is a Ray Train job of ``workers``, else it runs in this process. A rerun resumes, from the copy
    under ``store`` in object storage when this machine has no checkpoint; a finished one returns its metrics.
    Raises TrainingDiverged.
    """
    job = Job(
        stage="pretrain",
        data=data,
        catalogue=catalogue,
        model=model,
        config=config,
        output=output,
        init=init,
        code_vectors=code_vectors,
        store=store,
    )
    return launch(train, job, ray_address=ray_address, name=name, workers=workers)


def train(job: Job[PretrainConfig]) -> dict[str, Any]:
    """What each worker runs."""
    shop = Workshop(job)
    batches = shop.batches()

    def objective(model: nn.Module, example: Example) -> Loss:
        weights = shop.of_exposures(shop.weights, example)
        count = int((example.batch.items >= 0).sum())
        value, parts = next_item_loss(model, shop.model, example, weights, job.config.item_weight)
        return Loss(value, parts, count, count * job.model.levels, weight=float(weights.sum()))

    metrics = fit(shop.model, shop.plan(batches, objective), job.config, job.output)
    return shop.finish({**metrics, "exposures_per_epoch": batches.examples})


class Scored(Protocol):
    """What a loss is computed on."""

    @property
    def context(self) -> ContextTensors:
        """Of B requests."""

    @property
    def targets(self) -> Tensor:
        """long [B, T, L], -1 on padding."""


def next_item_loss(
    model: nn.Module, generator: Generator, example: Scored, weights_BT: Tensor, item_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """NTP of the targets, plus ``item_weight`` times the item head's loss where there is one; and the parts by name.

    ``model`` is ``generator`` or what wraps it for several workers.
    """
    memory = generator.features.memory
    if not generator.config.item_head or memory is None:
        logits = model(example.context, example.targets)
        return ntp_loss(logits, example.targets, weights_BT, generator.level_loss), {}
    logits, items = model(example.context, example.targets, items=True)
    ntp = ntp_loss(logits, example.targets, weights_BT, generator.level_loss)
    item = item_loss(items, memory.rows(example.targets.clamp(min=0))[-1] - 1, weights_BT)
    return ntp + item_weight * item, {"ntp": float(ntp.detach()), "item": float(item.detach())}
