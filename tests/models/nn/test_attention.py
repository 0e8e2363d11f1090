import torch

from models.nn.attention import CrossAttention, SelfAttention
from models.nn.blocks import RMSNorm


def test_cached_self_attention_equals_the_whole_sequence() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 4)
    x = torch.randn(2, 3, 3, 16)
    whole, _ = attention(x, None)
    cache, steps = None, []
    for position in range(3):
        out, cache = attention(x[:, :, position : position + 1], cache)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 2), whole)


def test_self_attention_is_causal_and_stays_inside_the_item() -> None:
    attention = SelfAttention(16, 4)
    x = torch.randn(1, 2, 3, 16)
    changed = x.clone()
    changed[0, 0, 2] += 1
    before, after = attention(x, None)[0], attention(changed, None)[0]
    moved = (before != after).any(-1)[0]
    assert moved.tolist() == [[False, False, True], [False, False, False]]


def test_recency_slope_prefers_young_behaviours() -> None:
    attention = CrossAttention(8, 2, recency_bias=True)
    with torch.no_grad():
        attention.query.weight.zero_()
        attention.output.weight.copy_(torch.eye(8))
        attention.slope.fill_(-50.0)  # type: ignore[union-attr]
    keys = torch.randn(1, 1, 3, 4)
    out = attention(torch.randn(1, 1, 8), keys, keys, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 0.5]]))
    torch.testing.assert_close(out[0, 0], keys[0, 0, 1].repeat(2))


def test_rms_norm_is_computed_in_fp32() -> None:
    x = torch.full((4, 8), 3e4, dtype=torch.float16)  # its square overflows fp16
    assert torch.allclose(RMSNorm(8)(x).float(), torch.ones(4, 8), atol=1e-3)
