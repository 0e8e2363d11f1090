from itertools import pairwise

import numpy as np
import pytest

from models.rewards.fusion import MOST_WEIGHT, by_information, chosen, pareto_search

CEILING = np.array([0.8, 0.7, 0.9])


def share(weights: np.ndarray) -> np.ndarray:
    """A p that serves each objective by its share of the weights: every raise costs the others something."""
    return 0.5 + (CEILING - 0.5) * np.sqrt(weights / weights.sum())


def test_the_neglected_objective_is_raised_until_nobody_gains_without_loss() -> None:
    path = pareto_search(np.array([1.0, 1.0, 0.01]), CEILING, share)
    outcome = chosen(path)
    assert outcome.weights[2] > 0.1
    assert outcome.aucs[2] > path[0].aucs[2] + 0.1
    assert [step.kept for step in path[:2]] == [True, True]
    assert path[-1].kept is False
    for step in path:
        assert step.weights.mean() == pytest.approx(1)


def test_kept_steps_gain_more_than_they_cost() -> None:
    kept = [step for step in pareto_search(np.array([1.0, 1.0, 0.01]), CEILING, share) if step.kept]
    for before, after in pairwise(kept):
        change = after.aucs - before.aucs
        assert change[after.raised] > -np.delete(change, after.raised).clip(max=0).sum()


def test_objectives_without_positives_and_zero_weights_stay_out() -> None:
    ceiling = np.array([0.8, np.nan, 0.9])
    path = pareto_search(np.array([1.0, 1.0, 0.0]), ceiling, lambda w: np.where(np.isnan(ceiling), np.nan, share(w)))
    assert {step.raised for step in path} <= {-1, 0}
    assert all(step.weights[2] == 0 for step in path)


def test_no_weight_is_raised_beyond_the_most() -> None:
    def endless(weights: np.ndarray) -> np.ndarray:
        return np.array([0.8, 0.7, 0.5 + 0.01 * np.log(weights[2])])

    ratios = [step.weights[2] / step.weights.min() for step in pareto_search(np.ones(3), CEILING, endless)]
    assert MOST_WEIGHT / 2 < max(ratios) <= MOST_WEIGHT


def test_at_the_ceiling_there_is_nothing_to_search() -> None:
    assert len(pareto_search(np.ones(3), CEILING, lambda _: CEILING)) == 1


def test_information_weights() -> None:
    weights = by_information(np.array([0.5, 0.01, 0.0, 1.0]))
    assert weights[1] > 5 * weights[0] > 0
    assert not weights[2:].any()
    assert not by_information(np.zeros(3)).any()
    with pytest.raises(ValueError, match="not all 0"):
        pareto_search(np.zeros(3), CEILING, share)
