"""The data gate: quiet days pass, each kind of trouble is held back and named."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.schema import EXPOSURE, FLAGS, conform
from monitoring.validation import validate

NOON = datetime(2026, 1, 3, tzinfo=UTC)


def day(
    n: int, *, seed: int, date: datetime = NOON, bots: float = 0.0, silent_hours: int = 0, broken: float = 0.0
) -> pa.Table:
    """A day; ``bots`` of its rows are of accounts that like what they skip, its first hours have no feedback."""
    rng = np.random.default_rng(seed)
    hour = np.sort(rng.integers(0, 24, n))
    robot, dark = rng.random(n) < bots, hour < silent_hours
    play = np.where(robot, 400, (20_000 * rng.beta(1.2, 1.2, n)).astype(int))
    play = np.where(rng.random(n) < broken, -5, np.where(dark, 0, play))
    liked = np.where(robot, rng.random(n) < 0.9, (rng.random(n) < 0.04) & (play > 3000)) & ~dark
    users = [f"bot{i % 5}" if each else f"u{i % 90}" for i, each in enumerate(robot)]
    columns = {
        "exposure_id": [f"{seed}-{i}" for i in range(n)],
        "request_id": [f"r{i // 8}" for i in range(n)],
        "user_id": users,
        "item_id": ["i"] * n,
        "position": [0] * n,
        "event_time": [date + timedelta(hours=int(h)) for h in hour],
        "source": ["onerec"] * n,
        "duration_ms": [20_000] * n,
        "play_ms": play.tolist(),
        **{flag: (liked if flag == "like" else np.zeros(n, bool)).tolist() for flag in FLAGS},
    }
    return conform(pa.table(columns), EXPOSURE)


def before(**trouble: float) -> pa.Table:
    """Two days of reference, the older one quiet."""
    older = day(2000, seed=8, date=NOON - timedelta(days=2))
    return pa.concat_tables([older, day(2000, seed=9, date=NOON - timedelta(days=1), **trouble)])  # type: ignore[arg-type]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_quiet_days_pass(seed: int) -> None:
    found = validate(before(), day(1500, seed=seed))
    assert found.passed, found.failed
    assert len(found.measures) == 3


@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        ({"bots": 0.1}, "bot_share"),
        ({"bots": 0.9}, "unwatched_likes"),
        ({"silent_hours": 24}, "silent_share"),
        ({"silent_hours": 3}, "silent_hours"),
        ({"broken": 0.05}, "impossible_share"),
    ],
)
def test_each_trouble_is_held_back_and_named(trouble: dict[str, float], named: str) -> None:
    found = validate(before(), day(2000, seed=1, **trouble))  # type: ignore[arg-type]
    assert not found.passed
    assert any(named in sentence and "2026-01-03" in sentence for sentence in found.failed)


def test_a_bad_day_among_those_before_holds_the_window_back_too() -> None:
    found = validate(before(bots=0.2), day(2000, seed=1))
    assert not found.passed
    assert all("2026-01-02" in sentence for sentence in found.failed)


def test_half_a_window_is_no_window() -> None:
    assert any("volume" in sentence for sentence in validate(before(), day(150, seed=1)).failed)
    assert validate(before().slice(0, 0), day(150, seed=1)).passed, "with nothing to compare with, volume says nothing"


def test_traffic_of_another_source_is_no_measure_of_volume() -> None:
    others = before()
    organic = others.set_column(others.schema.get_field_index("source"), "source", pa.array(["organic"] * len(others)))
    assert validate(organic, day(150, seed=1)).passed


def test_nothing_is_judged_without_rows() -> None:
    empty = before().slice(0, 0)
    assert validate(before(), empty).passed
    assert validate(empty, empty).measures == {}
