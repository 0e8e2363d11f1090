"""The level that chance reaches: Evidently's scores, seldom passed by nothing and always by a change."""

import numpy as np
import pandas as pd
import pytest

from monitoring import chance
from monitoring.chance import levels, score
from monitoring.columns import Column
from monitoring.drift import _evidently

COLUMN = Column(name="tag", method="jensenshannon", threshold=0.15, categorical=True)
TAGS = 12


def world(rng: np.random.Generator, people: int, days: int, taste: np.ndarray) -> pd.DataFrame:
    """What ``people`` engage with on ``days``: each has favourites of his own, and some five engagements a day."""
    rows = [
        {"block": f"{person} {day}", "tag": f"t{tag}"}
        for person in range(people)
        for mine in [rng.dirichlet(taste)]
        for day in range(days)
        for tag in rng.choice(TAGS, rng.poisson(5), p=mine)
    ]
    return pd.DataFrame(rows)


def level(reference: pd.DataFrame, current: pd.DataFrame) -> float:
    return levels({"tag": "jensenshannon"}, reference, current, (reference["block"], current["block"]))["tag"]


def distance(reference: pd.DataFrame, current: pd.DataFrame) -> float:
    names = sorted({*reference["tag"], *current["tag"]})
    return score(
        "jensenshannon", *(each["tag"].value_counts().reindex(names, fill_value=0) for each in (reference, current))
    )


@pytest.mark.parametrize(("method", "categorical"), [("psi", False), ("psi", True), ("jensenshannon", True)])
@pytest.mark.parametrize("values", [2, 12, 400])
def test_scores_are_evidentlys(method: str, categorical: bool, values: int) -> None:
    rng = np.random.default_rng(values)
    drawn = [rng.integers(0, values, size).astype(float) ** 1.5 for size in (700, 300)]
    frames = [pd.DataFrame({"x": map(str, each) if categorical else each}) for each in drawn]
    column = Column(name="x", method=method, threshold=1.0, categorical=categorical)
    expected = _evidently(*frames, [column]).dict()["metrics"][0]["value"]
    counts = chance._counts(pd.concat([frame["x"] for frame in frames]), np.repeat([0, 1], [700, 300]), 2)
    assert score(method, *counts) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_nothing_seldom_passes_it_though_it_passes_the_plain_threshold() -> None:
    rng = np.random.default_rng(0)
    plain = passed = 0
    for _ in range(20):
        reference, current = world(rng, 40, 2, np.full(TAGS, 0.3)), world(rng, 40, 1, np.full(TAGS, 0.3))
        found = distance(reference, current)
        plain += found >= COLUMN.threshold
        passed += found >= level(reference, current)
    assert plain >= 5, "few rows that come in bunches"
    assert passed <= 1


def test_a_change_passes_it() -> None:
    rng = np.random.default_rng(1)
    before, after = np.full(TAGS, 0.4), np.r_[np.full(TAGS // 2, 1.5), np.full(TAGS // 2, 0.1)]
    reference, current = world(rng, 120, 2, before), world(rng, 120, 1, after)
    assert distance(reference, current) > level(reference, current) > 0


def test_of_many_rows_no_threshold_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chance, "DEALS", 200)
    rng = np.random.default_rng(2)
    few, many = (
        level(world(rng, people, 2, np.full(TAGS, 0.4)), world(rng, people, 1, np.full(TAGS, 0.4)))
        for people in (40, 1500)
    )
    assert many < COLUMN.threshold < few


def test_equal_windows_have_equal_levels_and_columns_without_values_none() -> None:
    rng = np.random.default_rng(3)
    reference, current = world(rng, 50, 2, np.ones(TAGS)), world(rng, 50, 1, np.ones(TAGS))
    assert level(reference, current) == level(reference, current)
    empty = [frame.assign(tag=None) for frame in (reference, current)]
    assert level(*empty) == 0
