"""Blessing (after TFX): value thresholds and change thresholds decide whether a candidate may be published.

A value threshold bounds the candidate alone; a change threshold bounds it against the model in production,
measured on the same held-out requests in the same run. The decision is stored beside the metrics, readable by a
person. Left out: infra validation on a running server (issue of continuous operation).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from features.runs import Run
from features.storage import connect

OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """``metric <operator> bound``; for a change threshold the metric is candidate / production."""

    metric: str
    operator: str
    bound: float
    change: bool = False
    against_production: bool = False
    """The metric is already a comparison; it passes when nothing is in production."""

    def check(self, candidate: Mapping[str, float], production: Mapping[str, float] | None) -> tuple[bool, str]:
        """(passed, sentence). A change threshold passes when there is no production model or its value is 0."""
        if self.against_production and production is None:
            return True, f"{self.metric}: nothing in production to compare with"
        if self.metric not in candidate:
            return False, f"{self.metric} was not measured; it must be {self.operator} {self.bound:g}"
        value = float(candidate[self.metric])
        if not self.change:
            passed = OPERATORS[self.operator](value, self.bound)
            return passed, f"{self.metric} = {value:.4g}, must be {self.operator} {self.bound:g}"
        if production is None or not production.get(self.metric):
            return True, f"{self.metric} = {value:.4g}, nothing in production to compare with"
        ratio = value / float(production[self.metric])
        passed = OPERATORS[self.operator](ratio, self.bound)
        return passed, (
            f"{self.metric} = {value:.4g}, {ratio:.3f} of production's {float(production[self.metric]):.4g}, "
            f"must be {self.operator} {self.bound:g}"
        )


THRESHOLDS = (
    Threshold(metric="requests", operator=">=", bound=20),
    Threshold(metric="recall@50", operator=">=", bound=0.01),
    Threshold(metric="legality", operator=">=", bound=0.1),
    Threshold(metric="illegal_items", operator="<=", bound=0),
    Threshold(metric="coverage", operator=">=", bound=0.02),
    Threshold(metric="over_production_high", operator=">=", bound=0, against_production=True),
    Threshold(metric="recall@50", operator=">=", bound=0.6, change=True),
    Threshold(metric="legality", operator=">=", bound=0.8, change=True),
)
"""The bounds are ours, not published. ``over_production_high`` is the upper end of the paired 95 % interval of
recall@50, candidate less production: below 0 the candidate is worse beyond doubt; with few requests a plain ratio would
refuse good candidates for noise."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A gate's outcome with one sentence per threshold."""

    blessed: bool
    passed: tuple[str, ...]
    failed: tuple[str, ...]


def decide(
    candidate: Mapping[str, float],
    production: Mapping[str, float] | None,
    thresholds: Sequence[Threshold] = THRESHOLDS,
) -> Decision:
    """Blessed when every threshold passes."""
    checked = [threshold.check(candidate, production) for threshold in thresholds]
    failed = tuple(sentence for passed, sentence in checked if not passed)
    return Decision(blessed=not failed, passed=tuple(sentence for passed, sentence in checked if passed), failed=failed)


def bless_run(run_id: str) -> bool:
    """Decides on the run's evaluation and stores the record under ``runs/<run_id>/gate/decision.json``."""
    storage = connect()
    metrics: dict[str, Any] = Run(storage, run_id).summary("evaluate")
    decision = decide(metrics["candidate"], metrics.get("production"))
    storage.put_json(f"runs/{run_id}/gate/decision.json", asdict(decision))
    for sentence in decision.failed:
        print(f"refused: {sentence}")
    print("blessed" if decision.blessed else "not blessed")
    return decision.blessed
