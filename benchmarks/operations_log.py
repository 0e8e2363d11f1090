"""Quiet nights without servers: the drift detector, the data gate and the trigger on a log of organic traffic.

The history of a simulated world is as quiet as one gets: the logging policy never changes. Every night of it is judged
as the pipeline would, by the same functions, many times as fast as a night on real servers.
"""

from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from features.world.simulator import Simulator, SimulatorConfig
from monitoring.drift import INSUFFICIENT, measure
from monitoring.trigger import Situation, decide, parse

REFERENCE_DAYS = 2


def quiet(users: int, days: int, seed: int) -> dict[str, Any]:
    """How many of ``days`` nights asked for a retraining though nothing had happened."""
    world = Simulator(SimulatorConfig(users=users, history_days=days + REFERENCE_DAYS, drift_day=None, seed=seed))
    log, nights = world.history(), []
    for day in range(-days, 0):
        start = world.start() + timedelta(days=day)
        before, reference, current = (
            _between(log.exposures, start + timedelta(days=first), start + timedelta(days=last))
            for first, last in ((-365, -REFERENCE_DAYS), (-REFERENCE_DAYS, 0), (0, 1))
        )
        report = measure(reference, current, log.items, before=before)
        end = start + timedelta(days=1)
        situation = Situation(
            verdict=report.verdict,
            reason=report.reason,
            invalid=report.validation.failed,
            window_end=end,
            rows_by_hour=report.rows_by_hour,
            past=(),
            now=end,
        )
        nearest = max((c["score"] / c["threshold"] for c in report.columns.values() if c["decides"]), default=0.0)
        nights.append(
            {
                "verdict": report.verdict,
                "retrain": decide(parse("on_drift"), situation).retrain,
                "held_back": list(report.validation.failed),
                "nearest": nearest,
            }
        )
    return {
        "false_triggers": sum(night["retrain"] for night in nights),
        "held_back": sum(bool(night["held_back"]) for night in nights),
        "nights_judged": sum(night["verdict"] != INSUFFICIENT for night in nights),
        "nearest": max(night["nearest"] for night in nights),
        "nights": nights,
    }


def _between(rows: pa.Table, start: Any, end: Any) -> pa.Table:
    time = rows["event_time"]
    first, last = (pa.scalar(moment, time.type) for moment in (start, end))
    return rows.filter(pc.and_(pc.greater_equal(time, first), pc.less(time, last)))
