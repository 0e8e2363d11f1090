"""OneRec-V2: the lazy decoder-only recommender (arXiv 2508.20900, 2.1-2.3).

A context processor turns the behaviours and the user-static token into ``l_kv`` sets of keys and values once per
request; N decoder layers read them by cross-attention without K/V projections, layer ``l`` reading set
``floor(l * l_kv / N)``. The decoder sees only ``[BOS, s1, s2]``: all compute goes into target tokens.

Departures, ours: the recency bias (models.nn.attention), ``context_layers``, ``start_from_newest``, the memory of
prefixes (models.nn.memory), ``processor="mixed"`` (Linear, SwiGLU residual, Linear before the KV split; what stands
there is unpublished, ``"direct"`` is what the paper's FLOPs imply), ``head="tied"``. Left out: request-time features.

Shapes: B requests, S context tokens (static token included), G KV groups, D head width, d model width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.behaviours import BehaviourEmbedding, Packing, Widths, dense, require_positive
from models.generator import ContextKV, Generator, GeneratorConfig
from models.nn.blocks import EncoderBlock, LazyBlock, RMSNorm, SwiGLU
from models.pathways import ContextTensors


@dataclass(frozen=True, kw_only=True)
class V2Config(GeneratorConfig):
    """Sizes of the lazy decoder."""

    layers: int = 3
    l_kv: int = 1
    """Distinct sets of keys and values for all layers."""
    s_kv: int = 1
    """1: values are the keys; 2: values of their own."""
    processor: Literal["mixed", "direct"] = "mixed"
    """``direct``: features of width levels * embed go straight into the KV split, as V2's FLOPs imply."""
    context_layers: int = 0
    """Self-attention blocks over the context before the KV split: 0 is V2's, whose context is never mixed (ours)."""
    start_from_newest: bool = False
    """BOS starts from the newest behaviour instead of being a constant (ours)."""
    dense_blocks: int = 2
    """The first blocks keep a dense FFN when there are experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "layers", "l_kv")
        if self.l_kv > self.layers or self.s_kv not in (1, 2):
            raise ValueError(f"l_kv {self.l_kv} must be 1..{self.layers} (layers) and s_kv {self.s_kv} must be 1 or 2")
        if self.processor not in ("mixed", "direct"):
            raise ValueError(f"processor {self.processor!r} must be 'mixed' or 'direct'")


class ContextProcessor(nn.Module):
    """Behaviours and user attributes to KV sets (V2 2.2); its cost does not depend on the number of layers."""

    def __init__(self, config: V2Config) -> None:
        super().__init__()
        self.config = c = config
        self.features = BehaviourEmbedding(c, Widths.alike(c))
        width = c.d_model if c.processor == "mixed" else c.levels * c.embed
        self.behaviour = nn.Linear(self.features.width, width)
        self.static = dense(self.features.static_width, width)
        self.norm = RMSNorm(width)
        self.mix = SwiGLU(width, width) if c.processor == "mixed" else None
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(
            EncoderBlock(width, c.heads, SwiGLU(width, 2 * width), dropout=c.dropout) for _ in range(c.context_layers)
        )
        self.newest = nn.Linear(width, c.d_model, bias=False) if c.start_from_newest else None
        self.split = nn.Linear(width, c.s_kv * c.l_kv * c.kv_groups * c.d_head, bias=False)
        self.row_norms = nn.ModuleList(RMSNorm(c.d_head) for _ in range(c.s_kv * c.l_kv))

    def forward(self, context: ContextTensors) -> ContextKV:
        """KV of every request; padding is dropped first, so that short histories cost little."""
        packing = Packing.of(context.mask, lead=1)
        request, slot = packing.request, packing.slot
        users = self.static(self.features.static(context))
        x = torch.cat([users, self.behaviour(self.features(context, request, slot))])
        x = x + self.mix(self.norm(x)) if self.mix is not None else self.norm(x)
        place = torch.cat([packing.lead_rows, packing.row])
        x = self._mixed(self.dropout(x), packing, place)
        rows = self.split(x).unflatten(1, (-1, self.config.kv_groups, self.config.d_head)).unbind(1)
        # Normalised while packed and laid out for attention once: every layer and every pass reads them.
        normed = [
            packing.spread(norm(row), place).transpose(1, 2).contiguous()
            for norm, row in zip(self.row_norms, rows, strict=True)
        ]
        age = packing.spread(context.numeric[request, slot, 0])
        stride = self.config.s_kv
        return ContextKV(
            keys=normed[::stride],
            values=normed[stride - 1 :: stride],
            mask=packing.mask,
            bias=packing.bias,
            age=age,
            newest=None if self.newest is None else self.newest(x[_newest(packing, age)]),
        )

    def _mixed(self, x: Tensor, packing: Packing, place: Tensor) -> Tensor:
        """The packed tokens [n, width] after the self-attention blocks."""
        if not len(self.layers):
            return x
        spread = packing.spread(x, place)
        for layer in self.layers:
            spread = layer(spread, packing.bias)
        return spread.flatten(0, 1)[place]


def _newest(packing: Packing, age_BS: Tensor) -> Tensor:
    """long [B], the packed row of each request's newest behaviour, or of its user without any."""
    b, width = packing.mask.shape
    behaviour = packing.mask.clone()
    behaviour[:, 0] = False
    newest = age_BS.masked_fill(~behaviour, torch.inf).argmin(1)
    # The users' rows come first, the behaviours in the order of ``packing.row``.
    place = torch.searchsorted(packing.row, torch.arange(b, device=age_BS.device) * width + newest)
    return torch.where(newest > 0, b + place, torch.arange(b, device=age_BS.device))


class OneRecV2(Generator):
    """The lazy decoder over the context processor; see the module docstring."""

    config: V2Config

    def __init__(self, config: V2Config) -> None:
        super().__init__(
            config, ContextProcessor(config), nn.ModuleList(_block(config, i) for i in range(config.layers))
        )


def _block(config: V2Config, layer: int) -> LazyBlock:
    dense = not config.experts or layer < config.dense_blocks
    ffn = SwiGLU(config.d_model, 4 * config.d_model) if dense else config.mixture()
    return LazyBlock(config.d_model, config.heads, ffn, recency_bias=config.recency_bias, dropout=config.dropout)
