import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.rewards.format import chosen, format_advantage, random_k, top_k

LEGAL = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


@settings(max_examples=100)
@given(LEGAL, st.integers(0, 9), st.sampled_from(["random", "top"]), st.data())
def test_only_chosen_legal_samples_count_and_exactly_k_are_chosen(legal, seed, choice, data) -> None:
    k = data.draw(st.integers(1, legal.shape[1]))
    log_probs = np.random.default_rng(seed).normal(size=legal.shape)
    picked = chosen(choice, log_probs, k, seed)
    assert (picked.sum(1) == k).all()
    advantages, mask = format_advantage(legal, picked)
    assert (mask == (legal & picked)).all()
    assert (advantages == mask).all()
    assert advantages.dtype == np.float32


def test_random_choice_is_fair_and_repeatable() -> None:
    picked = random_k((40_000, 8), 2, seed=1)
    assert np.abs(picked.mean(0) - 0.25).max() < 0.02
    np.testing.assert_array_equal(picked, random_k((40_000, 8), 2, seed=1))
    assert (picked != random_k((40_000, 8), 2, seed=2)).any()


def test_top_takes_the_likeliest_and_missing_ones_last() -> None:
    log_probs = np.array([[-1.0, np.nan, -0.5, -3.0]])
    assert top_k(log_probs, 2).tolist() == [[True, False, True, False]]
    assert top_k(log_probs, 3).tolist() == [[True, False, True, True]]


def test_no_legal_sample_gives_nothing_to_learn() -> None:
    advantages, mask = format_advantage(np.zeros((2, 3), bool), np.ones((2, 3), bool))
    assert not advantages.any()
    assert not mask.any()


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 4 of 3"):
        random_k((2, 3), 4, 0)
    with pytest.raises(ValueError, match="both must be"):
        format_advantage(np.ones((2, 3), bool), np.ones((2, 4), bool))
