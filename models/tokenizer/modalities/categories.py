"""Categorical metadata: tags, author, music. Each name is a hash bucket whose vector the QFormer learns.

Buckets need no vocabulary and so never meet an unknown name; two names that collide share a vector, which with buckets
several times the names is rare and harmless. Bucket 0 is padding.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from models.tokenizer.modalities.tokens import Tokens
from models.tokenizer.vocabulary import bucket


@dataclass(frozen=True)
class Categories:
    """One token a name in ``column``, a string or a list of strings; the first ``limit`` names count."""

    column: str
    limit: int
    buckets: int
    width: int = 0

    def encode(self, items: pa.Table) -> Tokens:
        """Buckets int64 [n, limit]."""
        values = np.zeros((items.num_rows, self.limit), np.int64)
        for row, names in enumerate(items.column(self.column).to_pylist()):
            names = [names] if isinstance(names, str) else names or []
            found = [bucket(name, self.buckets) for name in dict.fromkeys(names) if name][: self.limit]
            values[row, : len(found)] = found
        return Tokens(values, values > 0)

    def state(self) -> dict[str, np.ndarray]:
        """Nothing: a hash has no state."""
        return {}


TAGS = Categories(column="tags", limit=6, buckets=4096)
AUTHOR = Categories(column="author_id", limit=1, buckets=8192)
MUSIC = Categories(column="music_id", limit=1, buckets=8192)
