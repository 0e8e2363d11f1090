import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.serving.admission import Budget, Limits
from models.serving.errors import Overloaded


def budget(seconds_a_row: float, **limits: float) -> Budget:
    made = Budget(Limits(**limits))  # type: ignore[arg-type]
    made.costs.ran("k", 100, 100 * seconds_a_row)
    return made


def test_the_wait_is_estimated_from_what_ran() -> None:
    queue = budget(0.01, max_rows=4, queue_s=0.505)
    for _ in range(50):
        queue.admit("k", 1)
    with pytest.raises(Overloaded, match=r"50 users .* 0\.5 s") as refused:
        queue.admit("k", 1)
    assert refused.value.retry_after == 1
    queue.leave(10, 0.1)
    queue.admit("k", 10)


def test_batches_that_run_at_once_share_the_wait() -> None:
    queue = budget(0.01, max_rows=4, queue_s=0.5075, at_once=2)
    for _ in range(101):
        queue.admit("k", 1)
    with pytest.raises(Overloaded, match=r"101 users .* 0\.5 s"):
        queue.admit("k", 1)


def test_a_glance_refuses_what_admission_would_and_nothing_else() -> None:
    queue = budget(0.01, max_rows=4, queue_s=0.505)
    for _ in range(50):
        queue.glance(1)
        queue.admit("k", 1)
    with pytest.raises(Overloaded):
        queue.glance(1)
    assert queue.rows == 50
    queue.leave(10, 0.1)
    queue.glance(10)
    queue.costs.ran("wide", 10, 10.0)
    queue.leave(40, 0.4)
    queue.admit("wide", 3)  # it found nobody waiting
    with pytest.raises(Overloaded):
        queue.glance(1)


def test_a_call_of_another_kind_has_another_cost_and_an_unknown_one_none() -> None:
    queue = budget(0.01, max_rows=4, queue_s=0.5)
    queue.costs.ran("wide", 10, 10.0)
    assert queue.admit("new", 100) == 0
    assert queue.admit("k", 10) == pytest.approx(0.1)
    with pytest.raises(Overloaded):
        queue.admit("wide", 1)


def test_whatever_it_costs_a_call_may_wait_alone_and_a_full_batch_may_wait() -> None:
    queue = budget(10.0, max_rows=4, queue_s=0.5, queue_rows=8)
    queue.admit("k", 128)
    for batch_s, full in ((40.0, 4), (20.0, 2), (0.25, 1)):
        queue = budget(10.0, max_rows=4, queue_s=0.5, batch_s=batch_s)
        for _ in range(full):
            queue.admit("k", 1)
        with pytest.raises(Overloaded):
            queue.admit("k", 1)


def test_batches_are_short_where_rows_are_expensive() -> None:
    assert budget(0.001, max_rows=32, batch_s=0.25).batch_rows("k") == 32
    assert budget(0.05, max_rows=32, batch_s=0.25).batch_rows("k") == 5
    assert budget(3.0, max_rows=32, batch_s=0.25).batch_rows("k") == 1
    assert budget(3.0, max_rows=32, batch_s=0.25).batch_rows("never ran") == 32


@given(st.lists(st.tuples(st.sampled_from("kx"), st.integers(1, 40)), max_size=30))
def test_who_leaves_takes_everything_along(calls: list[tuple[str, int]]) -> None:
    queue, inside = budget(0.01, queue_rows=200), []
    for kind, rows in calls:
        try:
            inside.append((rows, queue.admit(kind, rows)))
        except Overloaded:
            assert queue.rows
    assert queue.rows == sum(rows for rows, _ in inside)
    assert queue.rows <= 200
    for rows, cost in inside:
        queue.leave(rows, cost)
    assert (queue.rows, queue.seconds) == (0, 0.0)


def test_nonsense_limits_are_refused() -> None:
    for wrong in ({"max_rows": 0}, {"queue_s": 0.0}, {"max_wait_s": -1.0}, {"queue_rows": 0}, {"batch_s": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            Limits(**wrong)  # type: ignore[arg-type]


def test_calls_may_wait_longer_while_another_bundle_is_loaded() -> None:
    patience = 1.0
    budget = Budget(Limits(max_rows=1, queue_s=1.0), lambda: patience)
    budget.costs.ran("kind", 1, 0.6)
    budget.admit("kind", 1)
    with pytest.raises(Overloaded):
        budget.admit("kind", 1)
    patience = 4.0
    costs = [budget.admit("kind", 1) for _ in range(2)]
    patience = 1.0
    costs.append(budget.admit("kind", 1))  # those who waited already are many; who comes now is still let in
    for cost in [*costs, 0.6]:
        budget.leave(1, cost)
    budget.admit("kind", 1)
    with pytest.raises(Overloaded):
        budget.admit("kind", 1)
