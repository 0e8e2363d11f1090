"""What roll-outs are rewarded with: predicted stay, in seconds.

The platform's predicted stay (``models.rewards.stay``) with more to go by: the regression also reads what the log
itself tells of taste (``benchmarks.alignment_taste``). Everything is learned from the log. Ours: V1 (arXiv 2506.13695)
rewards with the P-Score itself, which has no notion of seconds.

Shapes: M logged views, B requests, G items of each, K numbers of the regression.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from benchmarks.alignment_taste import Taste, scores, taste_of
from benchmarks.alignment_world import Lab
from models.pathways import ContextTensors
from models.rewards.inputs import target_items
from models.rewards.reward import WATCH, RewardModel
from models.rewards.stay import PlayTimes
from models.tokenizer.vocabulary import Catalogue
from models.training.config import FitConfig
from models.training.data import RunData
from models.training.judged import Judged, predict

SHARPNESS = 1.6
"""The regression's slope is multiplied by this: logged views were chosen, so that the log shows too little of how much
people differ. Chosen on a world (seed 100) that is not reported."""
ROWS = 20_000
"""Newest views that the regression reads."""


@dataclass(frozen=True, kw_only=True)
class Stay:
    """``Reward`` of roll-outs: expected seconds of each item."""

    reward: RewardModel
    catalogue: Catalogue
    taste: Taste
    users: np.ndarray
    """Ids of the users behind the requests, by the requests' numbers."""
    slopes: np.ndarray
    """[K] of the P-Score's logit and the columns of the taste."""
    shift: float
    spread: float
    plays: PlayTimes
    timed: bool = True
    """Seconds; else the normal score itself, which knows no duration."""

    def __call__(self, context: ContextTensors, items: np.ndarray, requests: np.ndarray) -> np.ndarray:
        """float [B, G] seconds or scores, NaN where there is no item."""
        rows = np.maximum(items, 0)
        numbers = self.reward.numbers[rows]
        with torch.no_grad():
            logits, _ = self.reward.pscore(context, target_items(rows, numbers, self.catalogue, context.mask.device))
        told = self.taste.features(self.users[requests], rows)
        score = self.shift + np.concatenate([logits[..., WATCH, None].cpu().numpy(), told], -1) @ self.slopes
        value = self.plays.seconds(score, self.spread, self.catalogue.duration_ms[rows]) if self.timed else score
        return np.where(items >= 0, value, np.nan)

    def asked_by(self, users: np.ndarray, taste: Taste) -> "Stay":
        """The same for the requests of other ``users``, whose taste is known from their own views."""
        return replace(self, users=users, taste=taste)


@cache
def organic_stay(lab: Lab) -> Stay:
    """Predicted stay as the organic log taught it; computed once."""
    data, reward = RunData.load(lab.data), lab.reward()
    judged = Judged(data, lab.catalogue, ~data.held_out)
    found = predict(reward.pscore, judged, judged.newest(ROWS), FitConfig(batch_requests=64))
    taste, earlier = taste_of(data, lab.catalogue)
    x = np.column_stack([found.logits[:, WATCH], earlier[found.rows], np.ones(len(found.rows))])
    y = scores(data)[found.rows]
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    return Stay(
        reward=reward,
        catalogue=lab.catalogue,
        taste=taste,
        users=np.empty(0, object),
        slopes=SHARPNESS * weights[:-1],
        # Sharper, and of the same mean.
        shift=float(weights[-1] + (1 - SHARPNESS) * (x[:, :-1] @ weights[:-1]).mean()),
        spread=float((y - x @ weights).std()),
        plays=PlayTimes.of(data.column("play_ms"), data.column("duration_ms")),
    )
