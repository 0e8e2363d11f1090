"""What all models share: a decoder of semantic IDs over the keys and values of an encoded context.

Every architecture differs in how the context becomes keys and values (``encode``, once per request) and in its block;
the rest is here: teacher forcing, decoding step by step, heads per level (OneRec-V2, arXiv 2508.20900, 2.3: the
decoder reads ``[BOS, s1, s2]``, position-specific RMSNorm and Linear out). All targets or beams of a request are
queries against its one KV, and BOS, which does not depend on the target, is computed once per request.

Left out: generation itself (``models.decoding``).

Shapes: B requests, T targets or beams of a request, P new tokens, S context tokens, L levels, C codes, G KV groups,
D head width, d model width.
"""

import copy
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
    """``linear`` is the papers'; ``tied`` scores against the context's code embeddings, and with ``memory`` against
    those of the prefixes that exist (ours)."""
    item_head: bool = False
    """A softmax over all known items beside the decoder, from BOS alone, to select among what was generated (ours;
    needs ``memory``)."""
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
        if (self.memory and self.head != "tied") or (self.item_head and not self.memory):
            raise ValueError(
                f"memory {self.memory}, head {self.head!r}, item_head {self.item_head}: memory needs the tied head and "
                "an item head needs memory"
            )
        if self.memory and self.levels < 2:
            raise ValueError(f"memory is of prefixes below the first level; levels is {self.levels}")
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
    newest: Tensor | None = None
    """[B, d] of the newest behaviour, for models whose BOS starts from it."""

    def __len__(self) -> int:
        return len(self.mask)


@dataclass(frozen=True)
class DecoderState:
    """Self-attention caches of the tokens decoded so far, one per layer."""

    caches: list[Cache]
    row: Tensor | None = None
    """long [B, T]: the memory's row of the prefix decoded so far, for models with memory."""

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

        row = None if self.row is None else self.row.gather(1, beam_BT)
        return DecoderState([(chosen(key), chosen(value)) for key, value in self.caches], row)


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
        self.prefix = nn.Linear(c.embed, c.d_model, bias=False) if c.memory else None
        self.blocks = blocks
        self.head_norms = nn.ModuleList(RMSNorm(c.d_model) for _ in range(c.levels))
        out = c.codes if c.head == "linear" else c.embed
        self.heads = nn.ModuleList(nn.Linear(c.d_model, out, bias=False) for _ in range(c.levels))
        self.item_norm = RMSNorm(c.d_model) if c.item_head else None
        self.item_head = nn.Linear(c.d_model, c.embed, bias=False) if c.item_head else None
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

    def remember(self, sids: Tensor) -> None:
        """Gives every prefix of ``sids`` (long [items, L]) a place in the memory, if this model has one."""
        if self.features.memory is not None:
            self.features.memory.remember(sids)

    def start_from_codebooks(self, codebooks_LCE: Tensor) -> None:
        """See ``BehaviourEmbedding.start_from_codebooks``."""
        self.features.start_from_codebooks(codebooks_LCE)

    def encode(self, context: ContextTensors) -> ContextKV:
        """The context's KV, once per request."""
        kv: ContextKV = self.context(context)
        return kv

    def forward(
        self, context: ContextTensors, targets_BTL: Tensor, *, items: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced fp32 logits [B, T, L, C]; negative codes of ``targets_BTL`` mark padding and score garbage.

        With ``items`` those of ``item_logits`` too: distributed training sees only what passes through here.
        """
        kv = self.encode(context)
        scored = self.score(kv, targets_BTL)
        return (scored, self.item_logits(kv)) if items else scored

    def remembering(self, sids: Tensor) -> "Generator":
        """This model, or with a memory a copy of it that knows ``sids`` too: requests under way keep theirs."""
        if self.features.memory is None:
            return self
        made = copy.deepcopy(self)
        made.remember(sids)
        return made

    def score(self, kv: ContextKV, targets_BTL: Tensor) -> Tensor:
        """Teacher-forced fp32 logits [B, T, L, C] against an encoded context."""
        first, state = self.step(kv, None, None)
        t = targets_BTL.shape[1]
        logits = [first.expand(-1, t, -1)]
        if self.config.levels > 1:
            codes = targets_BTL[..., :-1].clamp(min=0)
            rows = self._rows(codes)
            tokens = zip(codes.unbind(-1), rows, strict=True)
            h = torch.stack([self._token(level, code, row) for level, (code, row) in enumerate(tokens)], 2)
            h, _ = self._advance(kv, h, state, targets_BTL[..., :-1] >= 0)
            logits += [self._logits(h[:, :, p], p + 1, row) for p, row in enumerate(rows)]
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
            level, row, h = 0, None, self._start(kv)
        else:
            level = len(state)
            row = self._row(level - 1, code_BT, state.row)
            h = self._token(level - 1, code_BT, row).unsqueeze(2)
        h, state = self._advance(kv, h, state)
        return self._logits(h[:, :, 0], level, row), DecoderState(state.caches, row)

    def item_logits(self, kv: ContextKV) -> Tensor:
        """fp32 [B, n]: the request against the n items remembered, in the order of the memory's last level from row 1.

        Raises ValueError without an item head.
        """
        if self.item_head is None or self.item_norm is None:
            raise ValueError("this model has no item head; build it with item_head=True")
        h, _ = self._advance(kv, self._start(kv), None)
        with exact(h.device):
            query = self.item_head(self.item_norm(h[:, 0, 0].float()))
            return F.linear(query, self.features.item_vectors())

    def _start(self, kv: ContextKV) -> Tensor:
        """BOS of every request, [B, 1, 1, d]."""
        bos = self.bos if kv.newest is None else self.bos + kv.newest.float()
        return bos.expand(len(kv), -1).view(len(kv), 1, 1, -1)

    def _token(self, level: int, code_BT: Tensor, row_BT: Tensor | None) -> Tensor:
        """[B, T, d] of the code just decoded at ``level``, and of the prefix it completes."""
        found: Tensor = self.token[level](code_BT)
        if self.prefix is None or row_BT is None:
            return found
        return found + self.prefix(self.features.prefix_vectors(level, code_BT, row_BT))

    def _row(self, level: int, code_BT: Tensor, above_BT: Tensor | None) -> Tensor | None:
        """The memory's row of the prefix that ``code_BT`` completes at ``level``; None without memory."""
        memory = self.features.memory
        if memory is None:
            return None
        return code_BT if above_BT is None else memory.level(level).rows(above_BT, code_BT)

    def _rows(self, codes_BTp: Tensor) -> list[Tensor | None]:
        """As ``_row`` of each prefix of ``codes_BTp``."""
        found: list[Tensor | None] = [self._row(0, codes_BTp[..., 0], None)]
        for level in range(1, codes_BTp.shape[-1]):
            found.append(self._row(level, codes_BTp[..., level], found[-1]))
        return found

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

    def _logits(self, h_BTd: Tensor, level: int, row_BT: Tensor | None = None) -> Tensor:
        """fp32 whatever autocast says: logged log-probabilities and the trainer's must agree (GBPO's ratio)."""
        with exact(h_BTd.device):
            out: Tensor = self.heads[level](self.head_norms[level](h_BTd.float()))
            if self.config.head == "linear":
                return out
            codes = self.features.codes(level)
            memory = self.features.memory
            if memory is None or row_BT is None:
                return F.linear(out, codes)
            return memory.level(level).logits(out, codes, row_BT)
