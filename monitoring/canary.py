"""When to promote a canary, roll it back, or go on: a group-sequential test with a stated error rate.

Users are compared, not exposures: one user's exposures resemble each other. At each of a planned number of looks every
measure is tested one-sided for non-inferiority, H0: canary <= (1 - margin) * stable - floor, on all users. The error
rate is spent over the looks, alpha * ((k / K)^2 - ((k - 1) / K)^2) at look k, and added up by the union bound: it holds
however the looks depend on each other, which they do when the same users come back (Lan & DeMets' spending with
independent increments would be a little quicker and is not valid here). Promotion wants every measure to pass, so a
canary that is worse by the margin in any one is promoted at a rate of at most ``error_rate``; rolling back wants one
measure to be worse than stable beyond the same rate, shared among the measures. Undecided at the last look rolls back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import stdtr

PROMOTE, ROLLBACK, CONTINUE = "promote", "rollback", "continue"
MEASURED = ("stay_seconds", "dislikes")
NOTHING = dict.fromkeys(MEASURED, 0.0)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is compared."""

    name: str
    margin: float
    """The bearable relative loss."""
    more_is_better: bool = True
    floor: float = 0.0
    """A loss a user that is bearable beside the relative one: of what hardly ever happens, a share is nothing."""

    def __post_init__(self) -> None:
        if not 0 < self.margin < 1 or self.floor < 0:
            raise ValueError(
                f"{self.name!r} has margin {self.margin} and floor {self.floor}; expected a share between 0 and 1, and "
                "at least 0"
            )


