"""The test of a canary keeps its error rates, by simulation on users who come back, and says why."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.schema import EXPOSURE, FLAGS, conform
from monitoring.canary import (
    CONTINUE,
    DISLIKES,
    PROMOTE,
    ROLLBACK,
    STAY_TIME,
    Arm,
    Measure,
    Plan,
    adjusted,
    compare,
    judge,
)

ARMS = ("stable", "canary")
Arms = dict[str, tuple[Arm, Arm]]


def play(change: float, seed: int, plan: Plan, *, users: int = 400, dislikes: float = 1.0) -> str:
    """One canary to its end: the same heavy-tailed users at every look; ``change`` is its relative stay time."""
    rng = np.random.default_rng(seed)
    habit = rng.lognormal(0, 0.8, (2, users))
    stay, disliked = np.zeros((2, users)), np.zeros((2, users))
    for look in range(1, plan.looks + 1):
        stay += habit * rng.lognormal(0, 0.5, (2, users)) * [[1.0], [1 + change]]
        disliked += rng.poisson(np.array([[0.3], [0.3 * dislikes]]) * np.ones((2, users)))
        arms = {"stay_seconds": pair(stay), "dislikes": pair(disliked)}
        action = judge(look, arms, plan).action
        if action != CONTINUE:
            return action
    raise AssertionError("the last look decides")


def pair(values: np.ndarray) -> tuple[Arm, Arm]:
    return Arm.of(values[0]), Arm.of(values[1])


def rate(action: str, runs: int, **options: float) -> float:
    plan = Plan(measures=(STAY_TIME, DISLIKES))
    change, dislikes = options.get("change", 0.0), options.get("dislikes", 1.0)
    return float(np.mean([play(change, seed, plan, dislikes=dislikes) == action for seed in range(runs)]))


def test_false_promotions_stay_within_the_error_rate() -> None:
    """Exactly at the margin is where the rate is largest; 400 runs: three standard errors above 0.05 are 0.083."""
    assert rate(PROMOTE, 400, change=-STAY_TIME.margin) <= 0.083


def test_a_guard_rail_alone_keeps_the_canary_back() -> None:
    """Stay time is better by a fifth, dislikes are at their margin."""
    assert rate(PROMOTE, 200, change=0.2, dislikes=1 + DISLIKES.margin) <= 0.1


def test_false_rollbacks_before_the_last_look_stay_within_the_rate() -> None:
    """A canary like the stable one that is told to be worse; being undecided at the end does not count."""
    plan = Plan()
    told = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        stay = rng.lognormal(0, 0.8, (2, 400))
        arms = {"stay_seconds": pair(stay), "dislikes": pair(rng.poisson(0.3, (2, 400)))}
        told += any(judge(look, arms, plan).action == ROLLBACK for look in range(1, plan.looks))
    assert told / 200 <= 0.1


@pytest.mark.parametrize(("change", "action"), [(-0.3, ROLLBACK), (0.3, PROMOTE)])
def test_clear_cases_are_decided_nearly_always(change: float, action: str) -> None:
    assert rate(action, 60, change=change) >= 0.9


def test_the_rate_is_spent_to_the_end() -> None:
    plan = Plan(looks=7, error_rate=0.1)
    spent = [plan.spend(look) for look in range(1, 8)]
    assert sum(spent) == pytest.approx(0.1)
    assert spent == sorted(spent), "early looks, on little data, may use little"


@given(
    look=st.integers(1, 6),
    stable=st.floats(0.1, 100),
    shift=st.floats(0.01, 2.0),
    spread=st.floats(0.01, 10),
)
def test_more_stay_time_never_makes_it_worse(look: int, stable: float, shift: float, spread: float) -> None:
    """The verdict only rises with the canary's mean."""
    plan = Plan(measures=(STAY_TIME,))
    order = {ROLLBACK: 0, CONTINUE: 1, PROMOTE: 2}
    base = Arm(users=500, mean=stable, variance=spread)
    verdicts = [
        order[judge(look, {"stay_seconds": (base, Arm(users=500, mean=mean, variance=spread))}, plan).action]
        for mean in (stable * shift, stable * shift * 1.1, stable * shift * 2)
    ]
    assert verdicts == sorted(verdicts)


def test_the_reasons_hold_the_figures() -> None:
    arms = {"stay_seconds": (Arm.of([100.0, 110] * 200), Arm.of([10.0, 11] * 200)), "dislikes": pair(np.ones((2, 400)))}
    verdict = judge(1, arms, Plan())
    assert verdict.action == ROLLBACK
    assert "stay_seconds 10.5 against 105 (-90.0%)" in verdict.reasons[0]


def test_few_users_decide_nothing_and_in_the_end_against_the_canary() -> None:
    few = {name: (Arm.of([1.0] * 10), Arm.of([9.0] * 10)) for name in ("stay_seconds", "dislikes")}
    assert judge(1, few, Plan()).action == CONTINUE
    last = judge(6, few, Plan())
    assert (last.action, last.reasons) == (ROLLBACK, ("10 users in the smaller arm, 100 are wanted",))


