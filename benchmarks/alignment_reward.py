"""What roll-outs are rewarded with: predicted stay, the P-Score, or (to see the ceiling) the simulator's truth.

Predicted stay turns the P-Score's ``watch`` tower, a quantile among views of like duration, into seconds: the logit is
mapped to the normal score of the quantile by a regression on logged views, and seconds are the mean of the duration
bucket's play times over the regression's spread. Everything is learned from the log. Ours: V1 (arXiv 2506.13695)
rewards with the P-Score itself, which has no notion of seconds.

Shapes: M logged views, B requests, G items of each.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr, ndtri

from benchmarks.alignment_world import Lab
from models.pathways import ContextTensors
from models.rewards.duration import DurationConfig, duration_bucket
from models.rewards.inputs import target_items
from models.rewards.pscore import OBJECTIVES
from models.rewards.reward import RewardModel
from models.tokenizer.vocabulary import Catalogue
from models.training.config import FitConfig
from models.training.data import RunData
from models.training.judged import Judged, predict

LEVELS = np.linspace(0.005, 0.995, 100)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
WATCH = OBJECTIVES.index("watch")
SHARPNESS = 1.3
"""The regression's slope is multiplied by this: logged views were chosen, so that the log shows too little of how much
people differ. Chosen on a world (seed 100) that is not reported."""
ROWS = 20_000
"""Newest views that the regression reads."""


@dataclass(frozen=True, kw_only=True)
class Stay:
    """``Reward`` of roll-outs: expected seconds of each item."""

    reward: RewardModel
    catalogue: Catalogue
    slope: float
    shift: float
    spread: float
    ratios: dict[int, np.ndarray]
    """Quantiles (``LEVELS``) of play/duration by duration bucket."""

    def __call__(self, context: ContextTensors, items: np.ndarray, requests: np.ndarray) -> np.ndarray:
        """float [B, G] seconds, NaN where there is no item."""
        del requests
        rows = np.maximum(items, 0)
        numbers = self.reward.numbers[rows]
        with torch.no_grad():
            logits, _ = self.reward.pscore(context, target_items(rows, numbers, self.catalogue, context.mask.device))
        seconds = self.seconds(logits[..., WATCH].cpu().numpy(), self.catalogue.duration_ms[rows])
        return np.where(items >= 0, seconds, np.nan)

    def seconds(self, logits: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
        """Expected play time of views with ``watch`` logits."""
        score = self.shift + self.slope * logits
        bucket, ratio = nearest(duration_bucket(duration_ms, DurationConfig()), self.ratios), np.zeros(logits.shape)
        for each in np.unique(bucket):
            own = bucket == each
            for node, weight in zip(NODES, WEIGHTS / WEIGHTS.sum(), strict=True):
                ratio[own] += weight * np.interp(ndtr(score[own] + self.spread * node), LEVELS, self.ratios[int(each)])
        return ratio * duration_ms / 1000


def nearest(bucket: np.ndarray, known: dict[int, np.ndarray]) -> np.ndarray:
    """Each bucket, or the closest of the ``known`` ones."""
    names = np.array(sorted(known))
    found: np.ndarray = names[np.abs(bucket[..., None] - names).argmin(-1)]
    return found


def stay(lab: Lab, data: RunData, reward: RewardModel, fewest: int = 200) -> Stay:
    """Predicted stay, calibrated on the newest logged views of ``data``."""
    judged = Judged(data, lab.catalogue, ~data.held_out)
    found = predict(reward.pscore, judged, judged.newest(ROWS), FitConfig(batch_requests=64))
    x = found.logits[:, WATCH]
    y = ndtri(np.clip(found.labels[:, WATCH], 0.005, 0.995))
    slope, shift = np.polyfit(x, y, 1)
    bucket = duration_bucket(data.column("duration_ms"), DurationConfig())
    ratio = data.column("play_ms") / np.maximum(data.column("duration_ms"), 1)
    common = [each for each in np.unique(bucket) if (bucket == each).sum() >= fewest]
    return Stay(
        reward=reward,
        catalogue=lab.catalogue,
        slope=SHARPNESS * float(slope),
        shift=float(shift),
        spread=float((y - shift - slope * x).std()),
        ratios={int(each): np.quantile(ratio[bucket == each], LEVELS) for each in common},
    )
