"""The trigger: every reason not to retrain, one run at a time, decided once and written down."""

import json
import threading
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.storage import Storage
from monitoring import trial
from monitoring.trigger import (
    DRIFT,
    INSUFFICIENT,
    STABLE,
    Past,
    Situation,
    Trigger,
    decide,
    decide_once,
    decisions,
    parse,
)

END = datetime(2026, 1, 10, tzinfo=UTC)
NOW = datetime(2030, 5, 5, tzinfo=UTC)  # the wall's clock is not the log's
QUIET = Situation(
    verdict=STABLE,
    reason="nothing moved",
    invalid=(),
    window_end=END,
    rows_by_hour={(END - timedelta(hours=h)).isoformat(): 100 for h in range(1, 25)},
    past=(),
    now=NOW,
)
TWO_A_WEEK = '{"when": "on_drift", "budget_runs": 2}'
DRIFTED = replace(QUIET, verdict=DRIFT, reason="drifted: like")


def ran(hours: float, state: str = "SUCCEEDED", silent_hours: float = 0.0, **told: Any) -> Past:
    """A retraining whose window ended so many hours ago."""
    moved = NOW - timedelta(hours=silent_hours)
    return Past(run_id=f"r{hours}", window_end=END - timedelta(hours=hours), state=state, moved=moved, **told)


REFUSED = ran(24, verdict=DRIFT, published=False)


@pytest.mark.parametrize(
    ("policy", "situation", "retrain", "said"),
    [
        ("on_drift", DRIFTED, True, "drifted: like"),
        ("on_drift", QUIET, False, "policy on_drift"),
        ("nightly", QUIET, True, "policy nightly"),
        ("nightly", replace(QUIET, verdict=INSUFFICIENT), True, "policy nightly"),
        ("on_drift", replace(DRIFTED, invalid=("bot_share = 0.2",)), False, "data gate: bot_share"),
        ("on_drift", replace(DRIFTED, rows_by_hour={END.isoformat(): 499}), False, "499 new exposures in the window"),
        ("nightly", replace(QUIET, past=(ran(3),)), False, "300 new exposures since"),
        ("on_drift", replace(DRIFTED, past=(ran(19),)), False, "19.0 hours after"),
        ("on_drift", replace(DRIFTED, past=(ran(21),)), True, "drifted"),
        ("on_drift", replace(DRIFTED, past=(ran(1, "FAILED"),)), True, "drifted"),
        ("nightly", replace(QUIET, canary="v7"), False, "a canary is under way: v7"),
        ("on_drift", replace(QUIET, past=(REFUSED,)), True, "no model has been published since the drift that r24 saw"),
        ("on_drift", replace(QUIET, past=(replace(REFUSED, state="FAILED"),)), True, "since the drift that r24 saw"),
        ("on_drift", replace(QUIET, past=(REFUSED, ran(48))), True, "since the drift that r24 saw"),
        ("on_drift", replace(QUIET, past=(replace(REFUSED, run_id="old"), ran(22))), False, "policy on_drift"),
        ("on_drift", replace(QUIET, past=(replace(REFUSED, verdict=STABLE),)), False, "policy on_drift"),
        ("on_drift", replace(DRIFTED, past=(ran(19, verdict=DRIFT, published=False),)), False, "19.0 hours after"),
        ("on_drift", replace(DRIFTED, past=(ran(30, ""),)), False, "in flight: r30"),
        ("on_drift", replace(DRIFTED, past=(ran(30, "", silent_hours=3.5),)), True, "drifted"),
        (
            '{"when": "on_drift", "budget_runs": 2}',
            replace(DRIFTED, past=(ran(30), ran(40, "FAILED"))),
            False,
            "budget",
        ),
        ('{"when": "on_drift", "budget_runs": 2}', replace(DRIFTED, past=(ran(30), ran(170))), True, "drifted"),
    ],
)
def test_each_reason(policy: str, situation: Situation, retrain: bool, said: str) -> None:
    decision = decide(parse(policy), situation)
    assert decision.retrain is retrain
    assert said in decision.reason
    assert decision.reason in decision.checks or retrain


situations = st.builds(
    replace,
    st.just(DRIFTED),
    verdict=st.sampled_from([DRIFT, STABLE, INSUFFICIENT]),
    invalid=st.sampled_from([(), ("silent_share = 1",)]),
    past=st.lists(
        st.builds(ran, st.floats(0, 200), st.sampled_from(["", "SUCCEEDED", "FAILED"]), st.floats(0, 6)), max_size=4
    ).map(tuple),
)


