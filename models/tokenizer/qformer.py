"""QFormer: a few learned queries compress an item's modality tokens (V1, arXiv 2506.13695, 2.1.1).

``Q^(i+1) = CrossAttn(Q^(i), M, M); Q^(i+1) = FFN(RMSNorm(Q^(i+1)))``, four queries and four layers, with residuals
around both, as the technical report surely means. The latent queries are what captions are decoded from; their
concatenation, projected to ``dim`` and scaled to unit length, is the vector that contrast trains and K-means
quantises (the paper quantises the concatenation itself, 2048 wide). A learned *null* token is always there, so an item
without any modality has a defined, if uninformative, place.

Shapes: N items, M modality tokens, Q queries, H heads, D head width, d width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.blocks import RMSNorm, SwiGLU

_UNKNOWN = 0.2  # ours: standard deviation of bucket vectors before training

Inputs = Mapping[str, tuple[Tensor, Tensor]]
"""Per modality: features [N, t, width] or buckets [N, t] long, and mask [N, t] bool."""


@dataclass(frozen=True, kw_only=True)
class QFormerShape:
    """Sizes; ``features`` and ``buckets`` give each modality's token width or number of hash buckets."""

    features: Mapping[str, int]
    buckets: Mapping[str, int]
    dim: int
    width: int
    queries: int
    layers: int
    heads: int


class QFormer(nn.Module):
    """Modality tokens to (latent queries [N, Q, d], unit vector [N, dim])."""

    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        names = [*shape.features, *shape.buckets]
        self.features = nn.ModuleDict({name: nn.Linear(size, width) for name, size in shape.features.items()})
        self.buckets = nn.ModuleDict({name: nn.Embedding(size, width) for name, size in shape.buckets.items()})
        for table in self.buckets.values():  # a name that training never met should say little, not shout
            nn.init.normal_(table.get_parameter("weight"), std=_UNKNOWN)
        self.norms = nn.ModuleDict({name: RMSNorm(width) for name in shape.features})
        self.kind = nn.ParameterDict({name: nn.Parameter(0.1 * torch.randn(width)) for name in names})
        self.null = nn.Parameter(0.1 * torch.randn(width))
        self.query = nn.Parameter(torch.randn(shape.queries, width))
        # Modality tokens do not change from layer to layer: one product gives every layer's keys and values.
        self.keys_values = nn.Linear(width, 2 * shape.layers * width, bias=False)
        self.blocks = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.layers))
        self.output_norm = RMSNorm(width)
        self.output = nn.Linear(shape.queries * width, shape.dim)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Latent queries and unit vectors of the items in ``inputs``."""
        tokens, mask = self.tokens(inputs)
        n, m, width = tokens.shape
        layers, heads = self.shape.layers, self.shape.heads
        pairs = self.keys_values(tokens).view(n, m, layers, 2, heads, width // heads).permute(2, 3, 0, 4, 1, 5)
        latent = self.query.expand(n, -1, -1)
        for block, (keys, values) in zip(self.blocks, pairs, strict=True):
            latent = block(latent, keys, values, mask)
        latent = self.output_norm(latent)
        return latent, F.normalize(self.output(latent.flatten(1)).float(), dim=-1)

    def tokens(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """All modality tokens [N, M, d] with the null token last, and their mask [N, M]."""
        parts, masks = [], []
        for name in (*self.shape.features, *self.shape.buckets):
            values, mask = inputs[name]
            dense = name in self.features
            raw = self.norms[name](self.features[name](values)) if dense else self.buckets[name](values)
            parts.append(raw + self.kind[name])
            masks.append(mask)
        n = len(masks[0])
        parts.append(self.null.expand(n, 1, -1))
        masks.append(torch.ones(n, 1, dtype=torch.bool, device=self.null.device))
        return torch.cat(parts, 1), torch.cat(masks, 1)


class Block(nn.Module):
    """One layer: cross-attention of the queries to the modality tokens, then SwiGLU; pre-RMSNorm, residuals."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)
        self.ask = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.ffn = SwiGLU(width, 2 * width)

    def forward(self, latent_NQd: Tensor, keys_NHMD: Tensor, values_NHMD: Tensor, mask_NM: Tensor) -> Tensor:
        """New queries [N, Q, d]."""
        n, q, width = latent_NQd.shape
        asked = self.ask(self.attention_norm(latent_NQd)).view(n, q, self.heads, -1).transpose(1, 2)
        scores = (asked @ keys_NHMD.transpose(-1, -2)).float() * (width // self.heads) ** -0.5
        weights = scores.masked_fill(~mask_NM[:, None, None], -torch.inf).softmax(-1).to(values_NHMD.dtype)
        mixed = (weights @ values_NHMD).transpose(1, 2).reshape(n, q, width)
        latent = latent_NQd + self.mix(mixed)
        return latent + self.ffn(self.ffn_norm(latent))
