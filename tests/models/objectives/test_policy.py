import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.objectives.policy import divergence, entropy, group_advantages, guards, log_ratios

NAN = float("nan")
REWARDS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=12)


@settings(max_examples=150)
@given(REWARDS)
def test_advantages_are_centred_bounded_and_keep_the_order(rewards: list[float]) -> None:
    found = group_advantages(torch.tensor([rewards]))[0]
    assert found.isfinite().all()
    assert found.abs().max() <= 5
    if found.any() and found.abs().max() < 5:
        assert found.mean().abs() < 1e-3
        assert found.square().mean().item() == pytest.approx(1, abs=1e-3)
    order = torch.tensor(rewards).argsort()
    assert (found[order].diff() >= -1e-6).all()


@settings(max_examples=50)
@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 9))
def test_a_group_with_equal_rewards_teaches_nothing(reward: float, size: int) -> None:
    assert not group_advantages(torch.full((1, size), reward)).any()


def test_masked_and_missing_rewards_take_no_part() -> None:
    rewards = torch.tensor([[1.0, 3.0, 100.0, NAN], [7.0, NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False, True], [True] * 4])
    assert group_advantages(rewards, mask).tolist() == [[-1.0, 1.0, 0.0, 0.0], [0.0] * 4]


def test_a_missing_old_log_probability_means_the_current_policy() -> None:
    log_pi = torch.tensor([-2.0, -2.0, -2.0, -2.0], requires_grad=True)
    ratios = log_ratios(log_pi, torch.tensor([NAN, -3.0, -math.inf, 0.5]))
    assert ratios.tolist() == pytest.approx([0.0, 1.0, 10.0, -2.0])  # a probability above 1 is a rounding error
    ratios.sum().backward()
    assert log_pi.grad is not None
    assert log_pi.grad.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_guards_see_movement_certainty_and_spread() -> None:
    logits = torch.zeros(1, 3, 2, 4)
    logits[0, 0, :, 1] = 100.0
    targets = torch.ones(1, 3, 2, dtype=torch.long)
    old = torch.full((1, 3, 2), math.log(0.25))
    old[0, 0] = NAN
    seen = guards(logits, targets, torch.tensor([[1.0, -1.0, 9.0]]), old, torch.tensor([[True, True, False]]))
    assert seen["policy/entropy"] == pytest.approx(math.log(4) / 2)
    assert seen["policy/kl"] == pytest.approx(0, abs=1e-6)
    assert seen["policy/advantage_std"] == 1
    assert seen["policy/active_share"] == 1
    moved = guards(logits, targets, torch.zeros(1, 3), torch.full((1, 3, 2), math.log(0.9)))
    assert moved["policy/kl"] > 0.1
    assert moved["policy/active_share"] == 0
    nothing = guards(logits, targets, torch.ones(1, 3), old, torch.zeros(1, 3))
    assert set(nothing.values()) == {0.0}


def test_entropy_is_that_of_the_first_code() -> None:
    logits = torch.zeros(3, 2, 3, 8)
    logits[1, :, 0, 0] = 100.0
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    assert entropy(logits, mask) == pytest.approx(np.log(8) / 2, abs=1e-4)


def test_divergence_is_the_exact_kl_of_unmasked_targets() -> None:
    torch.manual_seed(0)
    logits, before = torch.randn(2, 3, 3, 5), torch.randn(2, 3, 3, 5)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=before)
    )
    assert divergence(logits, before, mask) == pytest.approx(float(expected[mask].mean()), rel=1e-5)
    assert divergence(logits, logits, mask) == pytest.approx(0, abs=1e-6)
    assert divergence(logits, before, torch.zeros(2, 3)) == 0
