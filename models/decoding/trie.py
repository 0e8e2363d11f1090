"""The set of servable semantic IDs as a trie in CSR arrays (OneRec serving; good practice after static constraints).

SIDs are sorted, so a prefix covers a contiguous run of leaves: one cumulative sum over a request's ``allowed`` leaves
answers, for any prefix, whether anything below it may still be served. A SID may stand for several items (collisions);
a leaf therefore lists its items. Left out: dense bit tables for small levels, incremental insertion (a catalogue delta
builds a new trie, which is swapped as a whole).
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Trie:
    """Level ``l`` holds the prefixes of length l; level 0 is the root alone, the last level's nodes are the leaves."""

    sids: Tensor
    """[leaves, L] long, sorted lexicographically."""
    tokens: list[Tensor]
    """Per level l: [nodes of level l + 1] long, the code that leads to the node."""
    offsets: list[Tensor]
    """Per level l: [nodes of level l + 1] long, children of node u are ``offsets[l][u] : offsets[l][u + 1]``."""
    leaf_ranges: list[Tensor]
    """Per level l: [nodes of level l + 1, 2] long, the half-open run of leaves below each child."""
    fan_outs: list[int]
    """Per level l: the largest number of children of a node."""
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

    @classmethod
    def from_sids(cls, sids: np.ndarray | Tensor) -> "Trie":
        """Build from [n, L] codes, one row per item; raises ValueError when empty or negative."""
        table = sids.cpu().numpy() if isinstance(sids, Tensor) else np.asarray(sids)
        if table.ndim != 2 or not table.size or table.min() < 0:
            raise ValueError(f"sids of shape {table.shape} given; expected [n > 0, levels] of codes >= 0")
        unique, leaf_of_item = np.unique(table.astype(np.int64), axis=0, return_inverse=True)
        leaf_of_item = leaf_of_item.reshape(-1)
        starts = [_prefix_starts(unique, length) for length in range(unique.shape[1] + 1)]
        ends = [np.append(start[1:], len(unique)) for start in starts]
        offsets = [np.append(np.searchsorted(child, parent), len(child)) for parent, child in pairwise(starts)]
        counts = np.bincount(leaf_of_item, minlength=len(unique))
        return cls(
            sids=torch.from_numpy(unique),
            tokens=[torch.from_numpy(unique[start, level]) for level, start in enumerate(starts[1:])],
            offsets=[torch.from_numpy(offset) for offset in offsets],
            leaf_ranges=[torch.from_numpy(np.stack(pair, 1)) for pair in zip(starts[1:], ends[1:], strict=True)],
            fan_outs=[int(np.diff(offset).max()) for offset in offsets],
            leaf_of_item=torch.from_numpy(leaf_of_item),
            item_offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
            items=torch.from_numpy(np.argsort(leaf_of_item, kind="stable")),
        )

    def to(self, device: torch.device | str) -> "Trie":
        """The same trie on ``device``."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device)
            return [move(part) for part in value] if isinstance(value, list) else value

        return Trie(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Children of ``nodes`` (any shape) of ``level``: child nodes, their codes, and which exist, each [..., fan].

        Codes and nodes of children that do not exist are in range but meaningless.
        """
        slots = torch.arange(self.fan_outs[level], device=nodes.device)
        child = self.offsets[level][nodes].unsqueeze(-1) + slots
        exists = child < self.offsets[level][nodes + 1].unsqueeze(-1)
        child = child.clamp(max=len(self.tokens[level]) - 1)
        return child, self.tokens[level][child], exists

    def allowed_sums(self, allowed_leaves: Tensor | None, requests: int) -> Tensor | None:
        """What ``servable`` needs of a bool [requests, leaves] filter (None: all); ValueError for another shape."""
        if allowed_leaves is None:
            return None
        if allowed_leaves.shape != (requests, self.leaves):
            raise ValueError(
                f"allowed_leaves has shape {tuple(allowed_leaves.shape)}; expected {(requests, self.leaves)}"
            )
        return _exclusive_sums(allowed_leaves)

    def servable(self, level: int, child: Tensor, sums: Tensor) -> Tensor:
        """Whether any allowed leaf lies below each child [B, ...] of ``level``; ``sums`` from ``allowed_sums``."""
        runs = self.leaf_ranges[level][child.flatten(1)]  # [B, n, 2]
        below = sums.gather(1, runs[..., 1]) - sums.gather(1, runs[..., 0])
        return (below > 0).view(child.shape)

    def locate(self, sids: Tensor) -> Tensor:
        """Leaf of each SID [..., L], -1 where there is none (an illegal SID)."""
        node = torch.zeros(sids.shape[:-1], dtype=torch.long, device=sids.device)
        found = torch.ones_like(node, dtype=torch.bool)
        for level in range(sids.shape[-1]):
            child, codes, exists = self.children(level, node)
            hit = (codes == sids[..., level, None]) & exists
            found &= hit.any(-1)
            node = child.gather(-1, hit.long().argmax(-1, keepdim=True)).squeeze(-1)
        return torch.where(found, node, -1)

    def allow_items(self, allowed: Tensor) -> Tensor:
        """Leaves [B, leaves] with at least one allowed item; ``allowed`` is bool [B, items]."""
        sums = _exclusive_sums(allowed[:, self.items])
        return sums[:, self.item_offsets[1:]] > sums[:, self.item_offsets[:-1]]


def _exclusive_sums(allowed: Tensor) -> Tensor:
    """Exclusive cumulative counts [B, n + 1] of a bool [B, n]."""
    return F.pad(allowed.to(torch.int32).cumsum(1), (1, 0))


def _prefix_starts(sorted_sids: np.ndarray, length: int) -> np.ndarray:
    """Index of the first leaf of every distinct prefix of ``length`` codes."""
    if length == 0:
        return np.zeros(1, np.int64)
    changed = (sorted_sids[1:, :length] != sorted_sids[:-1, :length]).any(1)
    return np.flatnonzero(np.concatenate([[True], changed]))
