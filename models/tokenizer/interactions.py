"""How strongly a user took to an item: the weighted user x item matrices that embeddings and baselines share.

The weights are ours (the papers publish none): an impression says little, a long view much, an explicit flag
(like, follow, comment, forward, collect) more, and a dislike nothing at all. Left out: sessions; a pair
counts the same wherever in the user's history its two items stand.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from features.histories.windows import is_positive
from features.schema import label_bits

DAY_MS = 86_400_000
EXPLICIT = ("like", "follow", "comment", "forward", "collect")
_EXPLICIT = 1.0  # added for an explicit flag


def positive(exposures: pa.Table) -> np.ndarray:
    """bool [n]: which exposures met high engagement (features.histories.windows.is_positive)."""
    play, duration = (exposures.column(name).to_numpy() for name in ("play_ms", "duration_ms"))
    return is_positive(play, duration, label_bits(exposures).to_numpy(zero_copy_only=False))


def strength(exposures: pa.Table, impression: float = 0.05) -> np.ndarray:
    """Engagement weight float32 [n]: 0 for a dislike, 1 to 2 for a positive, ``impression`` for any other exposure."""
    explicit = np.zeros(exposures.num_rows, bool)
    for flag in EXPLICIT:
        explicit |= flags(exposures, flag)
    weight = np.where(positive(exposures), 1.0 + _EXPLICIT * explicit, impression)
    return np.where(flags(exposures, "dislike"), 0.0, weight).astype(np.float32)


def flags(exposures: pa.Table, name: str) -> np.ndarray:
    """bool [n]: one feedback flag."""
    return exposures.column(name).to_numpy(zero_copy_only=False).astype(bool)


def times(exposures: pa.Table) -> np.ndarray:
    """Event times int64 [n], UTC ms."""
    return exposures.column("event_time").cast(pa.int64()).to_numpy()


def user_numbers(exposures: pa.Table) -> np.ndarray:
    """int64 [n]: each exposure's user, numbered by first appearance."""
    return np.asarray(pd.factorize(np.asarray(exposures.column("user_id").to_pylist(), object))[0])


def item_rows(exposures: pa.Table, item_ids: Sequence[str] | pd.Index) -> np.ndarray:
    """Row of each exposure's item in ``item_ids``, int64 [n]; -1 where it is not listed."""
    index = item_ids if isinstance(item_ids, pd.Index) else pd.Index(list(item_ids), dtype=object)
    return index.get_indexer(pd.Index(exposures.column("item_id").to_pylist(), dtype=object)).astype(np.int64)


def user_item(users: np.ndarray, items: np.ndarray, weight: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """float32 CSR [users, items] of the largest weight of each pair; rows with item -1 or weight 0 are dropped."""
    kept = (items >= 0) & (weight > 0)
    frame = pd.DataFrame({"user": users[kept], "item": items[kept], "weight": weight[kept]})
    best = frame.groupby(["user", "item"], sort=True)["weight"].max()
    rows, columns = best.index.get_level_values(0), best.index.get_level_values(1)
    return sparse.csr_matrix((best.to_numpy(np.float32), (rows, columns)), shape=shape, dtype=np.float32)


def newest(users: np.ndarray, when: np.ndarray, limit: int) -> np.ndarray:
    """bool [n]: which events are among their user's ``limit`` latest."""
    order = np.lexsort((when, users))
    from_the_end = pd.Series(users[order]).groupby(users[order]).cumcount(ascending=False).to_numpy()
    kept = np.zeros(len(users), bool)
    kept[order] = from_the_end < limit
    return kept


def popularity(exposures: pa.Table, item_ids: Sequence[str], half_life_days: float = 7.0) -> np.ndarray:
    """Sum of each item's engagement weights, float32 [len(item_ids)]; an event ``half_life_days`` older counts half."""
    if not exposures.num_rows:
        return np.zeros(len(item_ids), np.float32)
    when = times(exposures)
    decay = 0.5 ** ((when.max() - when) / (half_life_days * DAY_MS))
    rows = item_rows(exposures, item_ids)
    known = rows >= 0
    return np.bincount(rows[known], (strength(exposures) * decay)[known], len(item_ids)).astype(np.float32)
