"""How every model reads a request's behaviours: the fields' embeddings, and the packing of ragged histories.

OneRec V1 (arXiv 2506.13695) 2.2.1 names the fields; V2 (arXiv 2508.20900) 2.2 concatenates them. An item enters as its
semantic ID, so a new item needs no row in any table; authors and tags are hashed. Left out: an embedding per video id.

Shapes: B requests, S slots of the context, n real behaviours of all requests, L SID levels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from features.schema import FLAGS
from models.nn.memory import PathMemory
from models.pathways import NUMERIC, PATHWAYS, ContextTensors

CODE_NORM = 8**0.5
"""Mean norm of code embeddings that start from codebooks."""


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """The vocabulary of a context; ``embed`` is the width of each SID code's embedding."""

    levels: int = 3
    codes: int = 64
    embed: int = 32
    static_fields: int = 8
    static_buckets: int = 1024
    author_buckets: int = 2048
    tag_buckets: int = 256
    memory: bool = False
    """A vector for every known prefix of a SID, added to its code's (ours, models.nn.memory)."""

    def __post_init__(self) -> None:
        require_positive(self, "levels", "codes", "embed", "static_fields", "static_buckets")
        require_positive(self, "author_buckets", "tag_buckets")


def require_positive(config: object, *names: str) -> None:
    """Raises ValueError naming the first of the fields that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths of the fields beside the SID; 0 leaves ``kind`` out and takes ``labels`` as the bits they are."""

    static: int
    author: int
    tag: int
    kind: int
    numbers: int
    labels: int

    @classmethod
    def alike(cls, config: ContextConfig) -> "Widths":
        """Half a code's width for every field, 8 at least, and the labels as bits (ours; V2's are unpublished)."""
        side = max(config.embed // 2, 8)
        return cls(static=side, author=side, tag=side, kind=side, numbers=side, labels=0)


def dense(width: int, d_model: int) -> nn.Sequential:
    """``Dense(LeakyReLU(Dense(f)))``, V1 2.2.1: what the user's attributes and V1's pathways go through."""
    return nn.Sequential(nn.Linear(width, d_model), nn.LeakyReLU(), nn.Linear(d_model, d_model))


class BehaviourEmbedding(nn.Module):
    """Behaviours [.., width] as their fields side by side, and the user's attributes [B, F * static]."""

    def __init__(self, config: ContextConfig, widths: Widths) -> None:
        super().__init__()
        c, w = config, widths
        self.code = nn.ModuleList(nn.Embedding(c.codes + 1, c.embed, padding_idx=0) for _ in range(c.levels))
        self.memory = PathMemory(c.levels, c.codes, c.embed) if c.memory else None
        self.author = nn.Embedding(c.author_buckets, w.author)
        self.tag = nn.Embedding(c.tag_buckets, w.tag)
        self.kind = nn.Embedding(len(PATHWAYS), w.kind) if w.kind else None
        self.number = nn.Linear(len(NUMERIC), w.numbers)
        self.label = nn.Linear(len(FLAGS), w.labels) if w.labels else nn.Identity()
        self.attribute = nn.Embedding(c.static_buckets, w.static)
        self.width = c.levels * c.embed + w.author + w.tag + w.kind + w.numbers + (w.labels or len(FLAGS))
        self.static_width = c.static_fields * w.static

    def forward(self, context: ContextTensors, request: Tensor, slot: Tensor) -> Tensor:
        """[n, width] of the behaviours in ``slot`` of ``request``, both [n]."""
        sids = context.sids[request, slot]
        pieces = [table(sids[:, level]) for level, table in enumerate(self.code)]
        if self.memory is not None:
            for level, row in enumerate(self.memory.rows(sids - 1), 1):
                pieces[level] = pieces[level] + self.memory.level(level)(row)
        pieces += [self.author(context.author[request, slot]), self.tag(context.tag[request, slot])]
        if self.kind is not None:
            pieces.append(self.kind(context.kind[slot]))
        pieces += [self.number(context.numeric[request, slot]), self.label(context.labels[request, slot])]
        return torch.cat(pieces, -1)

    def static(self, context: ContextTensors) -> Tensor:
        """[B, static_width] of the users."""
        found: Tensor = self.attribute(context.static).flatten(1)
        return found

    def codes(self, level: int) -> Tensor:
        """[C, embed] of the codes of ``level``, without padding."""
        return self.code[level].get_parameter("weight")[1:]

    def prefix_vectors(self, level: int, code: Tensor, row: Tensor) -> Tensor:
        """[.., embed] of ``code`` [..] at ``level`` plus that of the remembered prefix ``row`` it completes."""
        found = F.embedding(code, self.codes(level))
        return found if level == 0 or self.memory is None else found + self.memory.level(level)(row)

    def item_vectors(self) -> Tensor:
        """[n, embed] of the n items remembered, from row 1 of the memory's last level: the sum over their levels."""
        if self.memory is None:
            raise ValueError("this model remembers no items; build it with memory=True")
        vectors = [self.prefix_vectors(level, code, row) for level, (code, row) in enumerate(self.memory.leaves())]
        return torch.stack(vectors).sum(0)

    @torch.no_grad()
    def start_from_codebooks(self, codebooks_LCE: Tensor) -> None:
        """Code embeddings begin at the tokenizer's centroids, scaled to this model's initial norm.

        Ours (unpublished): similar codes begin alike, so what is learned of one item carries over to its like from
        the first step; with little data the context is hardly used otherwise (docs/log.md). Raises ValueError for
        other shapes than [levels, codes, embed].
        """
        wanted = (len(self.code), *self.code[0].get_parameter("weight")[1:].shape)
        if tuple(codebooks_LCE.shape) != wanted:
            raise ValueError(
                f"the codebooks have shape {tuple(codebooks_LCE.shape)}; this model starts from {wanted}: "
                "levels, codes, embed"
            )
        for table, centroids in zip(self.code, codebooks_LCE, strict=True):
            scale = CODE_NORM / centroids.norm(dim=1).mean().clamp(min=1e-9)
            table.get_parameter("weight")[1:] = centroids * scale


@dataclass(frozen=True)
class Packing:
    """Where the real behaviours of a batch go when padding is dropped: ``lead`` rows first, then slots in order."""

    request: Tensor
    """[n] long."""
    slot: Tensor
    """[n] long."""
    row: Tensor
    """[n] long, destination in the flattened [B * width] of the packed batch."""
    mask: Tensor
    """[B, width] bool: True on lead rows and behaviours."""

    @classmethod
    def of(cls, mask_BS: Tensor, lead: int) -> "Packing":
        """Packs the slots where ``mask_BS``; on the meta device every slot counts as filled."""
        device = mask_BS.device
        filled = torch.ones(mask_BS.shape, dtype=torch.bool) if mask_BS.is_meta else mask_BS
        request, slot = filled.nonzero(as_tuple=True)
        counts = filled.sum(1)
        width = lead + (int(counts.max()) if len(counts) else 0)
        row = request * width + filled.cumsum(1)[request, slot] + (lead - 1)
        mask = torch.arange(width, device=filled.device) < (counts + lead)[:, None]
        return cls(request.to(device), slot.to(device), row.to(device), mask.to(device))

    @property
    def lead_rows(self) -> Tensor:
        """[B] long, the first row of every request."""
        b, width = self.mask.shape
        return torch.arange(b, device=self.row.device) * width

    def spread(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """[B, width, ..] with ``values`` [n, ..] in their rows (``rows``: where they go, if elsewhere), 0 between."""
        b, width = self.mask.shape
        full = values.new_zeros(b * width, *values.shape[1:])
        return full.index_copy(0, self.row if rows is None else rows, values).view(b, width, *values.shape[1:])

    @property
    def bias(self) -> Tensor:
        """[B, width] fp32: 0 on what is there, -inf on padding."""
        return torch.zeros(self.mask.shape, device=self.mask.device).masked_fill(~self.mask, -torch.inf)
