"""The data gate: may a window of exposures be learned from at all? Asked before drift, day by day.

Drift compares with yesterday and cannot tell a changed world from a broken pipe; this looks for what no world does:
accounts that like what they never watched, hours without any feedback, half the traffic gone, impossible numbers. Each
check is a share with a bound and leaves a sentence; a window with one bad day is held back whole. Left out: mending
a window by dropping rows, which would hide the trouble; accounts that imitate people.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa

DAY = timedelta(days=1)
UNWATCHED_MS = 1000
"""Whoever leaves sooner has not watched."""
BUSY_VIEWS = 20
"""An account with fewer views a day is not judged."""
POSITIVE = ("like", "follow", "comment", "forward", "collect")
SIGNS = (*POSITIVE, "click", "dislike", "profile_enter")
QUIET_HOUR_ROWS = 20
LONGEST_PLAY_MS = 24 * 3_600_000


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A measure of ``measures`` and the most, or the least, it may be."""

    measure: str
    meaning: str
    most: float | None = None
    least: float | None = None

    def check(self, value: float) -> tuple[bool, str]:
        """(passed, sentence)."""
        passed = value <= self.most if self.most is not None else value >= (self.least or 0.0)
        limit = f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"
        return passed, f"{self.measure} = {value:.4g}, must be {limit}: {self.meaning}"


BOUNDS = (
    Bound(measure="bot_share", most=0.02, meaning="exposures of accounts that like what they do not watch"),
    Bound(measure="unwatched_likes", most=0.5, meaning="positive feedback to items played for less than a second"),
    Bound(measure="silent_share", most=0.4, meaning="exposures without play time or any feedback"),
    Bound(measure="silent_hours", most=0.05, meaning="exposures of hours in which no feedback arrived"),
    Bound(measure="impossible_share", most=0.01, meaning="exposures with durations or play times that cannot be"),
    Bound(measure="volume", least=0.2, meaning="exposures an hour, over those of the days before"),
)
"""Ours; on quiet and troubled days of the simulator in docs/monitoring.md."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The data gate's verdict with one sentence a check, and the measures of each day by its date."""

    passed: bool
    failed: tuple[str, ...]
    measures: Mapping[str, Mapping[str, float]]


def validate(reference: pa.Table, current: pa.Table, bounds: tuple[Bound, ...] = BOUNDS) -> Validation:
    """Judges every day that would be trained on: the ``current`` window and the days before it, counted from its start.

    Times of day are the windows' own: a day is 24 hours from the first exposure of ``current``, backwards for the
    reference. The volume of ``current`` is compared with the reference's; a day without rows is not judged.
    """
    failed: list[str] = []
    measured: dict[str, Mapping[str, float]] = {}
    for name, day, earlier in _days(reference, current):
        found = measures(day, earlier)
        measured[name] = found
        checks = [bound.check(found[bound.measure]) for bound in bounds if bound.measure in found]
        failed += [f"{name}: {sentence}" for passed, sentence in checks if not passed]
    return Validation(passed=not failed, failed=tuple(failed), measures=measured)


def measures(day: pd.DataFrame, earlier: pd.DataFrame) -> dict[str, float]:
    """What the bounds speak of, for the rows of one day; ``volume`` only where ``earlier`` has rows."""
    played = day["play_ms"].to_numpy()
    unwatched = played < UNWATCHED_MS
    positive = np.asarray(day[list(POSITIVE)].to_numpy(bool).any(axis=1))
    silent = (played == 0) & ~day[list(SIGNS)].to_numpy(bool).any(axis=1)
    found = {
        "bot_share": _bot_share(day["user_id"], unwatched, positive),
        "unwatched_likes": float(unwatched[positive].mean()) if positive.sum() >= QUIET_HOUR_ROWS else 0.0,
        "silent_share": float(silent.mean()),
        "silent_hours": _silent_hours(day["event_time"], silent),
        "impossible_share": float(((day["duration_ms"] <= 0) | (played < 0) | (played > LONGEST_PLAY_MS)).mean()),
    }
    if len(earlier):
        found["volume"] = _rate(day) / _rate(earlier)
    return found


def _days(reference: pa.Table, current: pa.Table) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """(date, its rows, the rows it is measured against) of every day with rows, the oldest first."""
    names = ["user_id", "event_time", "source", "duration_ms", "play_ms", *SIGNS]
    before, now = (table.select(names).to_pandas() for table in (reference, current))
    if not len(now):
        return []
    start = now["event_time"].min().floor("h")
    # Only traffic of the same sources: a platform that takes over from another is not an outage.
    found = [(_date(start), now, before[before["source"].isin(now["source"].unique())])]
    while len(before):
        start -= DAY
        own = before["event_time"] >= start
        if own.any():
            found.append((_date(start), before[own], before.iloc[:0]))
        before = before[~own]
    return found[::-1]


def _bot_share(users: pd.Series, unwatched: np.ndarray, positive: np.ndarray) -> float:
    """Share of the exposures of busy accounts that leave at once, mostly, and like all the same."""
    by_user = pd.DataFrame({"unwatched": unwatched, "both": unwatched & positive}).groupby(users.to_numpy())
    found = by_user.agg(views=("unwatched", "size"), unwatched=("unwatched", "mean"), both=("both", "mean"))
    bots = (found["views"] >= BUSY_VIEWS) & (found["unwatched"] >= 0.5) & (found["both"] >= 0.2)
    return float(found["views"][bots].sum() / len(users))


def _silent_hours(times: pd.Series, silent: np.ndarray) -> float:
    by_hour = pd.Series(silent).groupby(times.dt.floor("h").to_numpy()).agg(["size", "mean"])
    without = (by_hour["size"] >= QUIET_HOUR_ROWS) & (by_hour["mean"] >= 0.9)
    return float(by_hour["size"][without].sum() / len(times))


def _rate(rows: pd.DataFrame) -> float:
    """Exposures an hour of those hours that have any: windows may differ in length."""
    return len(rows) / max(rows["event_time"].dt.floor("h").nunique(), 1)


def _date(time: datetime) -> str:
    return time.isoformat(timespec="minutes")
