"""A run's exposures as reward models see them, what a model predicts for them, and how good that is.

Every exposure is judged with the context of its request and its item's record just before it. Calibration is fitted on
one half of the users and measured on the other. Left out: judging items that were never shown.

Shapes: N exposures, M of them predicted, B requests, T items of each, X objectives, K numbers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.histories.windows import Limits
from features.schema import FLAGS
from models.pathways import ContextTensors, to_tensors
from models.rewards.inputs import TargetItems, item_numbers, target_items, totals, totals_before
from models.rewards.measures import Auc, auc_interval, calibration_error, platt, probability
from models.rewards.pscore import OBJECTIVES, PScore
from models.rewards.stay import PlayTimes
from models.tokenizer.vocabulary import Catalogue
from models.training.config import FitConfig
from models.training.data import Batch, Batches, Contexts, RunData
from models.training.device import rank, world
from models.training.stage import play_quantile

LONG_WATCH = 0.5
"""Where the quantile ``watch`` is cut in two to have an AUC: watched longer than most exposures of like duration."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A batch as tensors."""

    context: ContextTensors
    items: TargetItems
    labels: Tensor
    """[B, T, X] float32."""
    seconds: Tensor
    """[B, T] float32, played."""
    mask: Tensor
    """[B, T] bool."""
    batch: Batch


class Judged:
    """A run's exposures as a reward model sees them; ``train`` (bool [N]) are those it may learn from."""

    def __init__(self, data: RunData, catalogue: Catalogue, train: np.ndarray, limits: Limits | None = None) -> None:
        self.data, self.catalogue, self.train = data, catalogue, train
        self.contexts = Contexts(data, catalogue, limits or Limits())
        self.labels = labels_of(data)
        self.rates = self.labels[train].mean(0) if train.any() else np.full(len(OBJECTIVES), 0.5)
        item = data.sequences.events["item"]
        self.rows = np.where(item >= 0, self.contexts.item_rows[item], -1) if len(self.contexts.item_rows) else item
        before = totals_before(self.rows, data.times_ms, self.labels)
        duration = np.where(self.rows >= 0, catalogue.duration_ms[np.maximum(self.rows, 0)], 0)
        self.numbers = item_numbers(before, duration, self.rates)
        """float32 [N, K], of each exposure's item just before it."""

    def numbers_now(self) -> np.ndarray:
        """float32 [items, K], of every item by all that may be learned from."""
        counts = totals(np.where(self.train, self.rows, -1), self.labels, len(self.catalogue))
        return item_numbers(counts, self.catalogue.duration_ms, self.rates)

    def play_times(self) -> PlayTimes:
        """How views are watched, by all that may be learned from."""
        play, duration = (self.data.column(name)[self.train] for name in ("play_ms", "duration_ms"))
        return PlayTimes.of(play, duration)

    def newest(self, rows: int) -> np.ndarray:
        """bool [N], the newest ``rows`` exposures that may be learned from."""
        chosen, known = np.zeros(len(self.train), bool), np.flatnonzero(self.train)
        chosen[known[np.argsort(-self.data.times_ms[known], kind="stable")[:rows]]] = True
        return chosen

    def batches(self, select: np.ndarray, config: FitConfig, *, shuffle: bool) -> Batches:
        """Batches of the exposures in ``select`` (bool [N]); this worker's part of them when they are shuffled."""
        return Batches(
            self.data,
            self.contexts,
            self.catalogue,
            select,
            batch_requests=config.batch_requests // (config.accumulate if shuffle else 1),
            shuffle_window=config.shuffle_window if shuffle else 1,
            seed=config.seed,
            rank=rank() if shuffle else 0,
            workers=world() if shuffle else 1,
        )

    def example(self, batch: Batch, device: torch.device | str = "cpu") -> Example:
        """The batch as tensors."""
        mask = batch.exposures >= 0
        rows = np.where(mask, batch.exposures, 0)
        labels = np.where(mask[..., None], self.labels[rows], 0).astype(np.float32)
        seconds = np.where(mask, self.data.column("play_ms")[rows] / 1000, 0).astype(np.float32)
        return Example(
            context=to_tensors(batch.context, self.catalogue, device),
            items=target_items(batch.items, self.numbers[rows], self.catalogue, device),
            labels=torch.from_numpy(labels).to(device),
            seconds=torch.from_numpy(seconds).to(device),
            mask=torch.from_numpy(mask).to(device),
            batch=batch,
        )


