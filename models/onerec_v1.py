"""OneRec-V1: four pathways, an encoder over them and a decoder of semantic IDs (arXiv 2506.13695, 2.2-2.3).

User-static (1 token), short-term (20), positive feedback (256) and lifelong (2000, compressed to 128 by a QFormer of
2 blocks) make 405 tokens, read by a full self-attention encoder. The decoder reads ``[BOS, s1, s2]``: causal
self-attention, cross-attention, FFN or mixture of experts. Every decoder layer projects its own keys and values from
the encoder's output, once per request. The loss is the *sum* over the SID levels.

Departures, ours: semantic IDs in place of video ids (the paper's own variant, as good at 2.6 B), SwiGLU FFNs, a null
token that the QFormer reads when there is no lifelong history, ``queries=0`` (lifelong uncompressed, for comparisons).
Not published and derived from the model sizes: the experts' width, and experts in every other layer of the largest.

Shapes: B requests, S context tokens, G KV groups, D head width, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.behaviours import CODE_NORM, BehaviourEmbedding, Packing, Widths, dense, require_positive
from models.generator import ContextKV, Generator, GeneratorConfig
from models.nn.blocks import DecoderBlock, EncoderBlock, RMSNorm, SwiGLU
from models.nn.qformer import QFormer
from models.pathways import PATHWAYS, ContextTensors


@dataclass(frozen=True, kw_only=True)
class V1Config(GeneratorConfig):
    """Sizes of the encoder-decoder; the widths and lengths are those of V1's table of pathways."""

    encoder_layers: int = 2
    decoder_layers: int = 2
    ffn: int = 256
    recency_bias: bool = False
    short: int = 20
    positive: int = 256
    lifelong: int = 2000
    queries: int = 128
    """Tokens the lifelong pathway is compressed to; 0 lets it enter as it is."""
    query_blocks: int = 2
    static_width: int = 64
    author_width: int = 512
    field_width: int = 128
    """Of tag, timestamp, play time, duration and labels each."""
    experts_in: Literal["decoder", "both"] = "decoder"
    expert_stride: int = 1
    """Every how many layers one has experts, when there are any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "encoder_layers", "decoder_layers", "ffn", "short", "positive", "lifelong")
        require_positive(self, "query_blocks", "static_width", "author_width", "field_width", "expert_stride")
        if self.experts_in not in ("decoder", "both") or self.queries < 0:
            raise ValueError(f"experts_in {self.experts_in!r} must be 'decoder' or 'both', queries {self.queries} >= 0")

    @property
    def tokens(self) -> int:
        """Length of the encoder's input: 405 as published."""
        return 1 + self.short + self.positive + (self.queries or self.lifelong)


