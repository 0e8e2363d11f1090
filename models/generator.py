"""What all models share: a decoder of semantic IDs over the keys and values of an encoded context.

Every architecture differs in how the context becomes keys and values (``encode``, once per request) and in its block;
the rest is here: teacher forcing, decoding step by step, heads per level (OneRec-V2, arXiv 2508.20900, 2.3: the
decoder reads ``[BOS, s1, s2]``, position-specific RMSNorm and Linear out). All targets or beams of a request are
queries against its one KV, and BOS, which does not depend on the target, is computed once per request.

Left out: generation itself (``models.decoding``).

Shapes: B requests, T targets or beams of a request, P new tokens, S context tokens, L levels, C codes, G KV groups,
D head width, d model width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.behaviours import BehaviourEmbedding, ContextConfig, require_positive
from models.nn.attention import Cache
from models.nn.blocks import RMSNorm
from models.nn.moe import MoE
from models.nn.precision import exact
from models.pathways import ContextTensors


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(ContextConfig):
    """Sizes that every architecture has; ``experts`` 0 is a dense model."""

    d_model: int = 128
    heads: int = 4
    kv_groups: int = 2
    dropout: float = 0.0
    recency_bias: bool = True
    """A learned slope per head on the age of a behaviour (ours, models.nn.attention); False is as published."""
    head: Literal["linear", "tied"] = "linear"
    """``linear`` is the papers'; ``tied`` scores against the context's code embeddings (ours)."""
    experts: int = 0
    active_experts: int = 2
    shared_experts: int = 0
    expert_width: int = 0
    """Inner width of one expert; 0 = ``d_model``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "d_model", "heads", "kv_groups")
        if self.d_model % self.heads or self.heads % self.kv_groups:
            raise ValueError(
                f"d_model {self.d_model}, heads {self.heads}, kv_groups {self.kv_groups}: "
                "each must be divisible by the next"
            )
        if self.head not in ("linear", "tied") or not 0 <= self.dropout < 1:
            raise ValueError(f"head {self.head!r} must be 'linear' or 'tied' and dropout {self.dropout} in [0, 1)")
        if self.experts < 0 or self.shared_experts < 0 or (self.experts and not 0 < self.active_experts < self.experts):
            raise ValueError(
                f"experts {self.experts}, active {self.active_experts}, shared {self.shared_experts}: "
                "active_experts must be in 1 .. experts - 1"
            )

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads

    def mixture(self) -> MoE:
        """One mixture-of-experts layer of these sizes."""
        return MoE(
            self.d_model,
            self.expert_width or self.d_model,
            experts=self.experts,
            active=self.active_experts,
            shared=self.shared_experts,
        )


@dataclass(frozen=True)
class ContextKV:
    """Keys and values of B requests: tensors [B, G, S, D], one for each layer or shared by several of them."""

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    """[B, S] bool."""
    bias: Tensor
    """[B, S] fp32: 0 where ``mask``, -inf elsewhere."""
    age: Tensor
    """[B, S] fp32: normalised log age, 0 for tokens that are no behaviour and for padding."""

    def __len__(self) -> int:
        return len(self.mask)


@dataclass(frozen=True)
class DecoderState:
    """Self-attention caches of the tokens decoded so far, one per layer."""

    caches: list[Cache]

    def __len__(self) -> int:
        """Tokens decoded so far, BOS included."""
        return self.caches[0][0].shape[2]

    def select(self, beam_BT: Tensor) -> "DecoderState":
        """The state whose target t continues target ``beam_BT[b, t]`` of this one."""
        b, t = self.caches[0][0].shape[:2]
        if t == 1:  # everybody continues the same one
            return self
        rows = (beam_BT + torch.arange(b, device=beam_BT.device)[:, None] * t).flatten()

        def chosen(cache: Tensor) -> Tensor:
            return cache.flatten(0, 1).index_select(0, rows).unflatten(0, (b, -1))  # copies whole rows; gather does not

        return DecoderState([(chosen(key), chosen(value)) for key, value in self.caches])