def labels_of(data: RunData) -> np.ndarray:
    """float32 [N, X]: ``watch`` as the play time's quantile among exposures of like duration, and the flags."""
    flags = np.stack([data.column(flag) for flag in FLAGS], 1).astype(np.float32)
    watch = play_quantile(data.column("play_ms"), data.column("duration_ms")).astype(np.float32)
    return np.concatenate([watch[:, None], flags], 1)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """A model's raw logits of M logged exposures."""

    logits: np.ndarray
    """float32 [M, X], before calibration."""
    fused: np.ndarray
    """float32 [M]"""
    features: np.ndarray
    """float32 [M, fused_width], what the final MLP reads."""
    labels: np.ndarray
    """float32 [M, X]"""
    users: np.ndarray
    """int32 [M]"""
    rows: np.ndarray
    """int64 [M], rows of the run's exposures."""


@torch.no_grad()
def predict(model: PScore, judged: Judged, select: np.ndarray, config: FitConfig) -> Predictions:
    """Predictions for the exposures in ``select`` (bool [N]) that have a context."""
    device = next(model.parameters()).device
    batches = judged.batches(select, config, shuffle=False)
    found: list[tuple[np.ndarray, ...]] = []
    for step in range(len(batches)):
        example = judged.example(batches(step), device)
        told, read = model.features(example.context, example.items)
        mask = example.mask
        parts = (told[mask], model.fuse(read).squeeze(-1)[mask], read[mask], example.labels[mask])
        rows = example.batch.exposures[example.batch.exposures >= 0]
        found.append((*(part.float().cpu().numpy() for part in parts), rows))
    x, f = len(OBJECTIVES), model.fused_width
    none = (np.empty((0, x)), np.empty(0), np.empty((0, f)), np.empty((0, x)), np.empty(0, np.int64))
    logits, fused, features, labels, rows = (np.concatenate(part) for part in zip(*(found or [none]), strict=True))
    users = judged.data.sequences.events["user"][rows]
    return Predictions(logits=logits, fused=fused, features=features, labels=labels, users=users, rows=rows)


def measure(found: Predictions, gate: str = "long_view") -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """AUC and calibration error of every objective, and Platt's constants (scale, shift) float32 [X].

    Constants are fitted on one half of the users; the error is the other half's.
    """
    half = found.users % 2 == 0
    aucs, errors, constants = {}, {}, []
    for x, name in enumerate(OBJECTIVES):
        aucs[name] = objective_auc(found, x, found.logits[:, x])
        scale, shift = platt(found.logits[half, x], found.labels[half, x])
        constants.append((scale, shift))
        errors[name] = calibration_error(probability(found.logits[~half, x], scale, shift), found.labels[~half, x])
    fused = {name: objective_auc(found, x, found.fused).value for x, name in enumerate(OBJECTIVES)}
    scales, shifts = torch.tensor(constants, dtype=torch.float32).unbind(1)
    metrics = {
        "reward/gate": gate,
        "reward/auc": {name: finite(asdict(each)) for name, each in aucs.items()},
        "reward/fused_auc": finite(fused),
        "reward/calibration_error": finite(errors),
    }
    return metrics, (scales, shifts)


def objective_auc(found: Predictions, x: int, scores: np.ndarray) -> Auc:
    """AUC of ``scores`` [M] for objective number ``x``, users drawn whole."""
    return auc_interval(found.labels[:, x] > LONG_WATCH, scores, found.users)


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN is no JSON."""
    absent = {name for name, value in values.items() if isinstance(value, float) and not np.isfinite(value)}
    return {name: None if name in absent else value for name, value in values.items()}
