"""The collaborative vector of the training log as a modality: who watches an item, when anyone has yet.

The technical report's encoder sees content alone and takes the collaborative signal from the contrast. A log of a few
thousand items has too few pairs to teach that, so here the closed-form vectors (``cooccurrence``) are one more token;
a new item has none, and training hides it at random so that content alone must place an item too. Ours.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from models.tokenizer.cooccurrence import Collaborative
from models.tokenizer.modalities.tokens import Tokens
from models.tokenizer.vocabulary import stable_hash

_CONFIDENCE = 5.0  # ours: engagement at which an item's vector is trusted by half


class Watched:
    """One token: the item's unit vector times the trust in it, and the trust itself."""

    buckets = 0

    def __init__(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        self.keys, self.vectors = keys, vectors  # sorted int64 [m] hashes of item ids, float32 [m, dim + 1]
        self.width = vectors.shape[1]

    @classmethod
    def fit(cls, items: pa.Table, log: Collaborative) -> "Watched":
        """Keeps the vectors of the items that have one."""
        known = np.flatnonzero(log.known)
        keys = _keys([items.column("item_id")[int(row)].as_py() for row in known])
        trust = (log.engagement[known] / (log.engagement[known] + _CONFIDENCE))[:, None]
        order = np.argsort(keys)
        return cls(keys[order], np.hstack([log.vectors[known] * trust, trust])[order].astype(np.float32))

    def encode(self, items: pa.Table) -> Tokens:
        """Masked for items that nobody had engaged with."""
        keys = _keys(items.column("item_id").to_pylist())
        values = np.zeros((len(keys), 1, self.width), np.float32)
        place = np.minimum(np.searchsorted(self.keys, keys), max(len(self.keys) - 1, 0))
        found = self.keys[place] == keys if len(self.keys) else np.zeros(len(keys), bool)
        values[found, 0] = self.vectors[place[found]]
        return Tokens(values, found[:, None])

    def state(self) -> dict[str, np.ndarray]:
        """``keys`` and ``vectors``."""
        return {"keys": self.keys, "vectors": self.vectors}


def _keys(item_ids: Sequence[str]) -> np.ndarray:
    """Stable int64 hashes of item ids, so that the state needs no strings."""
    return np.fromiter((stable_hash(item_id) >> 1 for item_id in item_ids), np.int64, len(item_ids))
