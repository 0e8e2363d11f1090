"""Predicted stay: for how many seconds a user will watch an item, from the P-Score's ``watch`` tower.

The tower says where a play time will stand among views of like duration, so that long videos do not win by being long.
Whoever wants people to stay needs seconds: the tower's logit gives a normal score of that place by a regression, and
the place gives a share of the duration by what views of like duration were watched; expected seconds are the mean over
the regression's spread. Ours: V1 (arXiv 2506.13695, 2.4.1) ranks by the P-Score itself. Left out: when a person leaves.

Shapes: M logged views, K duration buckets, Q quantiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from models.rewards.duration import DurationConfig, duration_bucket

LEVELS = np.linspace(0.005, 0.995, 100)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
FEWEST = 200
"""Views that a duration bucket needs for quantiles of its own; a rarer one takes the nearest bucket's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlayTimes:
    """How views are watched, by duration bucket."""

    buckets: np.ndarray
    """int64 [K], ascending."""
    ratios: np.ndarray
    """float64 [K, Q], quantiles (``LEVELS``) of play time / duration."""

    @classmethod
    def of(cls, play_ms: np.ndarray, duration_ms: np.ndarray) -> "PlayTimes":
        """Of logged views [M]; raises ValueError without any."""
        if not len(play_ms):
            raise ValueError("there are no views to learn play times from")
        bucket = duration_bucket(duration_ms, DurationConfig())
        ratio = play_ms / np.maximum(duration_ms, 1)
        names, counts = np.unique(bucket, return_counts=True)
        common = names[counts >= min(FEWEST, counts.max())]
        return cls(buckets=common, ratios=np.stack([np.quantile(ratio[bucket == each], LEVELS) for each in common]))

    def seconds(self, score: np.ndarray, spread: float, duration_ms: np.ndarray) -> np.ndarray:
        """Expected play time of views whose normal score is normal around ``score`` (any shape) with ``spread``."""
        found = duration_bucket(duration_ms, DurationConfig())
        row, ratio = np.abs(found[..., None] - self.buckets).argmin(-1), np.zeros(score.shape)
        for each in np.unique(row):
            own = row == each
            for node, weight in zip(NODES, WEIGHTS / WEIGHTS.sum(), strict=True):
                ratio[own] += weight * np.interp(ndtr(score[own] + spread * node), LEVELS, self.ratios[each])
        return ratio * duration_ms / 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Stay:
    """From a ``watch`` logit and a duration to seconds."""

    plays: PlayTimes
    slope: float
    shift: float
    spread: float
    """The normal score is normal around ``slope * logit + shift`` with this standard deviation."""

    @classmethod
    def fit(cls, logits: np.ndarray, quantile: np.ndarray, plays: PlayTimes) -> "Stay":
        """From what the tower said of M logged views and where their play times stood, ``quantile`` in (0, 1]."""
        score = normal_score(quantile)
        x = np.column_stack([logits, np.ones(len(logits))])
        line = np.linalg.lstsq(x, score, rcond=None)[0]
        return cls(plays=plays, slope=float(line[0]), shift=float(line[1]), spread=float((score - x @ line).std()))

    def arrays(self) -> dict[str, np.ndarray]:
        """As a file holds them."""
        line = np.array([self.slope, self.shift, self.spread])
        return {"buckets": self.plays.buckets, "ratios": self.plays.ratios, "line": line}

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray]) -> "Stay":
        """What ``arrays`` gave."""
        slope, shift, spread = (float(each) for each in arrays["line"])
        plays = PlayTimes(buckets=arrays["buckets"], ratios=arrays["ratios"])
        return cls(plays=plays, slope=slope, shift=shift, spread=spread)

    def seconds(self, logits: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
        """float64, expected play time of items with these ``watch`` logits and durations (same shape)."""
        return self.plays.seconds(self.slope * logits + self.shift, self.spread, duration_ms)


def normal_score(quantile: np.ndarray) -> np.ndarray:
    """float64, the normal deviate of a place in (0, 1]; the outermost places are cut off."""
    found: np.ndarray = ndtri(np.clip(quantile, LEVELS[0], LEVELS[-1]))
    return found
