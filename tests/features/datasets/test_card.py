"""The quality card: what it counts, and what it warns of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.datasets import open_log, read_map
from features.datasets.card import quality_card

T0 = 1_650_000_000 // 86_400 * 86_400
MAP = "user_id=u,item_id=i,event_time=t,duration_ms=d,play_ms=p,like=liked"

Card = Callable[..., dict[str, Any]]


@pytest.fixture
def card(tmp_path: Path) -> Card:
    def make(hours: np.ndarray, played: np.ndarray | None = None, spread: int = 1) -> dict[str, Any]:
        rng, n = np.random.default_rng(0), len(hours)
        played = rng.integers(0, 9000, n) if played is None else played
        liked = rng.random(n) < 0.1
        rows = [
            f"u{k % 9},i{k % 20},{T0 + int(3600 * hours[k]) + spread * k % 50},9000,{played[k]},{int(liked[k])},"
            f"{int(liked[k]) * 7},{k % 2}"
            for k in range(n)
        ]
        path = tmp_path / "log.csv"
        path.write_text("\n".join(["u,i,t,d,p,liked,stay,noise", *rows]) + "\n")
        return quality_card(open_log(path, read_map(MAP)), tmp_path)

    return make


def awake(days: int, shift: int = 0) -> np.ndarray:
    """Hours since the start, 40 rows an hour but in the six hours from 1 + shift on."""
    hours = [24 * day + hour for day in range(days) for hour in range(24) if (hour - shift) % 24 not in range(1, 7)]
    return np.repeat(hours, 40)


def test_it_counts(card: Card) -> None:
    hours = np.r_[np.arange(100), [24 * 9]]
    found = card(hours, played=np.r_[[0] * 60, [4500] * 40, [99_000]])
    assert (found["rows"], found["users"], found["items"]) == (101, 9, 20)
    assert (found["zero_play"], found["play_beyond_10_durations"]) == (60, 1)
    assert found["play_ms"] == {"min": 0, "max": 99_000}
    assert (found["days_with_rows"], found["days_without_rows"]) == (6, 4)
    assert found["first_day"] == "2022-04-15"
    assert found["rows_a_user"]["max"] == 12
    assert found["flags"]["like"] > 0
    assert any("4 days between the first and the last have no row" in warning for warning in found["warnings"])
    assert any("1 play times are longer than 10 durations" in warning for warning in found["warnings"])


def test_a_column_that_says_what_a_flag_says_is_a_suspect(card: Card) -> None:
    found = [warning for warning in card(np.arange(900) / 40)["warnings"] if warning.startswith("LEAK")]
    assert len(found) == 1
    assert "column stay is set where liked is" in found[0]


@pytest.mark.parametrize(("shift", "suspected"), [(0, True), (16, False)])
def test_local_times_are_suspected_by_the_hour_of_sleep(card: Card, shift: int, suspected: bool) -> None:
    warnings = card(awake(3, shift))["warnings"]
    assert any("local times written as UTC" in warning for warning in warnings) == suspected


def test_days_in_place_of_times_are_told(card: Card) -> None:
    days = np.arange(300) // 30 * 24
    assert any("times are days" in warning for warning in card(days, spread=0)["warnings"])
    assert not any("times are days" in warning for warning in card(days)["warnings"])


def test_a_log_without_a_valid_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("u,i,t\na,b,never\n")
    with pytest.raises(ValueError, match=r"all 1 rows of the log 'log' were rejected; the first: t is no time"):
        quality_card(open_log(tmp_path / "log.csv", read_map("user_id=u,item_id=i,event_time=t")), tmp_path)


def test_leaks_beside_the_log_and_bare_items_are_named(tmp_path: Path, kuairand: Path) -> None:
    folder = tmp_path / "KuaiRand-Pure"
    folder.mkdir()
    for file in (kuairand / "data").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "video_features_statistic_pure.csv").write_text("video_id,show_cnt\n")
    found = quality_card(open_log(folder), tmp_path)
    assert (found["rows"], found["duplicates"]) == (219_301, 5_460)
    assert found["rejected"]["duration_ms is not positive"] == 3_568
    assert any(
        warning.startswith("video_features_statistic_pure.csv is not read: LEAK") for warning in found["warnings"]
    )
