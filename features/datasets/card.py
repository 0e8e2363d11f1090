"""What a log holds and what is odd about it, before any of it is stored: the data quality card.

Counted chunk by chunk, in the memory of one chunk and of the distinct items and users. Warnings name what would poison
a model in silence: files whose statistics know the future, columns that say the same as a feedback flag, times that
look local or come from a clock that was off, gaps, items and users of which nothing is known. Left out: judgement; a
log with warnings may still be what somebody wants.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.datasets.dataset import Published, Seen, no_valid_row
from features.datasets.interactions import DAY_MS
from features.histories.windows import is_positive
from features.schema import FLAGS, label_bits

HOUR_MS = 3_600_000
OFF_CLOCK_DAYS = 365
"""Rows that lie so many days from all others were written by a wrong clock."""
SAME = 0.9
"""A column set on the same rows as a flag, by this Jaccard index, is a suspect."""
RARE = 20
"""A column set on fewer rows says too little to be compared."""
LONG_PLAY = 10
"""Play times beyond so many durations are counted."""
SHOWN = 10
QUIET = range(1, 8)
"""Hours of the night: when a log in local time has the fewest rows."""


@dataclass(kw_only=True)
class _Tally:
    """Sums over chunks."""

    rows: int = 0
    duplicates: int = 0
    untimed: int = 0
    unordered: int = 0
    positives: int = 0
    midnights: int = 0
    long_plays: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    days: Counter[int] = field(default_factory=Counter)
    hours: np.ndarray = field(default_factory=lambda: np.zeros(24, np.int64))
    flags: Counter[str] = field(default_factory=Counter)
    extremes: dict[str, list[int]] = field(default_factory=dict)
    zeros: Counter[str] = field(default_factory=Counter)
    of_user: list[np.ndarray] = field(default_factory=list)
    filled: Counter[str] = field(default_factory=Counter)
    both: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, exposures: pa.Table) -> None:
        """The EXPOSURE rows of a chunk."""
        times, play, duration = (
            exposures[name].cast(pa.int64()).to_numpy() for name in ("event_time", "play_ms", "duration_ms")
        )
        self.rows += len(times)
        days, counts = np.unique(times // DAY_MS, return_counts=True)
        self.days.update(dict(zip(days.tolist(), counts.tolist(), strict=True)))
        self.hours += np.bincount(times % DAY_MS // HOUR_MS, minlength=24)
        # Events of one day may stand milliseconds apart, to keep their order.
        self.midnights += int((times % DAY_MS < 1000).sum())
        self.of_user.append(exposures.group_by("user_id").aggregate([([], "count_all")])["count_all"].to_numpy())
        for name, values in (("play_ms", play), ("duration_ms", duration)):
            known = [*self.extremes.get(name, []), int(values.min()), int(values.max())]
            self.extremes[name] = [min(known), max(known)]
            self.zeros[name] += int((values == 0).sum())
        self.long_plays += int((play > LONG_PLAY * duration).sum())
        self.flags.update({flag: pc.sum(exposures[flag]).as_py() or 0 for flag in FLAGS})
        self.positives += int(is_positive(play, duration, np.asarray(label_bits(exposures), np.int64)).sum())

    def compare(self, raw: pd.DataFrame, labels: Mapping[str, str]) -> None:
        """Counts on how many rows each column of numbers is set, alone and together with each label column."""
        answers = {column: _is_set(raw[column]) for column in labels.values()}
        for name in map(str, raw.columns):
            column = answers[name] if name in answers else _is_set(raw[name])
            self.filled[name] += int(column.sum())
            for label, answer in answers.items():
                if name not in answers:
                    self.both[name, label] += int((column & answer).sum())


def quality_card(log: Published, scratch: Path, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The card of a log as JSON values; raises ValueError when no row is valid."""
    tally, seen = _Tally(), Seen()
    for chunk in log.chunks(scratch):
        tally.duplicates += chunk.duplicates
        tally.untimed += chunk.untimed
        tally.unordered += chunk.unordered
        tally.rejected.update(chunk.rejected["reason"].to_pylist())
        if chunk.exposures.num_rows:
            seen.add(chunk.exposures)
            tally.add(chunk.exposures)
        if chunk.raw is not None:
            tally.compare(chunk.raw, log.labels)
        if progress is not None:
            progress(f"{tally.rows:,} rows")
    if not tally.rows:
        first = [pa.table({"reason": [reason] * count}) for reason, count in tally.rejected.items()]
        raise no_valid_row(log.name, first)
    catalogue = bare = 0
    for items, rejected in log.items(seen):
        catalogue += items.num_rows
        bare += _bare(items, seen)
        tally.rejected.update(rejected["reason"].to_pylist())
    attributes = log.users(seen).column("attributes").combine_chunks().value_lengths().fill_null(0).to_numpy()
    card = _counts(log.name, tally, seen)
    card |= {"catalogue_rows": catalogue, "items_without_description": bare, "user_rows": len(attributes)}
    card |= {"users_without_attributes": int((attributes == 0).sum()), "unread": dict(log.unread)}
    return card | {"warnings": _warnings(card, tally)}


