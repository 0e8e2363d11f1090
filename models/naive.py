"""The naive decoder-only baseline of OneRec-V2's comparison tables (arXiv 2508.20900, Tables 1 and 2).

Context tokens and target tokens go through one causal decoder of usual blocks. The context's keys and values of every
layer are computed once per request (``encode``) and shared by its targets: better than packing a user's whole history
with each target, and still all layers work on every context token, which the lazy decoder avoids.

The context is ordered lifelong, positive, short, so that the newest stand next to the target; times come with the
fields, so there are no positions. Left out: rotary positions, loss on context tokens (it would leak: V2 2.1).

Shapes: B requests, S context tokens, d model width.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models.behaviours import BehaviourEmbedding, Packing, Widths, dense, require_positive
from models.generator import ContextKV, Generator, GeneratorConfig
from models.nn.blocks import CausalBlock, SwiGLU
from models.nn.context_attention import JointAttention
from models.pathways import NOW, ContextTensors


@dataclass(frozen=True, kw_only=True)
class NaiveConfig(GeneratorConfig):
    """Sizes of the decoder-only baseline."""

    layers: int = 3
    ffn: int = 0
    """Inner width of the FFN; 0 = four times ``d_model``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "layers")
        if self.ffn < 0:
            raise ValueError(f"ffn is {self.ffn}; it must be at least 0 (0 = four times d_model)")


class CausalContext(nn.Module):
    """Runs the context through the decoder's own blocks and keeps every layer's keys and values."""

    def __init__(self, config: NaiveConfig, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.features = BehaviourEmbedding(config, Widths.alike(config))
        self.behaviour = nn.Linear(self.features.width, config.d_model)
        self.static = dense(self.features.static_width, config.d_model)
        self._blocks = [blocks]  # in a list: they are registered once, as the decoder's

    def forward(self, context: ContextTensors) -> ContextKV:
        """KV of every layer; packed behaviours stand first, so that causality alone hides the padding after them."""
        order = context.kind.sort(descending=True, stable=True).indices
        packing = Packing.of(context.mask[:, order], lead=1)
        request, slot = packing.request, order[packing.slot]
        x = torch.cat(
            [self.static(self.features.static(context)), self.behaviour(self.features(context, request, slot))]
        )
        x = packing.spread(x, torch.cat([packing.lead_rows, packing.row]))
        pairs = []
        for block in self._blocks[0]:
            assert isinstance(block, CausalBlock)
            x, pair = block.encode(x, packing.mask)
            pairs.append(pair)
        keys, values = zip(*pairs, strict=True)
        age = packing.spread(context.numeric[request, slot, 0])
        return ContextKV(keys=list(keys), values=list(values), mask=packing.mask, bias=packing.bias, age=age)


class NaiveDecoder(Generator):
    """One causal decoder for context and targets; see the module docstring."""

    config: NaiveConfig

    def __init__(self, config: NaiveConfig) -> None:
        c = config
        blocks = nn.ModuleList(
            CausalBlock(
                c.d_model,
                JointAttention(c.d_model, c.heads, c.kv_groups, recency_bias=c.recency_bias, now=NOW),
                c.mixture() if c.experts else SwiGLU(c.d_model, c.ffn or 4 * c.d_model),
                dropout=c.dropout,
            )
            for _ in range(c.layers)
        )
        super().__init__(config, CausalContext(config, blocks), blocks)
