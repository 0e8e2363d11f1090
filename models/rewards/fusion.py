"""Choosing the weights of the fused score by iterative Pareto search (Pantheon, arXiv 2505.13894).

Again and again the weight of the objective that lags most is raised: the one whose own tower ranks it best beyond what
``p`` does. A raise is kept when that objective gains more AUC than all others lose together, so that the sum only
grows; otherwise the objective has to wait until something else has changed. When all of them wait, none can gain
without as much of the others' loss, and the search ends. The rule of exchange, the factor and the tolerance are ours.
Left out: a search over several weights at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FACTOR = 2.0
"""What a weight is raised by."""
TOLERANCE = 1e-4
"""AUC that a raise must gain beyond what it costs."""
MOST_WEIGHT = 100.0
"""Largest weight of the search, as a multiple of the smallest."""
MOST_INFORMATION = 10.0
"""Largest weight by information, as a multiple of an even chance's: rarer labels would drown the others in noise."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One trial of the search."""

    weights: np.ndarray
    """float64 [X], mean 1 over the objectives that take part."""
    aucs: np.ndarray
    """float64 [X], AUC of ``p`` for each objective; NaN where it cannot be told."""
    raised: int
    """The objective whose weight was raised, -1 at the start."""
    kept: bool


def pareto_search(
    start: np.ndarray, ceiling: np.ndarray, evaluate: Callable[[np.ndarray], np.ndarray], *, rounds: int = 30
) -> list[Step]:
    """The search's path, first to last trial; the last one that was kept is the outcome.

    ``ceiling`` [X] are the AUCs of the objectives' own towers, NaN for those that take no part (their weight stays 0 or
    what it is); ``evaluate`` trains the final MLP with weights [X] and gives the AUCs of ``p``.
    """
    if start.shape != ceiling.shape or (start < 0).any() or not start.sum() > 0:
        raise ValueError(f"weights {start.shape} must match the AUCs {ceiling.shape}, be at least 0 and not all 0")
    weights = start / start[start > 0].mean()
    best = Step(weights=weights, aucs=evaluate(weights), raised=-1, kept=True)
    path, waiting = [best], ~np.isfinite(ceiling) | (start == 0)
    for _ in range(rounds):
        lag = np.where(waiting, -np.inf, ceiling - best.aucs)
        if not np.isfinite(lag).any() or lag.max() <= TOLERANCE:
            break
        raised = int(lag.argmax())
        trial = _raise(best.weights, raised)
        if trial is None:
            waiting[raised] = True
            continue
        aucs = evaluate(trial)
        change = np.where(np.isfinite(ceiling), aucs - best.aucs, 0.0)
        losses = -np.delete(change, raised).clip(max=0.0).sum()
        kept = bool(change[raised] > losses + TOLERANCE)
        path.append(Step(weights=trial, aucs=aucs, raised=raised, kept=kept))
        if kept:
            best = path[-1]
            waiting = ~np.isfinite(ceiling) | (start == 0)
        else:
            waiting[raised] = True
    return path


def chosen(path: list[Step]) -> Step:
    """The outcome of a search."""
    return [step for step in path if step.kept][-1]


def by_information(rates: np.ndarray) -> np.ndarray:
    """Weights [X] inverse to the entropy of the average label, mean 1: every objective's loss starts alike (ours).

    An objective that never or always happens says nothing and gets 0; weights differ by ``MOST_INFORMATION`` at most.
    """
    inside = (rates > 0) & (rates < 1)
    safe = np.where(inside, rates, 0.5)
    entropy = -(safe * np.log(safe) + (1 - safe) * np.log(1 - safe))
    weights = np.where(inside, 1 / np.maximum(entropy, np.log(2) / MOST_INFORMATION), 0.0)
    return weights / weights[inside].mean() if inside.any() else weights


def _raise(weights: np.ndarray, row: int) -> np.ndarray | None:
    """``weights`` with one raised, mean 1 again; None when it outweighs the others too far already."""
    trial = weights.copy()
    trial[row] *= FACTOR
    trial /= trial[trial > 0].mean()
    return None if trial[row] > MOST_WEIGHT * trial[trial > 0].min() else trial