class Encoder(nn.Module):
    """Pathways to tokens, tokens through the encoder, its output to every decoder layer's keys and values."""

    def __init__(self, config: V1Config) -> None:
        super().__init__()
        self.config = c = config
        w = c.field_width
        widths = Widths(static=c.static_width, author=c.author_width, tag=w, kind=0, numbers=3 * w, labels=w)
        self.features = BehaviourEmbedding(c, widths)
        self.static = dense(self.features.static_width, c.d_model)
        self.pathways = nn.ModuleList(dense(self.features.width, c.d_model) for _ in PATHWAYS)
        self.compress = (
            QFormer(c.d_model, c.heads, queries=c.queries, blocks=c.query_blocks, hidden=c.ffn) if c.queries else None
        )
        self.position = nn.Embedding(c.tokens, c.d_model)
        mixed = c.experts > 0 and c.experts_in == "both"
        self.blocks = nn.ModuleList(
            EncoderBlock(c.d_model, c.heads, _ffn(c, layer, mixed), dropout=c.dropout)
            for layer in range(c.encoder_layers)
        )
        self.norm = RMSNorm(c.d_model)
        width = 2 * c.kv_groups * c.d_head
        self.project = nn.ModuleList(nn.Linear(c.d_model, width, bias=False) for _ in range(c.decoder_layers))

    def forward(self, context: ContextTensors) -> ContextKV:
        """KV of every decoder layer; raises ValueError for a pathway longer than the configuration's."""
        place = self._places(context)
        x, bias, age = self._tokens(context, place)
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        pairs = [
            layer(x).unflatten(2, (2, self.config.kv_groups, -1)).transpose(1, 3).unbind(2) for layer in self.project
        ]
        keys, values = zip(*pairs, strict=True)
        return ContextKV(keys=list(keys), values=list(values), mask=bias == 0, bias=bias, age=age)

    def _places(self, context: ContextTensors) -> Tensor:
        """[S] position of every slot in ``[static; short; positive; lifelong]``: the newest of a pathway is last."""
        lengths = {"short": self.config.short, "positive": self.config.positive, "lifelong": self.config.lifelong}
        place, start = torch.zeros_like(context.kind), 1
        for kind, (name, limit) in enumerate(lengths.items()):
            of_kind = context.kind == kind
            found = 0 if of_kind.is_meta else int(of_kind.sum())
            if found > limit:
                raise ValueError(
                    f"the context has {found} {name} behaviours and the model positions for {limit}; "
                    "build the context with limits no longer than the model's"
                )
            older = of_kind.flip(0).cumsum(0).flip(0)  # 1 for the newest
            place = torch.where(of_kind, start + limit - older, place)
            start += limit
        return place

    def _tokens(self, context: ContextTensors, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder input [B, S, d], padding bias [B, S] and ages [B, S]."""
        recent = context.kind != PATHWAYS.index("lifelong")
        direct = context.mask if self.compress is None else context.mask & recent
        packing = Packing.of(direct, lead=1)
        request, slot = packing.request, packing.slot
        users = self.static(self.features.static(context)) + self.position.weight[0]
        rows = self._embed(context, request, slot) + self.position(place[slot])
        x = packing.spread(torch.cat([users, rows]), torch.cat([packing.lead_rows, packing.row]))
        age = packing.spread(context.numeric[request, slot, 0])
        if self.compress is None:
            return x, packing.bias, age
        packed = Packing.of(context.mask & ~recent, lead=0)
        memory = packed.spread(self._embed(context, packed.request, packed.slot))
        summary = self.compress(memory, packed.bias) + self.position.weight[-self.config.queries :]
        known = torch.where(packed.mask.any(1), 0.0, -torch.inf)[:, None].expand(-1, self.config.queries)
        pad = age.new_zeros(known.shape)
        return torch.cat([x, summary], 1), torch.cat([packing.bias, known], 1), torch.cat([age, pad], 1)

    def _embed(self, context: ContextTensors, request: Tensor, slot: Tensor) -> Tensor:
        """[n, d], each behaviour through its own pathway's layers."""
        fields = self.features(context, request, slot)
        if fields.is_meta:  # no kinds to look at, and all pathways cost alike
            return self.pathways[0](fields)
        kind = context.kind[slot]
        out = fields.new_zeros(len(fields), self.config.d_model)
        for index, pathway in enumerate(self.pathways):
            rows = (kind == index).nonzero().squeeze(1)
            out = out.index_copy(0, rows, pathway(fields[rows]).to(out.dtype))
        return out


def _ffn(config: V1Config, layer: int, mixed: bool) -> nn.Module:
    last = layer % config.expert_stride == config.expert_stride - 1
    return config.mixture() if mixed and last else SwiGLU(config.d_model, config.ffn)


class OneRecV1(Generator):
    """The decoder over the four pathways; see the module docstring."""

    level_loss: ClassVar[Literal["mean", "sum"]] = "sum"
    config: V1Config

    def __init__(self, config: V1Config) -> None:
        c = config
        blocks = (
            DecoderBlock(
                c.d_model, c.heads, _ffn(c, layer, c.experts > 0), recency_bias=c.recency_bias, dropout=c.dropout
            )
            for layer in range(c.decoder_layers)
        )
        super().__init__(config, Encoder(config), nn.ModuleList(blocks))

    def _initialise(self) -> None:
        """So that what a behaviour is outweighs where it stands: else the model hardly learns to tell items apart."""
        super()._initialise()
        encoder, c = self.context, self.config
        assert isinstance(encoder, Encoder)
        nn.init.normal_(encoder.position.weight, std=0.02)
        for table in encoder.features.code:
            nn.init.normal_(table.get_parameter("weight"), std=CODE_NORM * c.embed**-0.5)
        for pathway in (encoder.static, *encoder.pathways):
            assert isinstance(pathway, nn.Sequential)
            for layer, gain in ((pathway[0], 2.0), (pathway[2], 1.0)):
                assert isinstance(layer, nn.Linear)
                nn.init.normal_(layer.weight, std=(gain / layer.in_features) ** 0.5)
                nn.init.zeros_(layer.bias)
