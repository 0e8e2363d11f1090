"""Attention of the lazy decoder: cross-attention without K/V projections, and self-attention inside one item.

OneRec-V2 Technical Report (arXiv 2508.20900), 2.2-2.3. Context keys and values arrive ready made from the context
processor, so cross-attention owns only Q and O; grouped queries share a KV group. Self-attention over one item sees
``levels`` tokens (BOS, s1, s2) and is written as element-wise products: forward and backward take a half to a third of
the time of a batched matmul or a fused kernel in fp32 on a CPU (in bf16 about the same, and less when decoding). A
session's is torch's own.

Departure from V2: ``recency_bias`` adds ``slope_h * age`` to the cross-attention scores (one learned slope per head,
``age`` the normalised log age of the behaviour). BOS is a constant query and has no other way to prefer recent items in
the first layer. Left out: fused kernels for very long contexts, rotary positions (the context carries its times).

Shapes: B requests, Q flattened queries, T targets (or beams), P new tokens, K tokens seen, S context tokens, H heads,
G groups, R = H / G, D head width, d model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.fused import attend

Cache = tuple[Tensor, Tensor]
"""Keys and values [B, T, K, H, D] of the tokens already decoded in one layer."""
FEW_TOKENS = 4
"""Up to here element-wise products beat a fused kernel: one item; a session is longer."""


class CrossAttention(nn.Module):
    """Queries of all targets of a request against that request's one copy of the context KV."""

    def __init__(self, d_model: int, heads: int, *, recency_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        # Spread like ALiBi: head 0 starts blind to age, the last one divides a weight by e per unit (4 e-foldings).
        self.slope = nn.Parameter(-torch.linspace(0.0, 1.0, heads)) if recency_bias else None

    def forward(self, x_BQd: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor, bias_BS: Tensor, age_BS: Tensor) -> Tensor:
        """[B, Q, d]; ``bias_BS`` is 0 on real context tokens and -inf on padding."""
        b, q, _ = x_BQd.shape
        groups, s, width = keys_BGSD.shape[1:]
        repeats = self.heads // groups
        query = self.query(x_BQd).view(b, q, groups, repeats, width).permute(0, 2, 3, 1, 4)
        query = query.reshape(b, groups, repeats * q, width)
        bias = bias_BS[:, None, None, None]
        if self.slope is not None:
            bias = bias + (self.slope[:, None] * age_BS[:, None]).view(b, groups, repeats, 1, s)
        mixed = attend(query, keys_BGSD, values_BGSD, bias).view(b, groups, repeats, q, width)
        return self.output(mixed.permute(0, 3, 1, 2, 4).reshape(b, q, -1))


class SelfAttention(nn.Module):
    """Causal self-attention over the tokens of one item or one session; never across targets."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BTPd: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        """[B, T, P, d] and the cache including the new tokens; ``past`` may have T = 1 (BOS shared by all targets)."""
        b, t, p, d = x_BTPd.shape
        query, key, value = self.qkv(x_BTPd).view(b, t, p, 3, self.heads, d // self.heads).unbind(3)
        key, value = joined(past, key, value)
        seen = key.shape[2]
        if seen > FEW_TOKENS:
            hidden = None if p == 1 else ~looks_ahead(p, seen, x_BTPd.device)
            mixed = F.scaled_dot_product_attention(
                query.transpose(2, 3), key.transpose(2, 3), value.transpose(2, 3), attn_mask=hidden
            )
            return self.output(mixed.transpose(2, 3).reshape(b, t, p, d)), (key, value)
        scores = (query[:, :, :, None] * key[:, :, None]).sum(-1, dtype=torch.float32)  # [B, T, P, K, H]
        scores = scores * (d // self.heads) ** -0.5
        if p > 1:
            scores = scores.masked_fill(looks_ahead(p, seen, x_BTPd.device)[..., None], -torch.inf)
        weights = scores.softmax(3).to(value.dtype)
        mixed = (weights[..., None] * value[:, :, None]).sum(3)  # [B, T, P, H, D]
        return self.output(mixed.reshape(b, t, p, d)), (key, value)


def joined(past: Cache | None, key: Tensor, value: Tensor) -> Cache:
    """Keys and values [B, T, K, H, D] after the past's; ``past`` may have T = 1 (BOS shared by all targets)."""
    if past is None:
        return key, value
    b, t = key.shape[:2]
    old_key, old_value = (part.expand(b, t, *part.shape[2:]) for part in past)
    return torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)


def looks_ahead(new: int, seen: int, device: torch.device) -> Tensor:
    """bool [new, seen]: True where one of the ``new`` last tokens would see a later one."""
    return torch.ones(new, seen, dtype=torch.bool, device=device).triu(seen - new + 1)
