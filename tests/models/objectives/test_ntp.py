import math

import pytest
import torch

from models.objectives.ntp import ntp_loss


def test_uniform_logits_cost_ln_codes_whatever_the_weights() -> None:
    targets = torch.randint(0, 8, (2, 3, 3))
    loss = ntp_loss(torch.zeros(2, 3, 3, 8), targets, torch.rand(2, 3))
    assert loss.item() == pytest.approx(math.log(8))


def test_padding_weighs_nothing() -> None:
    logits = torch.randn(1, 2, 3, 8, requires_grad=True)
    targets = torch.randint(0, 8, (1, 2, 3))
    targets[0, 1] = -1
    loss = ntp_loss(logits, targets, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(loss, ntp_loss(logits[:, :1], targets[:, :1], torch.ones(1, 1)))
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[0, 1].any()
    assert ntp_loss(logits, targets, torch.zeros(1, 2)).item() == 0
