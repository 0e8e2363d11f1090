"""ECPO and the GRPO that it bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.objectives.ecpo import ecpo_loss
from models.objectives.grpo import ClipConfig, grpo_loss

NAN = float("nan")
CONFIG = ClipConfig(epsilon=0.2, delta=0.1)
LOSSES = pytest.mark.parametrize("loss", [grpo_loss, ecpo_loss])


def sample(seed: int, levels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [2, 4, L, 5] with gradient, targets, log pi [2, 4, L])."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, levels, 5, generator=generator).requires_grad_()
    targets = torch.randint(0, 5, (2, 4, levels), generator=generator)
    log_pi = logits.detach().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logits, targets, log_pi


def one_token(logit: float, old: float, advantage: float, loss) -> tuple[float, Tensor]:
    logits = torch.tensor([logit, 0.0, 0.0]).view(1, 1, 1, 3).requires_grad_()
    value, _ = loss(logits, torch.zeros(1, 1, 1, dtype=torch.long), torch.tensor([[advantage]]),
                    torch.tensor(old).view(1, 1, 1), None, CONFIG)  # fmt: skip
    value.backward()
    assert logits.grad is not None
    return float(value.detach()), logits.grad.flatten()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(-0.08, 0.08))
def test_they_agree_where_nothing_is_clipped(seed: int, gap: float) -> None:
    logits, targets, log_pi = sample(seed)
    advantages = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    found = [loss(logits, targets, advantages, log_pi + gap / 2, None, CONFIG)[0] for loss in (grpo_loss, ecpo_loss)]
    gradients = [torch.autograd.grad(value, logits)[0] for value in found]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@settings(max_examples=200)
@given(st.floats(-20, 20), st.one_of(st.just(-math.inf), st.just(NAN), st.floats(-40, 0)), st.sampled_from([-1.0, 1.0]))
def test_ecpos_gradient_is_bounded_whatever_the_sampler_said(logit: float, old: float, advantage: float) -> None:
    _, gradient = one_token(logit, old, advantage, ecpo_loss)
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1 + CONFIG.epsilon + CONFIG.delta + 1e-4
    assert -gradient[0] * advantage >= 0


def test_grpos_gradient_is_not() -> None:
    """A disliked sample that the lagging sampler thought unlikely."""
    _, unbounded = one_token(0.0, -9.0, -1.0, grpo_loss)
    _, bounded = one_token(0.0, -9.0, -1.0, ecpo_loss)
    assert unbounded.abs().max() > 100 * bounded.abs().max() > 0


def test_the_rules_of_the_clip() -> None:
    """pi = 1/3; ratio = pi / pi_old."""
    pi = 1 / 3
    for loss in (grpo_loss, ecpo_loss):
        assert one_token(0.0, math.log(pi / 2), 1.0, loss)[0] == pytest.approx(-1.2)  # A > 0: at most 1 + eps
        assert not one_token(0.0, math.log(pi / 2), 1.0, loss)[1].any()
        assert one_token(0.0, math.log(pi / 0.5), -1.0, loss)[0] == pytest.approx(0.8)  # A < 0: at least 1 - eps
        assert not one_token(0.0, math.log(pi / 0.5), -1.0, loss)[1].any()
    assert one_token(0.0, math.log(pi / 2), -1.0, grpo_loss)[0] == pytest.approx(2.0)
    assert one_token(0.0, math.log(pi / 2), -1.0, ecpo_loss)[0] == pytest.approx(1.3)  # 1 + eps + delta


@LOSSES
def test_equal_rewards_and_masks_push_nothing(loss) -> None:
    logits, targets, log_pi = sample(1)
    value, metrics = loss(logits, targets, torch.zeros(2, 4), log_pi - 3, None)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert not gradient.any()
    assert all(math.isfinite(number) for number in metrics.values())
    advantages = torch.tensor([[1.0, -1.0, NAN, 1.0]] * 2)
    mask = torch.tensor([[True, True, True, False]] * 2)
    (gradient,) = torch.autograd.grad(loss(logits, targets, advantages, log_pi, mask)[0], logits)
    assert gradient[:, :2].any()
    assert not gradient[:, 2:].any()
    assert loss(logits, targets, advantages, log_pi, torch.zeros(2, 4))[0] == 0


@LOSSES
def test_without_old_log_probabilities_it_is_the_policy_gradient(loss) -> None:
    logits, targets, log_pi = sample(2)
    advantages = torch.tensor([[1.0, -2.0, 0.5, 0.0]] * 2)
    missing = log_pi.clone()
    missing[..., 1] = NAN
    value, metrics = loss(logits, targets, advantages, missing)
    (gradient,) = torch.autograd.grad(value, logits)
    again = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).sum(-1)
    (expected,) = torch.autograd.grad(-(again * advantages).mean(), logits)
    torch.testing.assert_close(gradient, expected)
    assert metrics[f"{loss.__name__.split('_')[0]}/logged_share"] == 0


@LOSSES
def test_shapes_and_settings_are_checked(loss) -> None:
    logits, targets, log_pi = sample(0)
    with pytest.raises(ValueError, match="need targets and old_log_probs"):
        loss(logits, targets, torch.zeros(2, 3), log_pi)
    with pytest.raises(ValueError, match="epsilon 0"):
        ClipConfig(epsilon=0.0)
