"""Comparing arms on people: matched blocks, shares of users and assignment by hash, paired bootstrap intervals.

Users are sorted by what they did *before* the experiment and cut into blocks of as many users as there are
arms; inside a block a hash decides who gets which arm (a matched-pair design). Differences between arms are
then taken block by block, which removes most of the variance between heavy and light users.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval and the number of pairs behind it."""

    mean: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Who is in which arm. ``blocks[i][arm]`` is the user of block ``i`` in that arm."""

    arms: tuple[str, ...]
    blocks: tuple[dict[str, str], ...]

    def arm_of(self) -> dict[str, str]:
        """user id -> arm."""
        return {user: arm for block in self.blocks for arm, user in block.items()}


@dataclass(frozen=True, kw_only=True)
class Split:
    """A share of all users by a salted hash: the same user is in the same arm wherever and whenever it is asked."""

    share: float
    salt: str

    def arm(self, user: str) -> str:
        """ "canary" or "stable"."""
        place = int.from_bytes(_hash(user, self.salt), "big") / 2**64
        return "canary" if place < self.share else "stable"


def assign(before: Mapping[str, float], arms: Sequence[str], salt: str) -> Assignment:
    """Blocks of users alike in ``before`` (their pre-period measure), arms inside a block by hash of the user id.

    A last incomplete block is left out of the experiment. Raises ValueError when no block can be filled.
    """
    ordered = sorted(before, key=lambda user: (-before[user], user))
    blocks = []
    for first in range(0, len(ordered) - len(arms) + 1, len(arms)):
        block = sorted(ordered[first : first + len(arms)], key=lambda user: _hash(user, salt))
        blocks.append(dict(zip(arms, block, strict=True)))
    if not blocks:
        raise ValueError(f"{len(before)} users cannot fill one block of {len(arms)} arms; give at least {len(arms)}")
    return Assignment(arms=tuple(arms), blocks=tuple(blocks))


def paired_difference(
    assignment: Assignment, measure: Mapping[str, float], arm: str, rival: str, *, samples: int = 4000, seed: int = 0
) -> Interval:
    """Mean over blocks of ``measure(arm) - measure(rival)``, with a percentile bootstrap over blocks.

    A user absent from ``measure`` counts as 0: somebody who does not come back has no stay time.
    """
    pairs = np.array(
        [measure.get(block[arm], 0.0) - measure.get(block[rival], 0.0) for block in assignment.blocks], np.float64
    )
    return bootstrap_mean(pairs, samples=samples, seed=seed)


def adjusted_difference(
    assignment: Assignment,
    measure: Mapping[str, float],
    baseline: Mapping[str, float],
    arm: str,
    rival: str,
    *,
    samples: int = 4000,
    seed: int = 0,
) -> Interval:
    """``paired_difference`` less what ``baseline`` predicts of it (CUPED; Deng et al., WSDM 2013).

    ``baseline`` is the same measure from a time when both arms were treated alike, so that its expected difference is
    0 and whatever difference it shows is the luck of the draw.
    """
    pairs, luck = (
        np.array([values.get(block[arm], 0.0) - values.get(block[rival], 0.0) for block in assignment.blocks])
        for values in (measure, baseline)
    )
    slope = float(np.cov(pairs, luck)[0, 1] / luck.var(ddof=1)) if len(luck) > 1 and luck.var() > 0 else 0.0
    return bootstrap_mean(pairs - slope * luck, samples=samples, seed=seed)


def bootstrap_mean(values: np.ndarray, *, samples: int = 4000, seed: int = 0) -> Interval:
    """Mean of ``values`` with a 95 % percentile bootstrap interval; NaN bounds when there are none."""
    if len(values) == 0:
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"), pairs=0)
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(samples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), pairs=len(values))


def _hash(user: str, salt: str) -> bytes:
    return hashlib.blake2b(f"{salt}\x1f{user}".encode(), digest_size=8).digest()
