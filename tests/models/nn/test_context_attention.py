"""Decoder-only attention: a target's own tokens and the context in one softmax."""

import torch

from models.nn.context_attention import JointAttention
from models.pathways import NOW


@torch.no_grad()
def test_a_targets_own_tokens_are_as_recent_as_a_behaviour_of_this_moment() -> None:
    """With queries of zero the recency bias alone is left: weights are exp(slope * age) over all that is seen."""
    attention = JointAttention(4, 1, 1, recency_bias=True, now=NOW)
    assert attention.slope is not None
    attention.slope.fill_(-1.0)
    attention.query.weight.zero_()
    attention.output.weight.copy_(torch.eye(4))
    attention.keys.weight.copy_(torch.cat([torch.zeros(4, 4), torch.eye(4)]))  # values are the tokens themselves
    own = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    values = torch.eye(4)[:3].view(1, 1, 3, 4)
    ages = torch.tensor([[NOW, 0.0, 1.0]])
    mixed, _ = attention(own, (torch.zeros_like(values), values, torch.zeros(1, 3), ages), None)
    expected = (-torch.tensor([NOW, 0.0, 1.0, NOW])).softmax(0)
    torch.testing.assert_close(mixed.flatten(), expected)
    assert expected[3] > 0.4
