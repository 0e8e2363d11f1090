"""A vector for every known prefix of a semantic ID: what codes shared by many items cannot say of one of them.

Ours (docs/log.md): with heads that only know codes, a model of few million parameters stays far below one that has a
vector per item; with a vector for every prefix, added to its code's, the last of them an item's own, and a softmax
over the prefixes that exist, the product of the levels is a softmax over the items. The papers score codes alone.

A prefix is known by its row of level ``l``: at level 0 the code, below it where (row above, code) stands among those
remembered. Rows are only ever added, in a fixed order, so weights outlive a growing catalogue; row 0 is "unknown", a
vector of zeros. Left out: forgetting prefixes whose items are gone.

Shapes: B requests, T targets or beams, L SID levels, C codes, E width of a vector, K children of a prefix at most.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEVER = -1e4
"""The logit of a prefix that does not exist: its probability is 0 in fp32, and 0 times its logarithm is 0, not NaN."""


class LevelMemory(nn.Module):
    """The prefixes of one level below the first, each the code ``key % codes`` after the row ``key // codes``."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codes = codes
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.key: Tensor
        self.register_buffer("key", torch.full((1,), -1))
        self._index()

    def __len__(self) -> int:
        """Rows, the unknown one included."""
        return len(self.key)

    def add(self, keys: Tensor) -> None:
        """Remembers the new ones of ``keys`` (long), in ascending order after those known."""
        keys = keys.unique()
        new = keys[~torch.isin(keys, self.key)].to(self.key.device)
        self.key = torch.cat([self.key, new])
        grown = torch.cat([self.weight.data, self.weight.data.new_zeros(len(new), self.weight.shape[1])])
        self.weight = nn.Parameter(grown, requires_grad=self.weight.requires_grad)
        self._index()

    def rows(self, above: Tensor, code: Tensor) -> Tensor:
        """Row of ``code`` after the row ``above`` (same shapes); 0 where it is not known."""
        key = above * self.codes + code
        place = torch.searchsorted(self._sorted, key).clamp(max=len(self._sorted) - 1)
        return torch.where(self._sorted[place] == key, self._order[place], 0)

    def below(self, above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, codes and existence [.., K] of the prefixes one code longer than the row ``above`` [..]."""
        first = torch.searchsorted(self._sorted, above * self.codes).unsqueeze(-1)
        place = first + torch.arange(self._widest, device=above.device)
        inside = place.clamp(max=len(self._sorted) - 1)
        exists = (place < len(self._sorted)) & (self._sorted[inside] // self.codes == above.unsqueeze(-1))
        return torch.where(exists, self._order[inside], 0), self._sorted[inside] % self.codes, exists

    def forward(self, row: Tensor) -> Tensor:
        """Vectors [.., E] of ``row`` [..]; zeros, whatever was learned, for the unknown one."""
        return F.embedding(row, self.weight, padding_idx=0)

    def logits(self, query_BTE: Tensor, codes_CE: Tensor, above_BT: Tensor) -> Tensor:
        """[B, T, C]: ``query`` times code plus prefix vector, NEVER where no such prefix is known.

        After a prefix without known continuations the codes alone count: a softmax needs something to choose from.
        """
        shared = F.linear(query_BTE, codes_CE)
        row, code, exists = self.below(above_BT)
        own = torch.einsum("bte,btke->btk", query_BTE, self(row))
        # Scattered beside the last code when there is no such child, and cut off again.
        code = torch.where(exists, code, self.codes)
        known = shared.new_full((*shared.shape[:-1], self.codes + 1), NEVER)
        padded = F.pad(shared, (0, 1), value=NEVER)
        known = known.scatter(-1, code, padded.gather(-1, code) + own)[..., : self.codes]
        return torch.where(exists.any(-1, keepdim=True), known, shared)

    def _index(self) -> None:
        # Ascending keys put the children of a row side by side. The unknown row is nobody's child.
        self._sorted, order = self.key[1:].sort() if len(self.key) > 1 else (self.key, torch.zeros_like(self.key))
        self._order = order + 1 if len(self.key) > 1 else order
        above = self._sorted // self.codes
        self._widest = int(above.unique_consecutive(return_counts=True)[1].max())

    def _apply(self, fn: Any, recurse: bool = True) -> "LevelMemory":
        super()._apply(fn, recurse)
        self._index()
        return self

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Takes the stored rows, and keeps those that only this memory knows behind them."""
        key, weight = state.get(f"{prefix}key"), state.get(f"{prefix}weight")
        mine = None
        # Equal rows are copied in place, as ever: an optimizer may hold the parameter.
        if isinstance(key, Tensor) and isinstance(weight, Tensor) and not torch.equal(key.to(self.key), self.key):
            mine = self.key[1:]
            self.key = torch.empty_like(key, device=self.key.device)
            self.weight = nn.Parameter(torch.empty_like(weight, device=self.key.device), self.weight.requires_grad)
        super()._load_from_state_dict(dict(state), prefix, *args)
        if mine is not None:
            self.add(mine)


class PathMemory(nn.Module):
    """The memory of all levels below the first."""

    def __init__(self, levels: int, codes: int, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(LevelMemory(codes, width) for _ in range(levels - 1))

    def level(self, level: int) -> LevelMemory:
        """Of prefixes of ``level`` + 1 codes, level 1 .. L - 1."""
        found = self.levels[level - 1]
        assert isinstance(found, LevelMemory)
        return found

    def remember(self, sids: Tensor) -> None:
        """Adds every prefix of ``sids`` (long [items, L]); those known keep row and vector."""
        row = sids[:, 0]
        for level in range(1, sids.shape[1]):
            memory = self.level(level)
            memory.add(row * memory.codes + sids[:, level])
            row = memory.rows(row, sids[:, level])

    def leaves(self) -> list[tuple[Tensor, Tensor]]:
        """Code and row [n] at every level, from the first, of the n whole SIDs in row order."""
        row, found = torch.arange(1, len(self.level(len(self.levels))), device=self.level(1).key.device), []
        for level in range(len(self.levels), 0, -1):
            memory = self.level(level)
            key = memory.key[row]
            found.append((key % memory.codes, row))
            row = key // memory.codes
        return [(row, row), *reversed(found)]

    def rows(self, sids: Tensor) -> list[Tensor]:
        """Rows of the prefixes of ``sids`` (long [.., L], codes from 0) at level 1 .. L - 1, each [..]; 0 = unknown."""
        row, found = sids[..., 0], []
        for level in range(1, sids.shape[-1]):
            row = self.level(level).rows(row, sids[..., level])
            found.append(row)
        return found
