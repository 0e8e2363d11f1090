"""OneRec-V2: the lazy decoder-only recommender (arXiv 2508.20900, 2.1-2.3).

A context processor turns the behaviours and the user-static token into ``l_kv`` sets of keys and values once per
request; N decoder layers read them by cross-attention without K/V projections, layer ``l`` reading set
``floor(l * l_kv / N)``. The decoder sees only ``[BOS, s1, s2]``; all targets (or beams) of a request share its KV, and,
as BOS does not depend on the target, its hidden state too.

Departures, ours: the recency bias (models.nn.attention), the layers before the KV split (unpublished: Linear, SwiGLU
residual, Linear), ``head="tied"``. Left out: MoE FFN, the QFormer of V1's lifelong pathway, request-time features.

Shapes: B requests, T targets or beams of a request, P new tokens, S context tokens (static token included), L levels,
C codes, G KV groups, D head width, d model width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from features.schema import FLAGS
from models.nn.attention import Cache
from models.nn.blocks import LazyBlock, RMSNorm, SwiGLU
from models.pathways import NUMERIC, PATHWAYS, ContextTensors


@dataclass(frozen=True, kw_only=True)
class V2Config:
    """Sizes of the model; ``embed`` is the width of each SID code's context embedding."""

    levels: int = 3
    codes: int = 64
    d_model: int = 128
    layers: int = 3
    heads: int = 4
    kv_groups: int = 2
    l_kv: int = 1
    s_kv: int = 1
    embed: int = 32
    static_fields: int = 8
    static_buckets: int = 1024
    author_buckets: int = 2048
    tag_buckets: int = 256
    dropout: float = 0.0
    recency_bias: bool = True
    """A learned slope per head on the age of a behaviour; False is pure V2."""
    head: Literal["linear", "tied"] = "linear"
    """``linear`` is V2's; ``tied`` scores against the context's code embeddings."""

    def __post_init__(self) -> None:
        for name in ("levels", "codes", "d_model", "layers", "heads", "kv_groups", "l_kv", "embed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_model % self.heads or self.heads % self.kv_groups:
            raise ValueError(
                f"d_model {self.d_model}, heads {self.heads}, kv_groups {self.kv_groups}: "
                "each must be divisible by the next"
            )
        if self.l_kv > self.layers or self.s_kv not in (1, 2):
            raise ValueError(f"l_kv {self.l_kv} must be 1..{self.layers} (layers) and s_kv {self.s_kv} must be 1 or 2")
        if self.head not in ("linear", "tied") or not 0 <= self.dropout < 1:
            raise ValueError(f"head {self.head!r} must be 'linear' or 'tied' and dropout {self.dropout} in [0, 1)")

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads


CODE_NORM = 8**0.5
"""Mean norm of code embeddings that start from codebooks."""


@dataclass(frozen=True)
class ContextKV:
    """Keys and values of B requests: ``l_kv`` tensors [B, G, S, D] each (values are the keys when s_kv = 1)."""

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    """[B, S] bool."""
    bias: Tensor
    """[B, S] fp32: 0 where ``mask``, -inf elsewhere."""
    age: Tensor
    """[B, S] fp32: normalised log age, 0 for the static token and padding."""

    def __len__(self) -> int:
        return len(self.mask)


class ContextProcessor(nn.Module):
    """Behaviours and user attributes to KV sets (V2 2.2); its cost does not depend on the number of layers."""

    def __init__(self, config: V2Config) -> None:
        super().__init__()
        self.config = c = config
        side = max(c.embed // 2, 8)
        self.code = nn.ModuleList(nn.Embedding(c.codes + 1, c.embed, padding_idx=0) for _ in range(c.levels))
        self.author = nn.Embedding(c.author_buckets, side)
        self.tag = nn.Embedding(c.tag_buckets, side)
        self.kind = nn.Embedding(len(PATHWAYS), side)
        self.number = nn.Linear(len(NUMERIC), side)
        self.behaviour = nn.Linear(c.levels * c.embed + 4 * side + len(FLAGS), c.d_model)
        self.attribute = nn.Embedding(c.static_buckets, side)
        # V1 2.2.1: the static token is Dense(LeakyReLU(Dense(f))).
        self.static = nn.Sequential(
            nn.Linear(c.static_fields * side, c.d_model), nn.LeakyReLU(), nn.Linear(c.d_model, c.d_model)
        )
        self.norm = RMSNorm(c.d_model)
        self.mix = SwiGLU(c.d_model, c.d_model)
        self.split = nn.Linear(c.d_model, c.s_kv * c.l_kv * c.kv_groups * c.d_head, bias=False)
        self.row_norms = nn.ModuleList(RMSNorm(c.d_head) for _ in range(c.s_kv * c.l_kv))

    def forward(self, context: ContextTensors) -> ContextKV:
        """KV of every request; padding is dropped first, so that short histories cost little."""
        b = len(context)
        request, slot = context.mask.nonzero(as_tuple=True)
        position = context.mask.cumsum(1)[request, slot]  # 1-based: row 0 is the static token
        counts = context.mask.sum(1)
        s = 1 + (int(counts.max()) if b else 0)
        rows = torch.cat([torch.arange(b, device=counts.device) * s, request * s + position])
        x = torch.cat([self._static(context), self._behaviours(context, request, slot)])
        x = x + self.mix(self.norm(x))
        packed = self.split(x)
        full = packed.new_zeros(b * s, packed.shape[1]).index_copy(0, rows, packed)
        parts = full.view(b, s, -1, self.config.kv_groups, self.config.d_head).transpose(1, 3).unbind(2)
        normed = [norm(part) for norm, part in zip(self.row_norms, parts, strict=True)]
        mask = torch.arange(s, device=counts.device) <= counts[:, None]
        age = full.new_zeros(b * s, dtype=torch.float32)
        age = age.index_copy(0, rows[b:], context.numeric[request, slot, 0]).view(b, s)
        stride = self.config.s_kv
        bias = torch.zeros_like(age).masked_fill(~mask, -torch.inf)
        return ContextKV(keys=normed[::stride], values=normed[stride - 1 :: stride], mask=mask, bias=bias, age=age)

    def _behaviours(self, context: ContextTensors, request: Tensor, slot: Tensor) -> Tensor:
        """[n, d] for the n real behaviours."""
        sids = context.sids[request, slot]
        pieces = [table(sids[:, level]) for level, table in enumerate(self.code)]
        pieces += [self.author(context.author[request, slot]), self.tag(context.tag[request, slot])]
        number = self.number(context.numeric[request, slot])
        pieces += [self.kind(context.kind[slot]), number, context.labels[request, slot]]
        return self.behaviour(torch.cat(pieces, -1))

    def _static(self, context: ContextTensors) -> Tensor:
        """[B, d]."""
        return self.static(self.attribute(context.static).flatten(1))


@dataclass(frozen=True)
class DecoderState:
    """Self-attention caches of the tokens decoded so far, one per layer."""

    caches: list[Cache]

    def select(self, beam_BT: Tensor) -> "DecoderState":
        """The state whose target t continues target ``beam_BT[b, t]`` of this one."""
        keys = self.caches[0][0]
        index = beam_BT[:, :, None, None, None].expand(-1, -1, *keys.shape[2:])
        return DecoderState([(key.gather(1, index), value.gather(1, index)) for key, value in self.caches])


class OneRecV2(nn.Module):
    """Scores the next semantic ID given a request's context; see the module docstring."""

    def __init__(self, config: V2Config) -> None:
        super().__init__()
        self.config = c = config
        self.context = ContextProcessor(c)
        self.bos = nn.Parameter(torch.empty(c.d_model))
        self.token = nn.ModuleList(nn.Embedding(c.codes, c.d_model) for _ in range(c.levels - 1))
        self.blocks = nn.ModuleList(
            LazyBlock(c.d_model, c.heads, recency_bias=c.recency_bias, dropout=c.dropout) for _ in range(c.layers)
        )
        self.head_norms = nn.ModuleList(RMSNorm(c.d_model) for _ in range(c.levels))
        out = c.codes if c.head == "linear" else c.embed
        self.heads = nn.ModuleList(nn.Linear(c.d_model, out, bias=False) for _ in range(c.levels))
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.bos, std=0.1)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
        for weight in self.heads.parameters():
            nn.init.normal_(weight, std=0.02)  # the first loss is ln(codes)

    @torch.no_grad()
    def start_from_codebooks(self, codebooks_LCE: Tensor) -> None:
        """Code embeddings begin at the tokenizer's centroids, scaled to this model's initial norm.

        Ours (unpublished): similar codes begin alike, so what is learned of one item carries over to its like from
        the first step; with little data the context is hardly used otherwise (docs/log.md). Raises ValueError for
        other shapes than [levels, codes, embed].
        """
        c = self.config
        if tuple(codebooks_LCE.shape) != (c.levels, c.codes, c.embed):
            raise ValueError(
                f"the codebooks have shape {tuple(codebooks_LCE.shape)}; this model starts from "
                f"({c.levels}, {c.codes}, {c.embed}): levels, codes, embed"
            )
        for table, centroids in zip(self.context.code, codebooks_LCE, strict=True):
            scale = CODE_NORM / centroids.norm(dim=1).mean().clamp(min=1e-9)
            table.get_parameter("weight")[1:] = centroids * scale

    def encode(self, context: ContextTensors) -> ContextKV:
        """The context's KV, once per request."""
        return self.context(context)

    def forward(self, context: ContextTensors, targets_BTL: Tensor) -> Tensor:
        """Teacher-forced fp32 logits [B, T, L, C]; negative codes of ``targets_BTL`` mark padding and score garbage."""
        return self.score(self.encode(context), targets_BTL)

    def score(self, kv: ContextKV, targets_BTL: Tensor) -> Tensor:
        """Teacher-forced fp32 logits [B, T, L, C] against an encoded context."""
        first, state = self.step(kv, None, None)
        t = targets_BTL.shape[1]
        logits = [first.expand(-1, t, -1)]
        if self.config.levels > 1:
            tokens = targets_BTL[..., :-1].clamp(min=0).unbind(-1)
            h = torch.stack([table(code) for table, code in zip(self.token, tokens, strict=True)], 2)
            h, _ = self._advance(kv, h, state)
            logits += [self._logits(h[:, :, p], p + 1) for p in range(h.shape[2])]
        return torch.stack(logits, 2)

    def decode(self, kv: ContextKV, prefix_BTp: Tensor) -> Tensor:
        """fp32 logits [B, T, C] of the level after ``prefix_BTp`` (p = 0 .. levels - 1 codes)."""
        logits, state = self.step(kv, None, None)
        for code in prefix_BTp.unbind(-1):
            logits, state = self.step(kv, code, state)
        return logits.expand(-1, prefix_BTp.shape[1], -1)

    def step(self, kv: ContextKV, code_BT: Tensor | None, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """One token further: fp32 logits [B, T, C] of the next level, and the state to continue from.

        ``code_BT`` None starts with BOS (T = 1). A state of T = 1 may be continued by any T.
        """
        if code_BT is None or state is None:
            level, h = 0, self.bos.expand(len(kv), 1, 1, -1)
        else:
            level = state.caches[0][0].shape[2]
            h = self.token[level - 1](code_BT).unsqueeze(2)
        h, state = self._advance(kv, h, state)
        return self._logits(h[:, :, 0], level), state

    def _advance(self, kv: ContextKV, h: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """[B, T, P, d] through all blocks."""
        caches = []
        past: Iterator[Cache | None] = iter(state.caches if state else [None] * len(self.blocks))
        for layer, block in enumerate(self.blocks):
            row = layer * self.config.l_kv // self.config.layers  # l_kv = floor(l L_kv / N)
            h, cache = block(h, (kv.keys[row], kv.values[row], kv.bias, kv.age), next(past))
            caches.append(cache)
        return h, DecoderState(caches)

    def _logits(self, h_BTd: Tensor, level: int) -> Tensor:
        """fp32 whatever autocast says: logged log-probabilities and the trainer's must agree (spec of GBPO's ratio)."""
        with torch.autocast(h_BTd.device.type, enabled=False):
            out = self.heads[level](self.head_norms[level](h_BTd.float()))
            if self.config.head == "tied":
                out = F.linear(out, self.context.code[level].get_parameter("weight")[1:])
            return out
