"""Self-attention over context tokens: V1's encoder (arXiv 2506.13695, 2.2) and the decoder-only baseline.

The lazy decoder has neither, which is what makes it lazy. Left out: rotary positions; sliding windows.

Shapes: B requests, S context tokens, T targets (or beams), P new tokens, K tokens seen, H heads, G groups, R = H / G,
D (``width``) head width, d model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.attention import Cache, joined, looks_ahead


class ContextAttention(nn.Module):
    """Self-attention over the context tokens: full with a padding bias, causal without one."""

    def __init__(self, d_model: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, d_model // heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.keys = nn.Linear(d_model, 2 * groups * self.width, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., G, D] of tokens [..., d]."""
        key, value = self.keys(x).unflatten(-1, (2, self.groups, self.width)).unbind(-3)
        return key, value

    def context(self, x_BSd: Tensor, bias_BS: Tensor | None) -> tuple[Tensor, Cache]:
        """[B, S, d], and keys and values [B, G, S, D]."""
        query = self.query(x_BSd).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        key, value = (part.transpose(1, 2) for part in self.project(x_BSd))
        mask = None if bias_BS is None else bias_BS[:, None, None].to(query.dtype)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=bias_BS is None, enable_gqa=self.groups < self.heads
        )
        return self.output(mixed.transpose(1, 2).flatten(2)), (key, value)

    def forward(self, x_BSd: Tensor, bias_BS: Tensor) -> tuple[Tensor, Cache]:
        """Full attention; see ``context``."""
        return self.context(x_BSd, bias_BS)


class JointAttention(ContextAttention):
    """Decoder-only attention: a target's tokens see the whole context and their own past, in one softmax.

    With ``recency_bias`` a target's own tokens are of age ``now``, normalised as the behaviours' ages. They compete
    with the context: at age 0, which is two hours old, they drown in it and s3 is learned without s1.
    """

    def __init__(self, d_model: int, heads: int, groups: int, *, recency_bias: bool, now: float) -> None:
        super().__init__(d_model, heads, groups)
        self.now = now
        self.slope = nn.Parameter(-torch.linspace(0.0, 1.0, heads)) if recency_bias else None

    def forward(  # type: ignore[override]
        self, x_BTPd: Tensor, context: tuple[Tensor, Tensor, Tensor, Tensor], past: Cache | None
    ) -> tuple[Tensor, Cache]:
        """[B, T, P, d] and the cache (keys, values [B, T, K, G, D]) including the new tokens."""
        keys, values, bias_BS, age_BS = context
        b, t, p, _ = x_BTPd.shape
        g, r, s = self.groups, self.heads // self.groups, keys.shape[2]
        query = self.query(x_BTPd).view(b, t, p, g, r, self.width)
        key, value = joined(past, *self.project(x_BTPd))
        k = key.shape[2]
        flat = query.permute(0, 3, 4, 1, 2, 5).reshape(b, g, r * t * p, self.width)
        far = (flat @ keys.transpose(-1, -2)).float().view(b, g, r, t, p, s) * self.width**-0.5
        near = torch.einsum("btpgrw,btkgw->bgrtpk", query, key).float() * self.width**-0.5
        bias = bias_BS[:, None, None]
        if self.slope is not None:
            bias = bias + (self.slope[:, None] * age_BS[:, None]).view(b, g, r, s)
            near = near + (self.slope * self.now).view(g, r, 1, 1, 1)
        far = far + bias[:, :, :, None, None]
        near = near.masked_fill(looks_ahead(p, k, near.device), -torch.inf)
        weights = torch.cat([far, near], -1).softmax(-1).to(value.dtype)
        mixed = (weights[..., :s].reshape(b, g, r * t * p, s) @ values).view(b, g, r, t, p, self.width)
        mixed = mixed + torch.einsum("bgrtpk,btkgw->bgrtpw", weights[..., s:], value)
        return self.output(mixed.permute(0, 3, 4, 1, 2, 5).reshape(b, t, p, -1)), (key, value)
