"""Building blocks: RMSNorm, SwiGLU and the lazy decoder block (OneRec-V2, arXiv 2508.20900, 2.3).

RMSNorm computes in fp32 whatever autocast says; the residual stream stays fp32. Left out: mixture-of-experts FFN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.attention import Cache, CrossAttention, SelfAttention


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in fp32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised ``x`` in its own dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """``W_o (silu(W_g x) * W_u x)`` with the two input projections in one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        gate, up = self.input(x).chunk(2, -1)
        return self.output(F.silu(gate) * up)


class LazyBlock(nn.Module):
    """Cross-attention to shared KV, causal self-attention inside the item, SwiGLU of width 4d; all pre-RMSNorm."""

    def __init__(self, d_model: int, heads: int, *, recency_bias: bool, dropout: float) -> None:
        super().__init__()
        self.cross_norm, self.self_norm, self.ffn_norm = (RMSNorm(d_model) for _ in range(3))
        self.cross = CrossAttention(d_model, heads, recency_bias=recency_bias)
        self.attention = SelfAttention(d_model, heads)
        self.ffn = SwiGLU(d_model, 4 * d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, h_BTPd: Tensor, context: tuple[Tensor, Tensor, Tensor, Tensor], past: Cache | None
    ) -> tuple[Tensor, Cache]:
        """New residual stream [B, T, P, d] and cache; ``context`` = keys, values, padding bias, ages."""
        flat = self.cross_norm(h_BTPd).flatten(1, 2)
        h = h_BTPd + self.dropout(self.cross(flat, *context).view_as(h_BTPd))
        inner, cache = self.attention(self.self_norm(h), past)
        h = h + self.dropout(inner)
        return h + self.dropout(self.ffn(self.ffn_norm(h))), cache
