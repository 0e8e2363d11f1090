"""How good a reward model is: AUC with a bootstrap interval over users, how honest its probabilities and seconds are.

Platt's calibration (``sigmoid(scale * logit + shift)``) keeps the order, so AUCs stay as they are. Left out: isotonic
calibration, which needs more positives than rare flags have.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import spearmanr

RESAMPLES = 400
FEWEST = 10
"""Positives (and negatives) below which an AUC or a calibration says nothing."""


@dataclass(frozen=True, kw_only=True)
class Auc:
    """An AUC, its 95 % interval over users (NaN when it cannot be told) and how many positives are behind it."""

    value: float
    low: float
    high: float
    positives: int
    rows: int


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Chance that a positive stands above a negative, ties counted half; NaN without either."""
    order = np.unique(scores, return_inverse=True)[1].reshape(-1)
    return _auc(np.asarray(labels, bool), order, np.ones(len(order)) if weights is None else weights)


def auc_interval(
    labels: np.ndarray, scores: np.ndarray, users: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Auc:
    """AUC with a percentile bootstrap that draws whole users, since a user's rows are alike."""
    labels = np.asarray(labels, bool)
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < FEWEST:
        return Auc(value=float("nan"), low=float("nan"), high=float("nan"), positives=positives, rows=len(labels))
    order = np.unique(scores, return_inverse=True)[1].reshape(-1)
    user = np.unique(users, return_inverse=True)[1].reshape(-1)
    people, rng = int(user.max()) + 1, np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(0, people, people), minlength=people)
        drawn.append(_auc(labels, order, times[user].astype(float)))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    whole = _auc(labels, order, np.ones(len(labels)))
    return Auc(value=whole, low=float(low), high=float(high), positives=positives, rows=len(labels))


def platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(scale > 0, shift) of least cross-entropy; (1, 0) when a class is too rare to tell. Labels lie in [0, 1]."""
    total = float(labels.sum())
    if min(total, len(labels) - total) < FEWEST:
        return 1.0, 0.0

    def loss(parameters: np.ndarray) -> float:
        z = np.exp(parameters[0]) * logits + parameters[1]
        entropy = -(labels * log_expit(z) + (1 - labels) * log_expit(-z)).mean()
        return float(entropy + 1e-4 * parameters[0] ** 2)  # separable scores have no finite scale

    found = minimize(loss, np.zeros(2), method="BFGS").x
    return float(np.exp(found[0])), float(found[1])


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: mean gap between prediction and outcome over ``bins`` equally large groups."""
    if not len(probabilities):
        return float("nan")
    groups = np.array_split(np.argsort(probabilities, kind="stable"), min(bins, len(probabilities)))
    gaps = [len(rows) * abs(float(probabilities[rows].mean() - labels[rows].mean())) for rows in groups]
    return sum(gaps) / len(probabilities)


def stay_agreement(predicted_s: np.ndarray, played_s: np.ndarray) -> dict[str, float]:
    """Of predicted and true seconds of views [M]: Spearman's ``rho`` (NaN when either is constant) and both means."""
    if not len(played_s):
        return {"rho": np.nan, "predicted_s": np.nan, "played_s": np.nan}
    varied = np.ptp(predicted_s) > 0 and np.ptp(played_s) > 0
    rho = float(spearmanr(predicted_s, played_s).statistic) if varied else np.nan
    return {"rho": rho, "predicted_s": float(predicted_s.mean()), "played_s": float(played_s.mean())}


def probability(logits: np.ndarray, scale: float, shift: float) -> np.ndarray:
    """``sigmoid(scale * logit + shift)``."""
    found: np.ndarray = expit(scale * logits + shift)
    return found


def _auc(labels: np.ndarray, order: np.ndarray, weights: np.ndarray) -> float:
    """``order``: dense ranks of the scores."""
    positive = np.bincount(order, weights * labels)
    negative = np.bincount(order, weights * ~labels)
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")
