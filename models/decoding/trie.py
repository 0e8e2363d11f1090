"""The set of servable semantic IDs as a trie in CSR arrays (OneRec serving; OneRec-V2, arXiv 2508.20900).

SIDs are sorted, so a prefix covers a contiguous run of leaves and a node's children are contiguous too. ``expand``
lists the children that exist and no others: beams of a search are distinct nodes, so W of them have at most as many
children as the W widest nodes together, a size known before the search (nothing waits for the device). A SID may
stand for several items (collisions); a leaf lists its items. A trie never changes: a catalogue delta builds a new one,
which is swapped as a whole. Left out: dense bit tables (slower here even at 64 codes: docs/decoding.md).

Shapes: B requests, W beams, N slots for children, L levels.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

MANY = 255
"""Leaf counts are kept in a byte; this one means as many or more."""


@dataclass(frozen=True)
class Children:
    """The children of W beams, packed: N slots a request, of which the first ones ``exist``."""

    node: Tensor
    """[B, N] long, numbered within the next level."""
    code: Tensor
    """[B, N] long."""
    beam: Tensor
    """[B, N] long, whose child it is."""
    exists: Tensor
    """[B, N] bool; the other columns are in range but meaningless where it is False."""

    def only(self, where: Tensor) -> "Children":
        """Those for which the bool [B, N] ``where`` holds."""
        return Children(self.node, self.code, self.beam, self.exists & where)


@dataclass(frozen=True, kw_only=True)
class Trie:
    """Level ``l`` holds the prefixes of length l; level 0 is the root alone, the last level's nodes are the leaves."""

    sids: Tensor
    """[leaves, L] long, sorted lexicographically."""
    tokens: list[Tensor]
    """Per level l: [nodes of level l + 1] long, the code that leads to the node."""
    parents: list[Tensor]
    """Per level l: [nodes of level l + 1] long, the node of level l it hangs from."""
    offsets: list[Tensor]
    """Per level l: [nodes of level l + 1] long, children of node u are ``offsets[l][u] : offsets[l][u + 1]``."""
    leaf_ranges: list[Tensor]
    """Per level l: [nodes of level l + 1, 2] long, the half-open run of leaves below each child."""
    room: list[Tensor]
    """Per level l: [nodes of level l + 1] uint8, the number of leaves below each child, at most MANY."""
    widest: list[np.ndarray]
    """Per level l: int64 [nodes of level l], children of the widest node, of the two widest together, and so on."""
    codes: int
    """One more than the largest code."""
    leaf_of_item: Tensor
    """[items] long: the leaf of each row the trie was built from."""
    item_offsets: Tensor
    """[leaves + 1] long: CSR into ``items``."""
    items: Tensor
    """[items] long: item rows grouped by leaf, ascending inside a leaf."""

    @property
    def leaves(self) -> int:
        """Number of distinct SIDs."""
        return len(self.sids)

    @property
    def levels(self) -> int:
        """Codes of a SID."""
        return len(self.tokens)

    @classmethod
    def from_sids(cls, sids: np.ndarray | Tensor) -> "Trie":
        """Build from [n, L] codes, one row per item; raises ValueError when empty or negative."""
        table = sids.cpu().numpy() if isinstance(sids, Tensor) else np.asarray(sids)
        if table.ndim != 2 or not table.size or table.min() < 0:
            raise ValueError(f"sids of shape {table.shape} given; expected [n > 0, levels] of codes >= 0")
        unique, leaf_of_item = _distinct(table.astype(np.int64))
        starts = [_prefix_starts(unique, length) for length in range(unique.shape[1] + 1)]
        ends = [np.append(start[1:], len(unique)) for start in starts]
        offsets = [np.append(np.searchsorted(child, parent), len(child)) for parent, child in pairwise(starts)]
        counts = np.bincount(leaf_of_item, minlength=len(unique))
        tensor = torch.from_numpy
        return cls(
            sids=tensor(unique),
            tokens=[tensor(unique[start, level]) for level, start in enumerate(starts[1:])],
            parents=[tensor(np.repeat(np.arange(len(offset) - 1), np.diff(offset))) for offset in offsets],
            offsets=[tensor(offset) for offset in offsets],
            leaf_ranges=[tensor(np.stack(pair, 1)) for pair in zip(starts[1:], ends[1:], strict=True)],
            room=[
                tensor(np.minimum(end - start, MANY).astype(np.uint8))
                for start, end in zip(starts[1:], ends[1:], strict=True)
            ],
            widest=[np.cumsum(np.sort(np.diff(offset))[::-1]) for offset in offsets],
            codes=int(table.max()) + 1,
            leaf_of_item=tensor(leaf_of_item),
            item_offsets=tensor(np.concatenate([[0], np.cumsum(counts)])),
            items=tensor(np.argsort(leaf_of_item, kind="stable")),
        )

    def to(self, device: torch.device | str) -> "Trie":
        """The same trie on ``device``."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device)
            return [move(part) for part in value] if isinstance(value, list) else value

        return Trie(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def fits(self, codes: int, levels: int) -> None:
        """Raises ValueError when a model of ``codes`` x ``levels`` cannot generate these SIDs."""
        if levels != self.levels or codes < self.codes:
            raise ValueError(
                f"the trie has {self.levels} levels and codes up to {self.codes - 1}, the model {levels} levels of "
                f"{codes} codes; use the trie of the model's own bundle"
            )

    def slots(self, level: int, width: int, *, repeated: bool = False) -> int:
        """The most children that ``width`` nodes of ``level`` can have; ``repeated`` allows the same node twice."""
        widest = self.widest[level]
        return int(width * widest[0] if repeated else widest[min(width, len(widest)) - 1])

    def expand(self, level: int, nodes: Tensor, valid: Tensor, *, repeated: bool = False) -> Children:
        """Children of the ``valid`` ones of ``nodes`` [B, W] of ``level``, all distinct unless ``repeated``."""
        b, w = nodes.shape
        first = self.offsets[level][nodes]
        counts = (self.offsets[level][nodes + 1] - first).masked_fill(~valid, 0)
        ends = counts.cumsum(1)
        n = self.slots(level, w, repeated=repeated)
        # Beam j owns the slots from ends[j] - counts[j] on: a 1 at each start, summed up, numbers them.
        marks = torch.zeros(b, n + 1, dtype=torch.long, device=nodes.device)
        marks.scatter_add_(1, ends - counts, torch.ones_like(ends))
        beam = marks[:, :n].cumsum(1) - 1
        slot = torch.arange(n, device=nodes.device)
        exists = slot < ends[:, -1:]
        node = (slot + (first - ends + counts).gather(1, beam)).clamp_(max=len(self.tokens[level]) - 1)
        return Children(node, self.tokens[level][node], beam, exists)

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Children of each of ``nodes`` (any shape) of ``level``, padded: nodes, codes, which exist, each [..., fan].

        Codes and nodes of children that do not exist are in range but meaningless.
        """
        slots = torch.arange(int(self.widest[level][0]), device=nodes.device)
        child = self.offsets[level][nodes].unsqueeze(-1) + slots
        exists = child < self.offsets[level][nodes + 1].unsqueeze(-1)
        child = child.clamp(max=len(self.tokens[level]) - 1)
        return child, self.tokens[level][child], exists

    def locate(self, sids: Tensor) -> Tensor:
        """Leaf of each SID [..., L], or node of each prefix [..., fewer codes]; -1 where there is none (illegal)."""
        node = torch.zeros(sids.shape[:-1], dtype=torch.long, device=sids.device)
        legal = ((sids >= 0) & (sids < self.codes)).all(-1)
        for level, code in enumerate(sids.unbind(-1)):
            keys = self.parents[level] * self.codes + self.tokens[level]  # ascending
            wanted = node * self.codes + code
            node = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            legal &= keys[node] == wanted
        return torch.where(legal, node, -1)


def _distinct(sids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [leaves, L] in lexicographic order, each once, and the place of every row of ``sids`` among them."""
    order = np.lexsort(sids.T[::-1])
    ordered = sids[order]
    first = np.r_[True, (ordered[1:] != ordered[:-1]).any(1)]
    place = np.empty(len(sids), np.int64)
    place[order] = np.cumsum(first) - 1
    return ordered[first], place


def _prefix_starts(sorted_sids: np.ndarray, length: int) -> np.ndarray:
    """Index of the first leaf of every distinct prefix of ``length`` codes."""
    if length == 0:
        return np.zeros(1, np.int64)
    changed = (sorted_sids[1:, :length] != sorted_sids[:-1, :length]).any(1)
    return np.flatnonzero(np.concatenate([[True], changed]))
