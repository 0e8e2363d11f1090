"""How a person responds to a video, given how well it suits them: a Gaussian copula around measured marginals.

Affinity becomes a standard-normal score ``z`` relative to organic traffic (``AffinityScale``). The view's percentile
among organic views of the same duration is ``p = Phi(rho z + sqrt(1 - rho^2) e)``, and its play ratio is the duration
bucket's quantile function at ``p``: under organic traffic the marginals are the measured ones whatever ``rho`` is, and
better recommendations earn more play. Feedback is logistic in ``z`` and in ``Phi^-1(p)``. A long view is KuaiRand's own
definition: at least min(duration, 18 s), true of 99.75 % of KuaiRand-Pure. Left out: copulas with heavier tails.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, ndtr, ndtri

from features.schema import FLAGS

BUCKET_EDGES_MS = np.array([7, 15, 30, 60, 120, 240]) * 1000
BUCKETS = len(BUCKET_EDGES_MS) + 1
LONG_VIEW_MS = 18_000
DRAWN_FLAGS = tuple(f for f in FLAGS if f != "long_view")
DRAWS = 1 + len(DRAWN_FLAGS)
"""Uniform numbers one view consumes: the play time and every flag but long_view, which follows from the play time."""

Z_LIMIT = 4.0
_GRID = ndtr(np.linspace(-3.5, 3.5, 141))


def bucket_of(duration_ms: np.ndarray) -> np.ndarray:
    """Duration bucket, 0 (< 7 s) to 6 (>= 240 s)."""
    return np.digitize(duration_ms, BUCKET_EDGES_MS)


@dataclass(frozen=True, kw_only=True)
class AffinityScale:
    """Turns raw affinities into standard-normal scores among organic views of the same bucket; ``knots`` [B, grid]."""

    knots: np.ndarray

    @classmethod
    def fit(cls, affinity: np.ndarray, bucket: np.ndarray) -> "AffinityScale":
        """From the affinities [n] of organic views; a bucket with fewer than 50 views uses all of them."""
        knots = np.empty((BUCKETS, len(_GRID)))
        for b in range(BUCKETS):
            own = affinity[bucket == b]
            knots[b] = np.quantile(own if len(own) >= 50 else affinity, _GRID)
        # np.interp wants increasing knots; equal affinities (cold users) would make flat steps.
        return cls(knots=knots + np.arange(len(_GRID)) * 1e-9)

    def z(self, affinity: np.ndarray, bucket: np.ndarray) -> np.ndarray:
        """Standard-normal score, of the shape of ``affinity``; linear beyond the ends of what was seen."""
        bucket = np.broadcast_to(bucket, affinity.shape)
        score = np.empty(affinity.shape)
        grid = ndtri(_GRID)
        for b in np.unique(bucket):
            where, knots = bucket == b, self.knots[b]
            own = affinity[where]
            slope = (grid[-11] - grid[10]) / max(knots[-11] - knots[10], 1e-6)
            beyond = np.maximum(own - knots[-1], 0) + np.minimum(own - knots[0], 0)
            score[where] = np.interp(own, knots, grid) + slope * beyond
        return np.clip(score, -Z_LIMIT, Z_LIMIT)


@dataclass(frozen=True, kw_only=True)
class Views:
    """Responses of one shape: play time (ms), percentile among organic views of the bucket, and the flags."""

    play_ms: np.ndarray
    percentile: np.ndarray
    flags: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Parameters of the response model.

    ``probabilities`` [Q] and ``ratios`` [B, Q]: quantile function of play/duration; ``rho`` [B]: correlation of
    affinity and play; ``intercepts`` [F, B], ``play_weights`` [F], ``affinity_weights`` [F]: logits of ``DRAWN_FLAGS``.
    """

    probabilities: np.ndarray
    ratios: np.ndarray
    rho: np.ndarray
    intercepts: np.ndarray
    play_weights: np.ndarray
    affinity_weights: np.ndarray

    def views(self, z: np.ndarray, duration_ms: np.ndarray, draws: np.ndarray) -> Views:
        """Responses to items of affinity score ``z`` and ``duration_ms``, from uniforms ``draws`` [DRAWS, *z.shape]."""
        bucket = bucket_of(duration_ms)
        rho = self.rho[bucket]
        score = rho * z + np.sqrt(1 - rho**2) * ndtri(draws[0])
        percentile = self.percentile(score)
        play = self.play_ms(score, duration_ms)
        logits = self.intercepts[:, bucket] + np.multiply.outer(self.play_weights, score)
        drawn = draws[1:] < expit(logits + np.multiply.outer(self.affinity_weights, z))
        flags = dict(zip(DRAWN_FLAGS, drawn, strict=True))
        flags["long_view"] = play >= np.minimum(duration_ms, LONG_VIEW_MS)
        return Views(play_ms=play, percentile=percentile, flags={f: flags[f] for f in FLAGS})

    def percentile(self, score: np.ndarray) -> np.ndarray:
        """Of a view's normal score among organic views of like duration."""
        found: np.ndarray = ndtr(score)
        return found

    def play_ms(self, score: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
        """int64, the play time of views with normal scores ``score``; shapes broadcast."""
        bucket = np.broadcast_to(bucket_of(duration_ms), score.shape)
        return np.rint(self._ratio(self.percentile(score), bucket) * duration_ms).astype(np.int64)

    def _ratio(self, percentile: np.ndarray, bucket: np.ndarray) -> np.ndarray:
        right = np.clip(np.searchsorted(self.probabilities, percentile), 1, len(self.probabilities) - 1)
        low, high = self.probabilities[right - 1], self.probabilities[right]
        share = np.clip((percentile - low) / (high - low), 0, 1)
        return (1 - share) * self.ratios[bucket, right - 1] + share * self.ratios[bucket, right]

    def expected_play_ms(self, z: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
        """Mean play time (ms) of one view, over the noise, for oracles; shapes broadcast."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(15)
        bucket = np.broadcast_to(bucket_of(duration_ms), z.shape)
        rho = self.rho[bucket]
        total = np.zeros(z.shape)
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            total += weight * self._ratio(ndtr(rho * z + np.sqrt(1 - rho**2) * node), bucket)
        return total * duration_ms
