"""The data gate: quiet days pass, each kind of trouble is held back and named."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.schema import EXPOSURE, FLAGS, conform
from features.world.simulator import Simulator, SimulatorConfig
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


def lived(world: Simulator) -> pa.Table:
    """Day 0 of a world whose users are shown the catalogue from its beginning."""
    items = world.history().items.slice(0, 10)
    ids, duration = items["item_id"].to_pylist(), items["duration_ms"].to_pylist()
    rows: list[dict[str, Any]] = []
    for number, visit in enumerate(world.visitors(0)):
        seen = world.watch(0, visit.user_id, ids, visit.time_ms, number)
        for k, place in enumerate(seen.positions.tolist()):
            row = {"exposure_id": f"{number}-{k}", "request_id": str(number), "user_id": visit.user_id}
            row |= {"item_id": ids[place], "position": place, "source": "onerec", "duration_ms": duration[place]}
            row |= {"event_time": datetime.fromtimestamp(int(seen.times_ms[k]) / 1000, UTC)}
            flags = {flag: bool(seen.flags[flag][k]) for flag in FLAGS}
            rows.append({**row, "play_ms": int(seen.play_ms[k]), **flags})
    return conform(pa.Table.from_pylist(rows), EXPOSURE)


@pytest.mark.parametrize("bots", [0.0, 0.1])
def test_bots_of_the_simulated_world_are_held_back_and_its_people_are_not(bots: float) -> None:
    world = Simulator(SimulatorConfig(users=150, items=150, history_days=1, drift_day=None, bots=bots))
    found = validate(before().slice(0, 0), lived(world))
    assert found.passed is (bots == 0)
    assert any("bot_share" in sentence for sentence in found.failed) is (bots > 0)


def test_nothing_is_judged_without_rows() -> None:
    empty = before().slice(0, 0)
    assert validate(before(), empty).passed
    assert validate(empty, empty).measures == {}
