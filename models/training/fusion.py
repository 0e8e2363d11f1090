"""The P-Score's final MLP trained again for other weights, and the Pareto search over them (models.rewards.fusion).

The towers stay as they are (the final MLP sends no gradient into them), so what it reads is computed once, and a trial
takes a second. Left out: searching in the pipeline, which takes the recipe's weights.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.rewards.fusion import Step, pareto_search
from models.rewards.measures import FEWEST, auc
from models.rewards.pscore import OBJECTIVES, fused_loss
from models.training.judged import LONG_WATCH, Predictions

FUSION_ROWS = 60_000
"""Newest training exposures that the final MLP is trained again on."""


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """Full batches would take longer and find the same; the constants are ours."""

    steps: int = 150
    batch: int = 4096
    learning_rate: float = 3e-3
    seed: int = 0


def refit(
    head: nn.Sequential, known: Predictions, weights: np.ndarray, config: RefitConfig | None = None
) -> nn.Sequential:
    """A copy of the final MLP ``head``, on the CPU, trained on ``known`` with ``weights`` [X]."""
    config = config or RefitConfig()
    torch.manual_seed(config.seed)
    model = copy.deepcopy(head).cpu().requires_grad_(True)
    features, labels = torch.from_numpy(known.features), torch.from_numpy(known.labels)
    factor = torch.from_numpy(weights / weights.sum()).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        rows = torch.randint(len(features), (config.batch,))
        fused: Tensor = model(features[rows]).squeeze(-1)
        loss = fused_loss(fused, labels[rows], factor, torch.ones(len(rows)))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def search(
    head: nn.Sequential,
    known: Predictions,
    validation: Predictions,
    start: np.ndarray,
    *,
    rounds: int = 30,
    config: RefitConfig | None = None,
) -> tuple[list[Step], np.ndarray]:
    """The path of the Pareto search from weights ``start`` [X] and the ceiling: the towers' own AUCs [X].

    Objectives with fewer than ``FEWEST`` positives in ``validation`` take no part.
    """
    ceiling = np.array([objective_auc(validation, x, validation.logits[:, x]) for x in range(len(OBJECTIVES))])

    def evaluate(weights: np.ndarray) -> np.ndarray:
        scores = refit(head, known, weights, config)(torch.from_numpy(validation.features)).squeeze(-1).numpy()
        return np.array([objective_auc(validation, x, scores) for x in range(len(OBJECTIVES))])

    return pareto_search(start, ceiling, evaluate, rounds=rounds), ceiling


def objective_auc(found: Predictions, x: int, scores: np.ndarray) -> float:
    """AUC of ``scores`` for objective ``x`` turned so that more is better; NaN with too few positives."""
    happened = found.labels[:, x] > LONG_WATCH
    if min(happened.sum(), (~happened).sum()) < FEWEST:
        return float("nan")
    return auc(happened, scores)
