"""Per-request filters: which leaves of the trie may be served to whom (seen, excluded, not available).

A search must not enter a prefix below which nothing may be served, so a filter keeps, for every node of every level,
how many servable leaves lie below it: one byte a node. Few leaves are blocked for a request, so the bytes are the
trie's own with corrections at the ancestors of the blocked leaves; the cost hardly depends on the catalogue. Blocked
for everybody (take-downs) means a new trie, not a filter.

Shapes: B requests, X blocked leaves at most, N candidates.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoding.trie import MANY, Trie


@dataclass(frozen=True)
class LeafFilter:
    """``room[l]`` [B, nodes of level l + 1] uint8: servable leaves below each node, at most MANY."""

    room: list[Tensor]

    def __len__(self) -> int:
        return len(self.room[0])

    @classmethod
    def from_bitmap(cls, trie: Trie, allowed: Tensor) -> "LeafFilter":
        """From a bool [B, leaves]; raises ValueError for another shape."""
        if allowed.ndim != 2 or allowed.shape[1] != trie.leaves:
            raise ValueError(f"the bitmap has shape {tuple(allowed.shape)}; expected [requests, {trie.leaves}]")
        sums = F.pad(allowed.to(torch.int32).cumsum(1), (1, 0))
        counts = (sums[:, runs[:, 1]] - sums[:, runs[:, 0]] for runs in trie.leaf_ranges)
        return cls([count.clamp(max=MANY).to(torch.uint8) for count in counts])

    @classmethod
    def blocking(cls, trie: Trie, blocked: Tensor) -> "LeafFilter":
        """Everything but the leaves in ``blocked`` [B, X] long, ascending in each row, padded with ``trie.leaves``."""
        real = blocked < trie.leaves
        node = blocked.clamp(max=trie.leaves - 1)
        rooms: list[Tensor] = []
        for level in reversed(range(trie.levels)):
            start, end = trie.leaf_ranges[level][node].unbind(-1)
            gone = torch.searchsorted(blocked, end.contiguous()) - torch.searchsorted(blocked, start.contiguous())
            left = (end - start - gone).clamp(max=MANY).to(torch.uint8)
            whole = trie.room[level]
            room = whole.new_empty(len(blocked), len(whole) + 1)  # the last column takes what padding writes
            room[:, :-1] = whole
            rooms.append(room.scatter_(1, torch.where(real, node, len(whole)), left)[:, :-1])
            node = trie.parents[level][node]
        return cls(rooms[::-1])

    def below(self, level: int, node: Tensor) -> Tensor:
        """uint8 [B, N], the servable leaves below each of ``node`` [B, N] of level ``level + 1``."""
        return self.room[level].gather(1, node)


def blocked_leaves(
    leaf_of_item: np.ndarray, leaves: int, request: np.ndarray, item: np.ndarray, requests: int
) -> np.ndarray:
    """int64 [B, X] as ``LeafFilter.blocking`` wants it: the leaves all of whose items are excluded.

    ``request`` and ``item`` are the exclusions as pairs, in any order, repeats allowed.
    """
    pairs = np.unique(request.astype(np.int64) * len(leaf_of_item) + item)
    owner, item = np.divmod(pairs, len(leaf_of_item))
    key, excluded = np.unique(owner * leaves + leaf_of_item[item], return_counts=True)
    owner, leaf = np.divmod(key, leaves)
    whole = excluded == np.bincount(leaf_of_item, minlength=leaves)[leaf]
    owner, leaf = owner[whole], leaf[whole]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    blocked = np.full((requests, int(place.max(initial=-1)) + 1), leaves)
    blocked[owner, place] = leaf
    return blocked
