"""What the operational scenarios rest on: planted changes are what they say, and an end is told as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import operations
from benchmarks.operations_scenarios import LateFeedback, outcome, taste_drift
from benchmarks.operations_trials import TrialSize, run
from benchmarks.operations_users import Policy, Users, plant

DAYS = range(-2, 0), range(2)
SMALL = Users(users=300, items=150, seed=3)
STABLE = Policy(name="stable", chance=0.3)


@pytest.mark.parametrize("change", [-0.15, 0.1])
def test_a_planted_change_is_measured_and_near(change: float) -> None:
    made = plant(SMALL, STABLE, DAYS, change)
    base = SMALL.play((STABLE, DAYS[0]), (STABLE, DAYS[1]))
    assert made.played.stay_minutes(DAYS[1]) / base.stay_minutes(DAYS[1]) - 1 == pytest.approx(made.change)
    assert made.change == pytest.approx(change, abs=0.05)
    assert made.played.stay_minutes(DAYS[0]) == base.stay_minutes(DAYS[0]), "before the trial all meet one policy"


def test_a_table_holds_the_rows_of_the_wanted_users_and_days() -> None:
    played = SMALL.play((STABLE, range(2)))
    some = np.arange(300) < 100
    table = played.table(some, range(1, 2))
    assert set(table["user_id"].to_pylist()) <= {f"u{row:05d}" for row in range(100)}
    assert table.num_rows == int((some[played.user] & (played.day == 1)).sum()) > 0


def test_finished_seeds_are_kept_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = TrialSize(users=300, items=150, worlds=1, seeds=2, looks=2)
    first = run(size, -0.3, tmp_path)
    assert (first["seeds"], first["promoted"]) == (2, 0)
    assert first["refused_by_gate"] + first["rolled_back"] == 2
    monkeypatch.setattr("benchmarks.operations_trials._world", lambda *_: pytest.fail("it was kept"))
    assert run(size, -0.3, tmp_path) == first


def drifted(stay: list[float], verdicts: list[str]) -> dict[str, Any]:
    return {"stay": stay, "nights": [{"verdict": verdict} for verdict in verdicts]}


@pytest.mark.parametrize(
    ("stay", "verdicts", "words"),
    [
        ([6, 6, 6, 6, 2, 3, 5, 5.5], ["drift", "stable", "stable"], ""),
        ([6, 6, 6, 6, 2, 3, 4, 4.5], ["drift", "drift", "drift"], "at most 62% of the lost stay time"),
        ([6, 6, 6, 6, 2, 3, 5, 5.5], ["stable", "stable", "drift"], "after 2 days"),
        ([6, 6, 6, 6, 2, 2, 2, 2], ["stable"] * 3, "after None days"),
    ],
)
def test_a_drift_ends_well_when_it_is_seen_and_made_up_for(stay: list[float], verdicts: list[str], words: str) -> None:
    found = taste_drift([6.0] * 8, [6, 6, 6, 6, 2, 2, 2, 2], drifted(stay, verdicts))
    assert words in found["end"]
    assert (found["end"] == "passed") is not bool(words)


def test_an_end_names_everything_that_went_wrong() -> None:
    assert outcome([(True, "a"), (True, "b")]) == "passed"
    assert outcome([(False, "a"), (True, "b"), (False, "c")]) == "failed: a; c"


def test_late_feedback_is_late_and_whole() -> None:
    class Wire:
        def __init__(self) -> None:
            self.sent: list[dict[str, Any]] = []

        def report(self, events: list[dict[str, Any]]) -> int:
            self.sent += events
            return len(events)

        def flush(self) -> None:
            pass

    wire = Wire()
    late = LateFeedback(wire)  # type: ignore[arg-type]
    events = [{"kind": kind, "id": n} for n in range(3) for kind in ("impression", "feedback")]
    late.report(events)
    assert [event["kind"] for event in wire.sent] == ["impression"] * 3
    late.deliver()
    late.deliver()
    assert sorted(wire.sent, key=lambda e: (e["id"], e["kind"])) == sorted(events, key=lambda e: (e["id"], e["kind"]))


def test_a_quick_run_has_no_end_to_end_scenario() -> None:
    told = operations.summary(
        {name: {"end": "passed", "promoted": 0, "seeds": 4} for name in ("bad_candidate", "good_candidate")}
    )
    assert told["scenarios"] == {"bad_candidate": "passed", "good_candidate": "passed"}
    assert told["false_triggers"] is None
