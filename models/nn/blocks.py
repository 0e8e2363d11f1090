"""Building blocks: RMSNorm, SwiGLU, and the blocks of the architectures, all pre-RMSNorm with residuals.

The lazy block is OneRec-V2's (arXiv 2508.20900, 2.3), encoder block and decoder block V1's (2506.13695, 2.2), the
decoder-only block the usual one. An ``ffn`` is a SwiGLU or an MoE layer. RMSNorm computes in fp32 whatever autocast
says; the residual stream stays fp32.

Shapes: B requests, T targets or beams, P new tokens, S context tokens, d model width.
"""

import torch
from torch import Tensor, nn

from models.nn.attention import Cache, CrossAttention, SelfAttention
from models.nn.context_attention import ContextAttention, JointAttention
from models.nn.fused import rms_norm, silu_gate
from models.nn.moe import MoE

ContextRow = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values [B, G, S, D], padding bias [B, S] and ages [B, S]."""


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in fp32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised ``x`` in its own dtype."""
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """``W_o (silu(W_g x) * W_u x)`` with the two input projections in one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        return self.output(silu_gate(self.input(x)))


def feed(ffn: nn.Module, x: Tensor, real: Tensor | None) -> Tensor:
    """``ffn`` of ``x`` [..., d]; an MoE layer is told which tokens are ``real`` and not padding."""
    fed: Tensor = ffn(x, real) if isinstance(ffn, MoE) else ffn(x)
    return fed


class LazyBlock(nn.Module):
    """Cross-attention to shared KV, causal self-attention inside the item, FFN."""

    def __init__(self, d_model: int, heads: int, ffn: nn.Module, *, recency_bias: bool, dropout: float) -> None:
        super().__init__()
        self.cross_norm, self.self_norm, self.ffn_norm = (RMSNorm(d_model) for _ in range(3))
        self.cross = CrossAttention(d_model, heads, recency_bias=recency_bias)
        self.attention = SelfAttention(d_model, heads)
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, h_BTPd: Tensor, context: ContextRow, past: Cache | None, real: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """New residual stream [B, T, P, d] and cache; ``real`` bool [B, T, P] is False on padding."""
        flat = self.cross_norm(h_BTPd).flatten(1, 2)
        h = h_BTPd + self.dropout(self.cross(flat, *context).view_as(h_BTPd))
        inner, cache = self.attention(self.self_norm(h), past)
        h = h + self.dropout(inner)
        return h + self.dropout(feed(self.ffn, self.ffn_norm(h), real)), cache


class DecoderBlock(LazyBlock):
    """V1's order: causal self-attention, then cross-attention to this layer's own KV, then FFN."""

    def forward(
        self, h_BTPd: Tensor, context: ContextRow, past: Cache | None, real: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """New residual stream [B, T, P, d] and cache; ``real`` bool [B, T, P] is False on padding."""
        inner, cache = self.attention(self.self_norm(h_BTPd), past)
        h = h_BTPd + self.dropout(inner)
        h = h + self.dropout(self.cross(self.cross_norm(h).flatten(1, 2), *context).view_as(h))
        return h + self.dropout(feed(self.ffn, self.ffn_norm(h), real)), cache


class EncoderBlock(nn.Module):
    """Full self-attention over the context, FFN."""

    def __init__(self, d_model: int, heads: int, ffn: nn.Module, *, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.ffn_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.attention = ContextAttention(d_model, heads, heads)
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSd: Tensor, bias_BS: Tensor) -> Tensor:
        """[B, S, d]; ``bias_BS`` is -inf on padding."""
        inner, _ = self.attention(self.self_norm(x_BSd), bias_BS)
        x = x_BSd + self.dropout(inner)
        return x + self.dropout(feed(self.ffn, self.ffn_norm(x), bias_BS == 0))


class CausalBlock(nn.Module):
    """Decoder-only: the same weights run over the context (``encode``) and over the targets' tokens (``forward``)."""

    def __init__(self, d_model: int, attention: JointAttention, ffn: nn.Module, *, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.ffn_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.attention = attention
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def encode(self, x_BSd: Tensor, real_BS: Tensor) -> tuple[Tensor, Cache]:
        """Context tokens one layer on, and the keys and values [B, G, S, D] that everything after them reads."""
        inner, kv = self.attention.context(self.self_norm(x_BSd), None)
        x = x_BSd + self.dropout(inner)
        return x + self.dropout(feed(self.ffn, self.ffn_norm(x), real_BS)), kv

    def forward(
        self, h_BTPd: Tensor, context: ContextRow, past: Cache | None, real: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """New residual stream [B, T, P, d] and cache of the targets' own tokens; ``real`` as in ``LazyBlock``."""
        inner, cache = self.attention(self.self_norm(h_BTPd), context, past)
        h = h_BTPd + self.dropout(inner)
        return h + self.dropout(feed(self.ffn, self.ffn_norm(h), real)), cache
