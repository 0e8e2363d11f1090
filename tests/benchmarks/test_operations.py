"""What the operational scenarios rest on: planted changes are what they say, and an end is told as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import operations
from benchmarks.operations_log import quiet
from benchmarks.operations_plant import _search
from benchmarks.operations_platform import outcome
from benchmarks.operations_scenarios import LateFeedback, taste_drift
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


def test_noise_is_searched_for_until_it_costs_what_was_wanted() -> None:
    noise, loss = _search(lambda noise: noise**2, 0.1)
    assert loss == noise**2 == pytest.approx(0.1, abs=0.01)


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
    tried = {name: {"end": "passed", "promoted": 0, "seeds": 4} for name in ("bad_candidate", "good_candidate")}
    told = operations.summary({**tried, "no_drift_organic": {"end": "passed", "false_triggers": 0, "nights": 14}})
    assert set(told["scenarios"].values()) == {"passed"}
    assert (told["false_triggers"], told["quiet_nights"]) == (0, 14)
    assert told["detected_within_days"] is None


def test_a_scenario_that_breaks_has_failed_and_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no ports left")

    plays = {"quiet": {"end": "passed", "nights": [{"stay": 6.0}] * 8}, "poisoned": {"end": "passed"}}
    monkeypatch.setattr("benchmarks.operations.Platform.build", lambda self, progress: None)
    for name in ("quiet", "drift_frozen", "drift_retrained", "poisoned", "week"):
        play = broken if name not in plays else lambda *_, name=name: plays[name]
        monkeypatch.setattr(f"benchmarks.operations_scenarios.{name}", play)
    seeds = {"bad_candidate": {"end": "passed", "promoted": 0}}
    found = operations.end_to_end(operations.Plan(), tmp_path, seeds)
    ends = {name: told["end"] for name, told in found.items()}
    assert ends.pop("no_drift") == ends.pop("poisoned_day") == "passed"
    canaries = {"bad_candidate", "canary_rollback", "canary_promotion"}
    assert set(ends) == {"taste_drift", "feedback_outage", "s3_outage_mid_publish", *canaries}
    assert set(ends.values()) == {"failed: RuntimeError: no ports left"}
    kept = {path.parent.name.rpartition("-")[0] for path in tmp_path.rglob("record.json")}
    assert kept == {"quiet", "poisoned"}, "what broke is played again"


def test_a_quiet_log_triggers_nothing_and_too_small_a_one_is_not_judged() -> None:
    found = quiet(users=200, days=2, seed=1)
    assert (found["false_triggers"], found["held_back"], found["nights_judged"]) == (0, 0, 2)
    assert 0 < found["nearest"] < 1
    assert quiet(users=20, days=1, seed=1)["nights_judged"] == 0