@given(situations)
def test_equal_situations_are_decided_alike_and_more_is_never_asked_of_a_laxer_trigger(situation: Situation) -> None:
    strict = parse("on_drift")
    lax = Trigger(when="nightly", minimum_rows=0, cooldown_hours=0, budget_runs=1000, in_flight_hours=0)
    assert decide(strict, situation) == decide(strict, situation)
    assert decide(lax, situation).retrain or not decide(strict, situation).retrain
    assert decide(lax, situation).retrain is not bool(situation.invalid)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("weekly", "'weekly' is unknown"),
        ("{when: x}", "no JSON object"),
        ('{"when": "hourly"}', "'hourly' is unknown"),
        ('{"cooldown": 3}', "cooldown, which nobody reads"),
        ('{"budget_runs": -1}', "budget_runs of the policy is -1"),
        ('{"minimum_rows": "many"}', "minimum_rows of the policy is 'many'"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused_with_what_can(policy: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"give|may have|no JSON") as caught:
        parse(policy)
    assert said in str(caught.value)


def summary(verdict: str = DRIFT, hours: int = 0, **changes: Any) -> dict[str, Any]:
    """What the drift stage tells, of a window that ends so many hours later."""
    end = END + timedelta(hours=hours)
    rows = {(end - timedelta(hours=h)).isoformat(): 100 for h in range(1, 25)}
    whole = {"verdict": verdict, "reason": "why", "rows_current": 2400, "rows_by_hour": rows}
    return {**whole, "validation": {"failed": []}, "window_end": end.isoformat(), **changes}


def test_a_resumed_run_gets_its_own_decision_back(s3: Storage) -> None:
    first = decide_once(s3, "a", parse("on_drift"), summary())
    s3.put_json("runs/b/outcome.json", {"state": "SUCCEEDED"})
    decide_once(s3, "b", parse("nightly"), summary(hours=30))
    assert decide_once(s3, "a", parse("on_drift"), summary()) == first
    assert first["retrain"]
    assert len(first["checks"]) >= 5
    assert [each["run_id"] for each in decisions(s3, END + timedelta(days=2), 7)] == ["a", "b"]


def test_one_run_in_flight_then_cooldown_then_again(s3: Storage) -> None:
    trigger = parse("on_drift")
    assert decide_once(s3, "a", trigger, summary())["retrain"]
    assert "in flight: a" in decide_once(s3, "b", trigger, summary(hours=24))["reason"]
    s3.put_json("runs/a/outcome.json", {"state": "SUCCEEDED"})
    assert "cooldown" in decide_once(s3, "c", trigger, summary(hours=12))["reason"]
    assert decide_once(s3, "d", trigger, summary(hours=24))["retrain"]


@pytest.mark.parametrize(
    ("version", "canary", "again"),
    [(None, "", True), ("v1", "", False), ("v1", trial.PROMOTED, False), ("v1", trial.ROLLED_BACK, True)],
)
def test_a_drift_is_not_forgotten_before_a_model_answers_it(
    s3: Storage, version: str | None, canary: str, again: bool
) -> None:
    """The day after a drift looks like the day of it; a candidate that was refused has changed nothing."""
    trigger = parse("on_drift")
    assert decide_once(s3, "a", trigger, summary())["retrain"]
    s3.put_json("runs/a/outcome.json", {"state": "SUCCEEDED", "version": version})
    if canary:
        config = trial.TrialConfig()
        tried = trial.Trial(version="v1", stable="v0", started=END.isoformat(), unit="user", config=config)
        s3.put_json("trials/ended/a.json", asdict(replace(tried, status=canary)))
    made = decide_once(s3, "b", trigger, summary(verdict=STABLE, hours=24))
    assert made["retrain"] is again
    assert ("since the drift that a saw" in made["reason"]) is again


def test_a_window_that_the_data_gate_refuses_is_not_trained_on(s3: Storage) -> None:
    made = decide_once(s3, "a", parse("nightly"), summary(validation={"failed": ["2026-01-03: bot_share = 0.2"]}))
    assert not made["retrain"]
    assert "bot_share" in made["reason"]
    assert json.loads(json.dumps(made)) == made


def test_of_runs_that_decide_at_the_same_moment_at_most_one_retrains(s3: Storage) -> None:
    made: list[bool] = []
    barrier = threading.Barrier(4)

    def one(name: str) -> None:
        barrier.wait()
        made.append(decide_once(s3, name, parse("nightly"), summary())["retrain"])

    threads = [threading.Thread(target=one, args=(f"run{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert sum(made) <= 1
