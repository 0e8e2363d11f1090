"""What the reward models read of a candidate item: its semantic ID, attributes, record so far, and what the user did
with its like.

The *record* is how an item did when it was shown, as log-ratios to the average, shrunk while it is young. For training
it is taken strictly before each exposure, so no row sees its own label or the future; for judging it is that of all
training data. The *searches* are SIM's hard search (Pi et al., CIKM 2020; OneRec V1, arXiv 2506.13695, 2.4.1 builds its
P-Score on it): what the user did with all behaviours, and with those of the same tag, author and first code. Left out:
embeddings per item id, so that a new item needs no row in any table; the delay of feedback, an exposure's flags count
from its own time on.

Shapes: B requests, T items of each, S behaviours, n items, N exposures, F flags, K numbers.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from features.schema import FLAGS
from models.pathways import NUMERIC, PATHWAYS, ContextTensors, ItemFeatures

SEARCHES = ("any", "tag", "author", "code")
PLAYED = ("play_ratio", "play")
RECORD = ("watch", *FLAGS)
"""What an item's record counts beside its impressions; ``watch`` adds up play-time quantiles in [0, 1]."""
NUMBERS = ("impressions", "duration", *RECORD)
SHRINKAGE = 20.0
"""Impressions that an average record weighs, beside one impression with the flag."""
LEAST_RATE = 1e-5
Numbers = TypeVar("Numbers", np.ndarray, Tensor)


@dataclass(frozen=True, kw_only=True)
class TargetItems:
    """Candidate items of B requests; padding is all zeros."""

    sids: Tensor
    """[B, T, L] long: code + 1, 0 = padding."""
    author: Tensor
    """[B, T] long."""
    tag: Tensor
    """[B, T] long."""
    numbers: Tensor
    """[B, T, K] float32, columns as in ``NUMBERS``."""


def target_items(
    rows_BT: np.ndarray, numbers_BTK: np.ndarray, catalogue: ItemFeatures, device: torch.device | str = "cpu"
) -> TargetItems:
    """The items in ``rows_BT`` of the catalogue, -1 = padding, with their ``item_numbers``."""
    there = rows_BT >= 0
    rows = np.where(there, rows_BT, 0)
    arrays = {
        "sids": np.where(there[..., None], catalogue.sids.astype(np.int64)[rows] + 1, 0),
        "author": np.where(there, catalogue.author.astype(np.int64)[rows], 0),
        "tag": np.where(there, catalogue.tag.astype(np.int64)[rows], 0),
        "numbers": np.where(there[..., None], numbers_BTK, 0).astype(np.float32),
    }
    return TargetItems(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def item_numbers(counts: np.ndarray, duration_ms: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """float32 [.., K] from ``counts`` [.., 1 + len(RECORD)] (impressions, then RECORD's sums) and average ``rates``."""
    shown, sums = counts[..., :1], counts[..., 1:]
    duration = (np.log1p(np.maximum(duration_ms, 0) / 1000) - 3.0) / 1.5
    columns = [np.log1p(shown) / 5, duration[..., None], np.log(rate_ratio(sums, shown, rates))]
    return np.concatenate(columns, -1).astype(np.float32)


def rate_ratio(sums: Numbers, shown: Numbers, rates: Numbers) -> Numbers:
    """``shrunk rate / average rate``, above 0, of arrays or tensors; 1 for what was never shown."""
    rates = rates.clip(min=LEAST_RATE)
    weight = SHRINKAGE + 1 / rates
    return (sums + weight * rates) / ((shown + weight) * rates)


def totals(item: np.ndarray, values: np.ndarray, items: int) -> np.ndarray:
    """float64 [items, 1 + V]: impressions and sums of ``values`` [N, V] by item; rows with item -1 do not count."""
    known = item >= 0
    columns = [np.bincount(item[known], minlength=items)]
    columns += [np.bincount(item[known], column[known], items) for column in values.T]
    return np.stack(columns, 1).astype(np.float64)


def totals_before(item: np.ndarray, times_ms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 [N, 1 + V]: the same over strictly earlier exposures of the row's item; 0 where the item is -1."""
    n = len(item)
    order = np.lexsort((times_ms, item))
    sorted_item, time = item[order], times_ms[order]
    added = np.concatenate([np.ones((n, 1)), values], 1)[order]
    before = np.concatenate([np.zeros((1, added.shape[1])), np.cumsum(added, 0)])[:-1]
    of_item = np.r_[True, sorted_item[1:] != sorted_item[:-1]][:n]
    instant = of_item | np.r_[True, time[1:] != time[:-1]][:n]

    def first(starts: np.ndarray) -> np.ndarray:
        return np.maximum.accumulate(np.where(starts, np.arange(n), 0)) if n else np.empty(0, np.int64)

    found = np.empty_like(before)
    found[order] = before[first(instant)] - before[first(of_item)]
    found[item < 0] = 0
    return found


def searches(context: ContextTensors, items: TargetItems, rates: Tensor) -> Tensor:
    """float32 [B, T, SEARCHES * (1 + F + 2)]: how often, each flag's log-ratio and mean play, by kind of likeness.

    The positive pathway repeats what the others hold and is left out. ``rates`` [F] are the flags' averages.
    """
    seen = context.mask & (context.kind != PATHWAYS.index("positive"))
    code = context.sids[..., 0]
    same = [
        (theirs[:, None] == mine[..., None]) & (mine[..., None] > 0)
        for theirs, mine in ((context.tag, items.tag), (context.author, items.author), (code, items.sids[..., 0]))
    ]
    match = torch.stack([torch.ones_like(same[0]), *same], 2) & seen[:, None, None]  # [B, T, 4, S]
    played = context.numeric[..., [NUMERIC.index(name) for name in PLAYED]]
    values = torch.cat([torch.ones_like(played[..., :1]), context.labels, played], -1)
    b, t, kinds, s = match.shape
    sums = (match.float().view(b, t * kinds, s) @ values).view(b, t, kinds, -1)
    shown, flags, play = sums.split([1, len(FLAGS), len(PLAYED)], -1)
    columns = [shown.log1p() / 3, rate_ratio(flags, shown, rates).log(), play / shown.clamp(min=1)]
    return torch.cat(columns, -1).flatten(2)


def search_names() -> list[str]:
    """Names of the columns of ``searches``."""
    inner = ("count", *FLAGS, *PLAYED)
    return [f"{search}/{name}" for search in SEARCHES for name in inner]
