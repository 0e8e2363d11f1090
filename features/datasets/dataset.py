"""A whole exposure log with its items and users, in the schemas of ``features.schema``.

Loaders of published data sets and the simulated worlds both give this; nothing is dropped in silence: rows that
break the schema are kept, as text, with the reason. Left out: streaming (a Dataset is in memory).
"""

from dataclasses import dataclass, field

import pyarrow as pa

from features.schema import EXPOSURE, ITEM, USER

TOO_FEW = "a recommender is learned from what at least 2 users watched: give a log of more users"


def _no_rejects() -> pa.Table:
    return pa.table({"reason": pa.array([], pa.string())})


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Items, users and exposures of one log; ``exposures`` are sorted by event_time.

    ``rejected`` holds the raw columns as strings, the ``file`` they came from and the ``reason``; ``duplicates``
    counts exact repeats that were removed. Raises ValueError when a table has another schema.
    """

    name: str
    items: pa.Table
    users: pa.Table
    exposures: pa.Table
    rejected: pa.Table = field(default_factory=_no_rejects)
    duplicates: int = 0

    def __post_init__(self) -> None:
        for table, schema in ((self.items, ITEM), (self.users, USER), (self.exposures, EXPOSURE)):
            if not table.schema.equals(schema):
                raise ValueError(f"data set {self.name!r}: expected the columns {schema.names}, got {table.schema}")