STAY_TIME = Measure(name="stay_seconds", margin=0.05)
DISLIKES = Measure(name="dislikes", margin=0.5, more_is_better=False, floor=0.05)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a canary is judged; the bounds are ours."""

    looks: int = 6
    error_rate: float = 0.05
    minimum_users: int = 100
    """Of each arm; with fewer a look decides nothing, and its share of the error rate is not used."""
    measures: tuple[Measure, ...] = (STAY_TIME, DISLIKES)

    def __post_init__(self) -> None:
        if self.looks < 1 or not 0 < self.error_rate < 0.5 or not self.measures:
            raise ValueError(
                f"a plan of {self.looks} looks at {len(self.measures)} measures with error rate {self.error_rate} "
                "cannot be kept; give at least 1 look and 1 measure, and a rate between 0 and 0.5"
            )

    def spend(self, look: int) -> float:
        """The part of the error rate that look ``look`` (from 1) may use."""
        return self.error_rate * (look**2 - (look - 1) ** 2) / self.looks**2


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm's users, of one measure, as sufficient statistics."""

    users: int
    mean: float
    variance: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Arm":
        """From one value a user."""
        array = np.asarray(values, np.float64)
        if not np.isfinite(array).all():
            raise ValueError("a measure holds values that are not finite; give one number for each user")
        return cls(
            users=len(array),
            mean=float(array.mean()) if len(array) else 0.0,
            variance=float(array.var(ddof=1)) if len(array) > 1 else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do, and a sentence for each measure."""

    action: str
    look: int
    reasons: tuple[str, ...]


def judge(look: int, arms: Mapping[str, tuple[Arm, Arm]], plan: Plan) -> Verdict:
    """The verdict of look ``look`` (from 1); ``arms`` holds (stable, canary) by the name of each measure."""
    if not 1 <= look <= plan.looks:
        raise ValueError(f"look {look} is not planned; the plan has looks 1 to {plan.looks}")
    missing = [measure.name for measure in plan.measures if measure.name not in arms]
    if missing:
        raise ValueError(f"no figures were given for {', '.join(missing)}")
    fewest = min(arm.users for measure in plan.measures for arm in arms[measure.name])
    if fewest < plan.minimum_users:
        reason = f"{fewest} users in the smaller arm, {plan.minimum_users} are wanted"
        return Verdict(action=ROLLBACK if look == plan.looks else CONTINUE, look=look, reasons=(reason,))
    rate = plan.spend(look)
    tested = [_test(measure, *arms[measure.name], rate, rate / len(plan.measures)) for measure in plan.measures]
    reasons = tuple(sentence for _, _, sentence in tested)
    if all(good for good, _, _ in tested):
        return Verdict(action=PROMOTE, look=look, reasons=reasons)
    if any(bad for _, bad, _ in tested):
        return Verdict(action=ROLLBACK, look=look, reasons=reasons)
    if look == plan.looks:
        return Verdict(action=ROLLBACK, look=look, reasons=(*reasons, "undecided at the last look"))
    return Verdict(action=CONTINUE, look=look, reasons=reasons)


def _test(measure: Measure, stable: Arm, canary: Arm, good_rate: float, bad_rate: float) -> tuple[bool, bool, str]:
    """(not inferior by the margin, worse than stable, a sentence)."""
    sign = 1 if measure.more_is_better else -1
    bearable = 1 - sign * measure.margin
    good = _p_value(canary, stable, factor=bearable, sign=sign, floor=measure.floor)
    bad = _p_value(canary, stable, factor=1.0, sign=-sign)
    change = f"{canary.mean / stable.mean - 1:+.1%}" if stable.mean else "from nothing"
    sentence = (
        f"{measure.name} {canary.mean:.4g} against {stable.mean:.4g} ({change}); "
        f"p {good:.2g} of being worse by {measure.margin:.0%} or more (promotes below {good_rate:.2g}), "
        f"p {bad:.2g} of not being worse (rolls back below {bad_rate:.2g})"
    )
    return good < good_rate, bad < bad_rate, sentence


def _p_value(canary: Arm, stable: Arm, *, factor: float, sign: int, floor: float = 0.0) -> float:
    """One-sided p of H0: sign * (canary - factor * stable) + floor <= 0, by Welch's t on users."""
    parts = np.array([canary.variance / canary.users, factor**2 * stable.variance / stable.users])
    difference = sign * (canary.mean - factor * stable.mean) + floor
    total = float(parts.sum())
    if total == 0:  # everybody alike: a difference is certain, none says nothing
        return 0.0 if difference > 0 else 1.0
    freedom = total**2 / float((parts**2 / np.array([canary.users - 1, stable.users - 1])).sum())
    return float(stdtr(freedom, -difference / math.sqrt(total)))


def compare(
    exposures: pa.Table, users: Mapping[str, Sequence[str]], before: pa.Table | None = None
) -> dict[str, tuple[Arm, Arm]]:
    """(stable, canary) of stay time and dislikes from EXPOSURE rows; ``users`` names those of "stable" and of "canary".

    A user without exposures counts as 0: somebody who does not come back has no stay time. ``before`` holds exposures
    of an earlier time, when both arms were treated alike: what they predict of each user is taken off (``adjusted``).
    """
    now, earlier = _sums(exposures, "user_id"), _sums(before, "user_id") if before is not None else {}
    found = {}
    for name in MEASURED:
        values, past = (
            {arm: np.array([sums.get(user, NOTHING)[name] for user in users[arm]]) for arm in ("stable", "canary")}
            for sums in (now, earlier)
        )
        values = adjusted(values, past)
        found[name] = (Arm.of(values["stable"]), Arm.of(values["canary"]))
    return found


def compare_requests(stable: pa.Table, canary: pa.Table) -> dict[str, tuple[Arm, Arm]]:
    """(stable, canary) of stay time and dislikes a request, from the EXPOSURE rows that each model answered.

    For traffic that is drawn anew at every request. One person's requests resemble each other, but they fall into both
    arms, which takes variance off the difference: treating them as strangers errs on the side of going on.
    """
    sums = [list(_sums(table, "request_id").values()) for table in (stable, canary)]
    return {name: (Arm.of([s[name] for s in sums[0]]), Arm.of([s[name] for s in sums[1]])) for name in MEASURED}


def adjusted(values: Mapping[str, np.ndarray], past: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``values`` less what each user's ``past`` predicts (CUPED; Deng et al., WSDM 2013), the means' expectation kept.

    One slope and one mean for both arms: the past is the same in expectation, so only chance is taken off.
    """
    filled = [arm for arm in values if len(values[arm])]
    x, y = (
        np.concatenate([each[arm] - each[arm].mean() for arm in filled] or [np.empty(0)]) for each in (past, values)
    )
    if not x.any():
        return dict(values)
    slope, mean = float((x * y).sum() / (x * x).sum()), float(np.concatenate(list(past.values())).mean())
    return {arm: values[arm] - slope * (past[arm] - mean) for arm in values}


def _sums(exposures: pa.Table, by: str) -> dict[str, dict[str, float]]:
    """Seconds watched and dislikes of every user, or of every request."""
    grouped = exposures.select([by]).append_column("stay_seconds", pc.divide(exposures["play_ms"], 1000.0))
    grouped = grouped.append_column("dislikes", pc.cast(exposures["dislike"], pa.int64()))
    rows = grouped.group_by(by).aggregate([(name, "sum") for name in MEASURED]).to_pylist()
    return {row[by]: {name: float(row[f"{name}_sum"]) for name in MEASURED} for row in rows}