def test_everybody_alike() -> None:
    """No variance: equal arms pass the margin, and nothing divides by zero."""
    same = {name: (Arm.of([1.0] * 200), Arm.of([1.0] * 200)) for name in ("stay_seconds", "dislikes")}
    assert judge(1, same, Plan()).action == PROMOTE
    nothing = {name: (Arm.of([0.0] * 200), Arm.of([0.0] * 200)) for name in ("stay_seconds", "dislikes")}
    assert judge(1, nothing, Plan()).action == CONTINUE


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: Plan(looks=0), "cannot be kept"),
        (lambda: Plan(error_rate=0.9), "cannot be kept"),
        (lambda: Measure(name="x", margin=1.5), "expected a share between 0 and 1"),
        (lambda: judge(7, {}, Plan()), "looks 1 to 6"),
        (lambda: judge(1, {}, Plan()), "no figures were given for stay_seconds, dislikes"),
        (lambda: Arm.of([1.0, float("nan")]), "not finite"),
    ],
)
def test_bad_input_is_refused(work: object, words: str) -> None:
    assert callable(work)
    with pytest.raises(ValueError, match=words):
        work()


def test_what_users_did_before_takes_off_chance_and_nothing_else() -> None:
    """The means' difference stays right on average, with much less spread; without a past nothing changes."""
    differences: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        habit = {arm: rng.lognormal(0, 0.8, 150) for arm in ("stable", "canary")}
        now = {arm: habit[arm] * (1.1 if arm == "canary" else 1.0) * rng.lognormal(0, 0.2, 150) for arm in habit}
        past = {arm: habit[arm] * rng.lognormal(0, 0.2, 150) for arm in habit}
        for adjust in differences:
            values = adjusted(now, past) if adjust else now
            differences[adjust].append(values["canary"].mean() - values["stable"].mean())
    true = 0.1 * np.exp(0.8**2 / 2 + 0.2**2 / 2)
    assert np.mean(differences[True]) == pytest.approx(true, abs=0.02)
    assert np.std(differences[True]) < 0.5 * np.std(differences[False])
    nothing = {arm: np.zeros(150) for arm in ("stable", "canary")}
    assert adjusted(now, nothing) == now


def test_false_promotions_stay_within_the_error_rate_when_adjusted() -> None:
    """At the margin, on users with a past, whose one look decides; three standard errors above 0.05 are 0.083."""
    plan, promoted = Plan(looks=1, measures=(STAY_TIME,)), 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        habit = rng.lognormal(0, 0.8, (2, 300))
        factor = np.array([[1.0], [1 - STAY_TIME.margin]])
        now, past = habit * factor * rng.lognormal(0, 0.3, (2, 300)), habit * rng.lognormal(0, 0.3, (2, 300))
        arms = adjusted(dict(zip(ARMS, now, strict=True)), dict(zip(ARMS, past, strict=True)))
        promoted += judge(1, {"stay_seconds": (Arm.of(arms[ARMS[0]]), Arm.of(arms[ARMS[1]]))}, plan).action == PROMOTE
    assert promoted / 400 <= 0.083


def test_what_never_happens_keeps_nobody_back() -> None:
    """No dislike in either arm says that the canary has not many; a handful more than none is bearable."""
    stay = (Arm.of(np.linspace(90, 110, 400)), Arm.of(np.linspace(90, 110, 400)))
    verdict = judge(6, {"stay_seconds": stay, "dislikes": pair(np.zeros((2, 400)))}, Plan())
    assert verdict.action == PROMOTE
    assert "from nothing" in verdict.reasons[1]
    some = np.zeros((2, 400))
    some[1, :40] = 1
    assert judge(6, {"stay_seconds": stay, "dislikes": pair(some)}, Plan()).action == ROLLBACK


def test_users_are_compared_and_who_does_not_come_counts_as_nothing() -> None:
    columns = {
        "user_id": ["a", "a", "b", "c"],
        "play_ms": [1000, 3000, 2000, 9000],
        "dislike": [True, False, False, True],
    }
    filled = {
        "exposure_id": [f"e{i}" for i in range(4)],
        "request_id": ["r"] * 4,
        "item_id": ["i"] * 4,
        "position": np.zeros(4, np.int32),
        "event_time": np.arange(4) + 1_767_225_600_000,
        "source": ["onerec"] * 4,
        "duration_ms": [1] * 4,
        **{flag: [False] * 4 for flag in FLAGS},
    }
    found = compare(conform(pa.table({**filled, **columns}), EXPOSURE), {"stable": ["a", "b"], "canary": ["c", "d"]})
    stay, disliked = found["stay_seconds"], found["dislikes"]
    assert (stay[0].users, stay[0].mean, stay[1].mean) == (2, 3.0, 4.5)
    assert (disliked[0].mean, disliked[1].mean) == (0.5, 0.5)
