"""Blessing (after TFX's evaluator and infra validator): what a candidate must show before users may meet it.

A value threshold bounds the candidate alone. A change threshold bounds it against the last blessed model, measured on
the same held-out requests in the same run, its lists judged by the same reward model. Infra validation is what the real
server, started on the candidate, answered (``models.infra``). The decision names the content it is about by digest, and
the pusher refuses any other content; it is kept as JSON and as a page with one sentence for every threshold.
"""

import html
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from features.runs import Run
from features.storage import Storage, connect
from monitoring.page import page

GATE = "gate/decision.json"
GATE_PAGE = "gate/decision.html"
OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """``metric <operator> bound``, of the candidate's value or of how that compares with the last blessed model's."""

    metric: str
    operator: Literal[">=", "<="]
    bound: float
    of: Literal["value", "ratio", "difference", "comparison"] = "value"
    """ratio: candidate / blessed; difference: candidate - blessed; comparison: the metric itself is already one."""

    def check(self, candidate: Mapping[str, float], blessed: Mapping[str, float] | None) -> tuple[bool, str]:
        """(passed, sentence). Without a blessed model there is nothing a comparison could fail."""
        bound = f"must be {self.operator} {self.bound:g}"
        alone = f"{self.metric}: nothing blessed to compare with"
        if self.of == "comparison" and blessed is None:
            return True, alone
        if self.metric not in candidate:
            return False, f"{self.metric} was not measured; it {bound}"
        value = float(candidate[self.metric])
        if self.of in ("value", "comparison"):
            return self._holds(value), f"{self.metric} = {value:.4g}, {bound}"
        if blessed is None or self.metric not in blessed:
            return True, f"{self.metric} = {value:.4g}, nothing blessed to compare with"
        rival = float(blessed[self.metric])
        if self.of == "difference":
            change = value - rival
            return self._holds(change), f"{self.metric} = {value:.4g}, {change:+.3g} against {rival:.4g}, {bound}"
        if not rival:
            return True, f"{self.metric} = {value:.4g}, the blessed model's is 0: no ratio"
        ratio = value / rival
        return self._holds(ratio), f"{self.metric} = {value:.4g}, {ratio:.3f} of the blessed {rival:.4g}, {bound}"

    def _holds(self, value: float) -> bool:
        return OPERATORS[self.operator](value, self.bound)


THRESHOLDS = (
    Threshold(metric="requests", operator=">=", bound=20),
    Threshold(metric="recall@50", operator=">=", bound=0.01),
    Threshold(metric="reward_lift", operator=">=", bound=0.5),
    Threshold(metric="legality", operator=">=", bound=0.1),
    Threshold(metric="illegal_items", operator="<=", bound=0),
    Threshold(metric="coverage", operator=">=", bound=0.02),
    Threshold(metric="calibration_error", operator="<=", bound=0.15),
    Threshold(metric="density", operator="<=", bound=0.9),
    Threshold(metric="latency_ms", operator="<=", bound=1000),
    Threshold(metric="over_production_high", operator=">=", bound=0, of="comparison"),
    Threshold(metric="recall@50", operator=">=", bound=0.6, of="ratio"),
    Threshold(metric="reward", operator=">=", bound=0.9, of="ratio"),
    Threshold(metric="legality", operator=">=", bound=0.8, of="ratio"),
    Threshold(metric="calibration_error", operator="<=", bound=0.1, of="difference"),
    Threshold(metric="cold_start_share", operator=">=", bound=0.25, of="ratio"),
    Threshold(metric="density", operator="<=", bound=0.25, of="difference"),
    Threshold(metric="latency_ms", operator="<=", bound=3, of="ratio"),
)
"""The bounds are ours, not published. ``over_production_high`` is the upper end of the paired 95 % interval of
recall@50, candidate less production: below 0 the candidate is worse beyond doubt; with few requests a plain ratio would
refuse good candidates for noise. What the gate lets through by chance the canary is for."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A gate's outcome with one sentence per threshold, and which content it is about."""

    blessed: bool
    passed: tuple[str, ...]
    failed: tuple[str, ...]
    version: str = ""
    digest: str = ""
    """Content digest of the bundle that was judged (``models.bundle.content_digest``)."""
    against: str = ""
    """The version it was compared with; empty when nothing was blessed yet."""
    decided_at: str = ""


def decide(
    candidate: Mapping[str, float],
    blessed: Mapping[str, float] | None,
    thresholds: Sequence[Threshold] = THRESHOLDS,
) -> Decision:
    """Blessed when every threshold passes."""
    checked = [threshold.check(candidate, blessed) for threshold in thresholds]
    failed = tuple(sentence for passed, sentence in checked if not passed)
    return Decision(blessed=not failed, passed=tuple(sentence for passed, sentence in checked if passed), failed=failed)


def blessing(evaluation: Mapping[str, Any], infra: Mapping[str, Any] | None) -> Decision:
    """All thresholds on ``evaluation`` (the stage's summary) and every check of the infra validation's."""
    found = decide(evaluation["candidate"], evaluation.get("production"))
    checks = infra or {"passed": [], "failed": ["the real server was not started on the candidate"]}
    judged, served = evaluation.get("bundle", {}), checks.get("bundle", {})
    failed = (*found.failed, *(f"server: {sentence}" for sentence in checks["failed"]))
    if infra is not None and served != judged:
        failed = (*failed, f"server: it was started on {served}, what was evaluated is {judged}")
    return Decision(
        blessed=not failed,
        passed=(*found.passed, *(f"server: {sentence}" for sentence in checks["passed"])),
        failed=failed,
        version=judged.get("version", ""),
        digest=judged.get("digest", ""),
        against=judged.get("against", ""),
        decided_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def bless_run(run_id: str) -> bool:
    """Decides on the run's evaluation and stores record and page under ``runs/<run_id>/gate/``."""
    storage = connect()
    run = Run(storage, run_id)
    evaluated, validated = run.done("evaluate"), run.done("infra")
    current = bool(evaluated and validated and validated["inputs"].get("evaluated") == evaluated["digest"])
    decision = blessing(run.summary("evaluate"), run.summary("infra") if current else None)
    keep(storage, f"runs/{run_id}", decision)
    for sentence in decision.failed:
        print(f"refused: {sentence}")
    print(f"{decision.version} is {'blessed' if decision.blessed else 'not blessed'}")
    return decision.blessed


def keep(storage: Storage, prefix: str, decision: Decision) -> None:
    """Stores the decision as a record and as a page a person can read."""
    storage.put(f"{prefix}/{GATE_PAGE}", render(decision).encode(), "text/html")
    storage.put_json(f"{prefix}/{GATE}", asdict(decision))


def render(decision: Decision) -> str:
    """The decision as a page: what failed first."""
    verdict = "blessed" if decision.blessed else "refused"
    against = f"against {decision.against}" if decision.against else "with nothing to compare with"
    rows = [(mark, each) for mark, found in (("✗", decision.failed), ("✓", decision.passed)) for each in found]
    table = "".join(f"<tr><td>{mark}</td><td class=text>{html.escape(each)}</td></tr>" for mark, each in rows)
    head = f"<h1>{html.escape(decision.version or 'Candidate')}: {verdict}</h1>"
    note = f"<p class=note>{html.escape(f'{decision.decided_at} {against}; content {decision.digest[:12]}')}</p>"
    return page(f"Gate: {verdict}", f"{head}{note}<table>{table}</table>", script=False)