def _counts(name: str, tally: _Tally, seen: Seen) -> dict[str, Any]:
    of_user = np.concatenate(tally.of_user)
    days = sorted(tally.days)
    empty = [day for one, other in pairwise(days) for day in range(one + 1, min(other, one + OFF_CLOCK_DAYS))]
    return {
        "name": name,
        "rows": tally.rows,
        "users": seen.users.num_rows,
        "items": seen.items.num_rows,
        "duplicates": tally.duplicates,
        "rejected": dict(tally.rejected.most_common()),
        "first_day": _day(days[0]),
        "last_day": _day(days[-1]),
        "days_with_rows": len(days),
        "days_without_rows": len(empty),
        "first_days_without_rows": [_day(day) for day in empty[:SHOWN]],
        "rows_a_user": {"median": float(np.median(of_user)), "max": int(of_user.max())},
        "users_with_one_row": int((of_user == 1).sum()),
        "duration_ms": {"min": tally.extremes["duration_ms"][0], "max": tally.extremes["duration_ms"][1]},
        "zero_duration": tally.zeros["duration_ms"],
        "play_ms": {"min": tally.extremes["play_ms"][0], "max": tally.extremes["play_ms"][1]},
        "zero_play": tally.zeros["play_ms"],
        "play_beyond_10_durations": tally.long_plays,
        "flags": {flag: tally.flags[flag] for flag in FLAGS},
        "positive_share": tally.positives / tally.rows,
        "quietest_hour_utc": int(_around(tally.hours).argmin()),
    }


def _warnings(card: dict[str, Any], tally: _Tally) -> list[str]:
    found = [f"{name} is not read: {why}" for name, why in card["unread"].items() if why.startswith("LEAK")]
    for (column, label), both in tally.both.items():
        either = tally.filled[column] + tally.filled[label] - both
        if min(tally.filled[column], tally.filled[label]) >= RARE and both >= SAME * either:
            found.append(f"LEAK: column {column} is set where {label} is ({both:,} of {either:,} rows): not a feature")
    days = sorted(tally.days)
    for one, other in pairwise(days):
        if other - one >= OFF_CLOCK_DAYS:
            before = sum(tally.days[day] for day in days if day <= one)
            found.append(
                f"a clock was off: {min(before, tally.rows - before):,} rows lie {other - one:,} days from all others "
                f"({_day(one)} and {_day(other)})"
            )
    hours = _around(tally.hours)
    if tally.midnights > SAME * tally.rows:
        found.append("times are days: in which order things happened inside a day is unknown")
    elif tally.rows >= 1000 and hours.min() < 0.5 * hours.mean() and card["quietest_hour_utc"] in QUIET:
        found.append(
            f"the quietest hour is {card['quietest_hour_utc']} UTC: either people near Greenwich, or local times "
            "written as UTC"
        )
    if tally.untimed:
        found.append(f"{tally.untimed:,} rows have no time from 1990 to today: each takes that of the row before it")
    if tally.unordered:
        found.append(f"the times of {tally.unordered:,} users run backwards: the order of the rows is taken")
    if card["days_without_rows"]:
        found.append(f"{card['days_without_rows']:,} days between the first and the last have no row")
    if card["users"] < 2:
        found.append("one user alone cannot be learned from")
    if tally.long_plays and card["duration_ms"]["max"]:
        found.append(f"{tally.long_plays:,} play times are longer than {LONG_PLAY} durations")
    if tally.zeros["duration_ms"] == tally.rows:
        found.append("no durations and play times: rewards and weights that need them have nothing to go by")
    if card["positive_share"] in (0.0, 1.0):
        found.append(f"{'every' if card['positive_share'] else 'no'} row is positive: nothing tells rows apart")
    if card["items_without_description"]:
        found.append(f"{card['items_without_description']:,} items have neither title, tags nor author")
    return found


def _bare(items: pa.Table, seen: Seen) -> int:
    """Items of the log of which the catalogue says nothing."""
    told = [pc.is_valid(items[name]) for name in ("title", "tags", "author_id")]
    bare = pc.invert(pc.or_(pc.or_(*told[:2]), told[2]))
    logged = pc.is_in(items["item_id"], value_set=seen.items["item_id"].combine_chunks())
    return int(pc.sum(pc.and_(bare, logged)).as_py() or 0)


def _is_set(column: pd.Series) -> np.ndarray:
    numbers = pd.to_numeric(column, errors="coerce").fillna(0).to_numpy()
    return numbers != 0


def _around(hours: np.ndarray) -> np.ndarray:
    """Each hour with its two neighbours, for one quiet hour may be chance."""
    return np.roll(hours, 1) + hours + np.roll(hours, -1)


def _day(day: int) -> str:
    return f"{datetime.fromtimestamp(day * 86_400, UTC):%Y-%m-%d}"
