import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.objectives.gbpo import gbpo_loss
from models.objectives.ntp import ntp_loss

NAN = float("nan")


def token_gradient(logits: torch.Tensor, advantage: float, old: float) -> torch.Tensor:
    leaf = logits.double().clone().requires_grad_()
    loss, _ = gbpo_loss(
        leaf.view(1, 1, 1, -1), torch.zeros(1, 1, 1, dtype=torch.long), torch.tensor([[advantage]]),
        torch.tensor([[[old]]]),
    )  # fmt: skip
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@settings(max_examples=200)
@given(
    st.floats(-40, 40),
    st.sampled_from([-1.0, 1.0]),
    st.one_of(st.just(NAN), st.just(-math.inf), st.floats(-60, 0), st.just(1e-6)),
)
def test_gradient_of_one_token_is_bounded(logit: float, advantage: float, old: float) -> None:
    gradient = token_gradient(torch.tensor([logit, 0.0, -1.0, 1.0]), advantage, old)
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1 + 1e-4
    # Descent raises the target's logit for A > 0 and lowers it for A < 0.
    assert -gradient[0] * advantage >= 0


def test_positive_on_policy_is_the_policy_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, 5, requires_grad=True)
    targets, advantages = torch.randint(0, 5, (2, 3, 3)), torch.ones(2, 3)
    loss, metrics = gbpo_loss(logits, targets, advantages, torch.full((2, 3, 3), NAN))
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(ntp_loss(logits, targets, torch.ones(2, 3)), logits)
    torch.testing.assert_close(gradient, expected)
    assert metrics["gbpo/ratio_mean"] == pytest.approx(1)
    assert metrics["gbpo/logged_share"] == 0


def test_logged_probability_caps_the_ratio() -> None:
    """pi = 0.25 everywhere: against pi_old = 0.5 half the weight, against 0.1 the bound pi itself takes over."""
    logits, targets = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, dtype=torch.long)
    old = torch.tensor([0.5, 0.1]).log().view(1, 2, 1)
    loss, metrics = gbpo_loss(logits, targets, torch.ones(1, 2), old)
    assert loss.item() == pytest.approx(-(0.5 + 1.0) / 2)
    assert metrics["gbpo/bounded_share"] == 0.5
    # A < 0: max(pi_old, 1 - pi) = 0.75 for both.
    loss, metrics = gbpo_loss(logits, targets, -torch.ones(1, 2), old)
    assert loss.item() == pytest.approx(0.25 / 0.75)
    assert metrics["gbpo/negatives"] == 2


def test_masked_zero_and_unknown_advantages_do_not_push() -> None:
    logits = torch.randn(1, 4, 3, 5, requires_grad=True)
    advantages = torch.tensor([[1.0, 0.0, -1.0, NAN]])
    targets = torch.randint(0, 5, (1, 4, 3))
    targets[0, 2] = -1
    loss, _ = gbpo_loss(logits, targets, advantages, torch.full((1, 4, 3), NAN), torch.tensor([[1, 1, 0, 1]]))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].any()
    assert not logits.grad[0, 1:].any()
    nothing, _ = gbpo_loss(logits, targets, advantages, torch.full((1, 4, 3), NAN), torch.zeros(1, 4))
    assert nothing.item() == 0


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="need targets and old_log_probs"):
        gbpo_loss(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3).long(), torch.zeros(1, 3), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="expected"):
        ntp_loss(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2).long(), torch.zeros(1, 2))


@settings(max_examples=200)
@given(
    st.floats(1e-6, 1 - 1e-6),
    st.floats(-5, 5),
    st.one_of(st.just(NAN), st.floats(-60, 0)),
    st.integers(2, 9),
)
def test_one_token_moves_a_logit_by_at_most_its_advantage_for_every_pi(
    pi: float, advantage: float, old: float, codes: int
) -> None:
    logits = torch.full((codes,), math.log((1 - pi) / (codes - 1)))
    logits[0] = math.log(pi)
    gradient = token_gradient(logits, advantage, old)
    assert gradient.abs().max() <= abs(advantage) * (1 + 1e-3) + 1e-6
