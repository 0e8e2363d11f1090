"""Figures of a real short-video app that the simulator follows, and the response model calibrated to them.

Measured on KuaiRand-Pure (Gao et al., KuaiRand, CIKM 2022), 219 301 impressions of April and May 2022 with a positive
duration and without exact duplicates. The log has no ``collect`` signal: its rate is assumed to be half that of likes.
"""

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from features.world.responses import BUCKETS, DRAWN_FLAGS, Responses

DURATION_SHARE = np.array([0.008, 0.120, 0.142, 0.156, 0.225, 0.211, 0.120])
DURATION_RANGE_S = np.array([[5, 7], [7, 15], [15, 30], [30, 60], [60, 120], [120, 240], [240, 420]])
"""Share of impressions by duration bucket, and the bounds (s) of each bucket's durations."""

ZERO_PLAY = np.array([0.061, 0.075, 0.060, 0.078, 0.139, 0.124, 0.075])
PLAY_PROBABILITIES = np.array([0.15, 0.25, 0.375, 0.5, 0.625, 0.75, 0.825, 0.9, 0.95, 0.98, 0.99, 0.998])
PLAY_RATIOS = np.array(
    [
        [0.191, 0.297, 0.592, 0.868, 1.089, 1.248, 1.555, 2.084, 2.618, 3.691, 5.225, 14.10],
        [0.095, 0.138, 0.216, 0.369, 0.702, 1.047, 1.120, 1.340, 1.956, 2.643, 3.503, 7.460],
        [0.053, 0.077, 0.122, 0.225, 0.529, 0.995, 1.057, 1.129, 1.417, 1.989, 2.309, 3.957],
        [0.025, 0.039, 0.067, 0.134, 0.356, 0.831, 0.999, 1.038, 1.104, 1.353, 1.739, 2.732],
        [0.007, 0.017, 0.033, 0.067, 0.180, 0.511, 0.828, 1.004, 1.024, 1.076, 1.199, 1.977],
        [0.005, 0.009, 0.015, 0.028, 0.061, 0.188, 0.383, 0.807, 1.002, 1.017, 1.041, 1.298],
        [0.003, 0.005, 0.008, 0.014, 0.026, 0.074, 0.168, 0.379, 0.840, 1.004, 1.011, 1.088],
    ]
)
"""Quantiles of play/duration, zero plays included, by duration bucket."""

FLAG_RATES = {
    "click": (0.445, 0.399, 0.454, 0.482, 0.487, 0.445, 0.415),
    "like": (0.0444, 0.0258, 0.0191, 0.0204, 0.0154, 0.0125, 0.0107),
    "follow": (0.0011, 0.0010, 0.0006, 0.0015, 0.0015, 0.0014, 0.0016),
    "comment": (0.0033, 0.0030, 0.0036, 0.0024, 0.0026, 0.0019, 0.0022),
    "forward": (0.0016, 0.0010, 0.0009, 0.0011, 0.0008, 0.0007, 0.0006),
    "collect": (0.0222, 0.0129, 0.0096, 0.0102, 0.0077, 0.0062, 0.0054),
    "dislike": (0.0008,) * BUCKETS,
    "profile_enter": (0.0298, 0.0133, 0.0138, 0.0179, 0.0223, 0.0243, 0.0147),
}
LONG_VIEW_RATES = np.array([0.472, 0.287, 0.311, 0.351, 0.357, 0.305, 0.274])

HOUR_SHARE = np.array(
    [4.1, 2.4, 1.6, 1.0, 0.8, 0.9, 1.6, 2.5, 3.2, 3.9, 4.5, 5.1]
    + [5.8, 5.7, 5.2, 5.2, 5.6, 6.0, 5.7, 5.3, 5.6, 5.7, 6.5, 6.2]
)
"""Per cent of impressions by local hour; the simulated world's local time is UTC."""

ACTIVE_DAYS_SHARE = 0.34
NEXT_DAY_RETURN = 0.45
"""Share of days on which a user is active (4.8 of 14), and chance of coming back the day after an active day."""

_PLAY_WEIGHTS = {"click": 5.7, "like": 0.6, "follow": 0.7, "comment": 1.1, "forward": 0.6, "collect": 0.6}
_PLAY_WEIGHTS |= {"dislike": -0.3, "profile_enter": 0.9}
_AFFINITY_WEIGHTS = {"click": 0.3, "like": 0.6, "follow": 0.6, "comment": 0.4, "forward": 0.6, "collect": 0.6}
_AFFINITY_WEIGHTS |= {"dislike": -1.0, "profile_enter": 0.4}


def kuairand_responses(rho: float) -> Responses:
    """Responses whose organic marginals are the figures above; ``rho`` in [0, 1): how much affinity decides play."""
    probabilities = np.unique(np.r_[0, ZERO_PLAY, PLAY_PROBABILITIES, 1])
    ratios = np.stack([_quantile_function(b, probabilities) for b in range(BUCKETS)])
    play = np.array([_PLAY_WEIGHTS[f] for f in DRAWN_FLAGS])
    affinity = np.array([_AFFINITY_WEIGHTS[f] for f in DRAWN_FLAGS])
    # The logit's linear part is normal with this deviation under organic traffic (z and the play score have
    # variance 1 and correlation rho), so the intercept that gives the measured rate is one root per flag and bucket.
    spread = np.sqrt(play**2 + affinity**2 + 2 * rho * play * affinity)
    intercepts = [[_intercept(r, s) for r in FLAG_RATES[f]] for f, s in zip(DRAWN_FLAGS, spread, strict=True)]
    return Responses(
        probabilities=probabilities,
        ratios=ratios,
        rho=np.full(BUCKETS, rho),
        intercepts=np.array(intercepts),
        play_weights=play,
        affinity_weights=affinity,
    )


def _quantile_function(bucket: int, probabilities: np.ndarray) -> np.ndarray:
    points = np.r_[0, ZERO_PLAY[bucket], PLAY_PROBABILITIES, 1]
    ratios = PLAY_RATIOS[bucket]
    return np.interp(probabilities, points, np.r_[0, 0, ratios, ratios[-1]])


def _intercept(rate: float, spread: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    weights = weights / weights.sum()
    return float(brentq(lambda b: weights @ expit(b + spread * nodes) - rate, -60, 60))
