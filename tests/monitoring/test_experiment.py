import numpy as np
import pytest

from monitoring.experiment import Split, adjusted_difference, assign, bootstrap_mean, paired_difference

ARMS = ("a", "b", "c")


def people(n: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    return {f"u{i}": float(v) for i, v in enumerate(rng.exponential(10, n))}


def test_every_block_holds_users_alike_in_the_pre_period() -> None:
    before = people(300)
    assignment = assign(before, ARMS, "salt")
    assert len(assignment.blocks) == 100
    assert len(assignment.arm_of()) == 300
    inside = np.mean([np.ptp([before[user] for user in block.values()]) for block in assignment.blocks])
    assert inside < 0.1 * np.ptp(list(before.values()))


def test_assignment_depends_on_the_salt_and_on_nothing_else() -> None:
    before = people(60)
    shuffled = dict(reversed(list(before.items())))
    assert assign(before, ARMS, "x") == assign(shuffled, ARMS, "x")
    assert assign(before, ARMS, "x") != assign(before, ARMS, "y")


def test_too_few_users_are_refused_with_a_count() -> None:
    with pytest.raises(ValueError, match="2 users cannot fill one block of 3 arms"):
        assign({"u": 1.0, "v": 2.0}, ARMS, "x")


def test_a_true_difference_is_found_and_a_null_one_rarely() -> None:
    assignment = assign(people(600), ARMS, "s")
    found = false_alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        measure = {user: float(rng.normal(10, 2)) for user in assignment.arm_of()}
        for block in assignment.blocks:
            measure[block["a"]] += 1.0
        found += paired_difference(assignment, measure, "a", "b", samples=500).low > 0
        null = paired_difference(assignment, measure, "b", "c", samples=500)
        false_alarms += not null.low < 0 < null.high
    assert found == 20
    assert false_alarms <= 4


def test_a_user_who_never_came_counts_as_zero() -> None:
    assignment = assign(people(3), ARMS, "s")
    block = assignment.blocks[0]
    assert paired_difference(assignment, {block["a"]: 4.0}, "a", "b").mean == 4.0


def test_no_values_give_nan_bounds() -> None:
    interval = bootstrap_mean(np.array([]))
    assert np.isnan(interval.low)
    assert interval.pairs == 0


def test_adjusting_removes_the_luck_of_the_draw_and_keeps_the_effect() -> None:
    assignment = assign(people(300), ARMS, "s")
    rng = np.random.default_rng(0)
    habit = {user: float(rng.normal(10, 3)) for user in assignment.arm_of()}
    before = {user: value + float(rng.normal(0, 1)) for user, value in habit.items()}
    after = {user: value + float(rng.normal(0, 1)) for user, value in habit.items()}
    for block in assignment.blocks:
        after[block["a"]] += 0.5
    plain = paired_difference(assignment, after, "a", "b")
    adjusted = adjusted_difference(assignment, after, before, "a", "b")
    assert adjusted.high - adjusted.low < 0.6 * (plain.high - plain.low)
    assert adjusted.low < 0.5 < adjusted.high


def test_a_constant_baseline_changes_nothing() -> None:
    assignment = assign(people(30), ARMS, "s")
    measure = {user: float(i) for i, user in enumerate(assignment.arm_of())}
    same = dict.fromkeys(measure, 1.0)
    assert adjusted_difference(assignment, measure, same, "a", "b") == paired_difference(assignment, measure, "a", "b")


def test_a_split_gives_the_same_people_the_same_arm_and_keeps_its_share() -> None:
    users = [f"u{number}" for number in range(20_000)]
    arms = [Split(share=0.2, salt="a").arm(user) for user in users]
    assert arms == [Split(share=0.2, salt="a").arm(user) for user in users]
    assert np.mean([arm == "canary" for arm in arms]) == pytest.approx(0.2, abs=0.01)
    wider = [Split(share=0.5, salt="a").arm(user) for user in users]
    assert all(now == "canary" for before, now in zip(arms, wider, strict=True) if before == "canary")
    other = [Split(share=0.2, salt="b").arm(user) for user in users]
    both = np.mean([a == b == "canary" for a, b in zip(arms, other, strict=True)])
    assert both == pytest.approx(0.04, abs=0.01), "another canary, other people"