class Generator(nn.Module):
    """Scores the next semantic ID given a request's context.

    ``context`` maps ContextTensors to ContextKV and owns the behaviours' embedding as ``context.features``. A block
    maps (h [B, T, P, d], (keys, values, bias, age), past, real) to (h, cache).
    """

    level_loss: ClassVar[Literal["mean", "sum"]] = "mean"
    """How the paper's loss adds up the SID levels."""

    def __init__(self, config: GeneratorConfig, context: nn.Module, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.config = c = config
        self.context = context
        self.bos = nn.Parameter(torch.empty(c.d_model))
        self.token = nn.ModuleList(nn.Embedding(c.codes, c.d_model) for _ in range(self._token_tables()))
        self.blocks = blocks
        self.head_norms = nn.ModuleList(RMSNorm(c.d_model) for _ in range(c.levels))
        out = c.codes if c.head == "linear" else c.embed
        self.heads = nn.ModuleList(nn.Linear(c.d_model, out, bias=False) for _ in range(c.levels))
        self._initialise()

    def _token_tables(self) -> int:
        """The last code of the only item is never an input."""
        return self.config.levels - 1

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
        nn.init.normal_(self.bos, std=0.1)
        # As large as what the first cross-attention adds to them: smaller ones drown in it, and the later codes are
        # learned far more slowly, whatever the architecture (docs/log.md). BOS says nothing and may drown.
        for token in self.token.parameters():
            nn.init.normal_(token, std=1.0)
        for weight in self.heads.parameters():
            nn.init.normal_(weight, std=0.02)  # the first loss is ln(codes)

    @property
    def items(self) -> int:
        """Items generated by one run of the decoder; more than one is a session."""
        return 1

    @property
    def features(self) -> BehaviourEmbedding:
        """The behaviours' embedding, whose code tables may score the output too."""
        features = self.context.features
        assert isinstance(features, BehaviourEmbedding)
        return features

    def start_from_codebooks(self, codebooks_LCE: Tensor) -> None:
        """See ``BehaviourEmbedding.start_from_codebooks``."""
        self.features.start_from_codebooks(codebooks_LCE)

    def encode(self, context: ContextTensors) -> ContextKV:
        """The context's KV, once per request."""
        kv: ContextKV = self.context(context)
        return kv

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
            h, _ = self._advance(kv, h, state, targets_BTL[..., :-1] >= 0)
            logits += [self._logits(h[:, :, p], p + 1) for p in range(h.shape[2])]
        return torch.stack(logits, 2)

    def decode(self, kv: ContextKV, prefix_BTp: Tensor) -> Tensor:
        """fp32 logits [B, T, C] of the code after ``prefix_BTp`` (p = 0 .. items * levels - 1 codes)."""
        logits, state = self.step(kv, None, None)
        for code in prefix_BTp.unbind(-1):
            logits, state = self.step(kv, code, state)
        return logits.expand(-1, prefix_BTp.shape[1], -1)

    def step(self, kv: ContextKV, code_BT: Tensor | None, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """One code further: fp32 logits [B, T, C] of the next level, and the state to continue from.

        ``code_BT`` None starts with BOS (T = 1). A state of T = 1 may be continued by any T.
        """
        if code_BT is None or state is None:
            level, h = 0, self.bos.expand(len(kv), 1, 1, -1)
        else:
            level = len(state)
            h = self.token[level - 1](code_BT).unsqueeze(2)
        h, state = self._advance(kv, h, state)
        return self._logits(h[:, :, 0], level), state

    def _advance(
        self, kv: ContextKV, h: Tensor, state: DecoderState | None, real: Tensor | None = None
    ) -> tuple[Tensor, DecoderState]:
        """[B, T, P, d] through all blocks; ``real`` bool [B, T, P] is False on padding."""
        caches = []
        past: Iterator[Cache | None] = iter(state.caches if state else [None] * len(self.blocks))
        for layer, block in enumerate(self.blocks):
            row = layer * len(kv.keys) // len(self.blocks)  # V2: l_kv = floor(l L_kv / N); else one each
            h, cache = block(h, (kv.keys[row], kv.values[row], kv.bias, kv.age), next(past), real)
            caches.append(cache)
        return h, DecoderState(caches)

    def _logits(self, h_BTd: Tensor, level: int) -> Tensor:
        """fp32 whatever autocast says: logged log-probabilities and the trainer's must agree (GBPO's ratio)."""
        with exact(h_BTd.device):
            out: Tensor = self.heads[level](self.head_norms[level](h_BTd.float()))
            if self.config.head == "tied":
                out = F.linear(out, self.features.code[level].get_parameter("weight")[1:])
            return out
