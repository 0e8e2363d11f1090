"""A whole exposure log with its items and users, in the schemas of ``features.schema``, and a log read chunk by chunk.

Loaders of published data sets and the simulated worlds give a ``Dataset``; nothing is dropped in silence: rows that
break the schema are kept, as text, with the reason. A ``Log`` is the same without the memory: chunks of whole users,
then the items and users that they named.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.schema import EXPOSURE, ITEM, USER

TOO_FEW = "a recommender is learned from what at least 2 users watched: give a log of more users"


def no_rejects() -> pa.Table:
    """No rejected rows."""
    return pa.table({"reason": pa.array([], pa.string())})


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Items, users and exposures of one log; ``exposures`` are sorted by event_time.

    ``rejected`` holds the raw columns as strings, the ``file`` they came from and the ``reason``; ``duplicates``
    counts exact repeats that were removed, ``untimed`` exposures whose time the log does not tell, ``unordered`` users
    whose times run backwards in a log that gives an order. Raises ValueError when a table has another schema.
    """

    name: str
    items: pa.Table
    users: pa.Table
    exposures: pa.Table
    rejected: pa.Table = field(default_factory=no_rejects)
    duplicates: int = 0
    untimed: int = 0
    unordered: int = 0

    def __post_init__(self) -> None:
        for table, schema in ((self.items, ITEM), (self.users, USER), (self.exposures, EXPOSURE)):
            if not table.schema.equals(schema):
                raise ValueError(f"data set {self.name!r}: expected the columns {schema.names}, got {table.schema}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """The rows of some users of a log, all of each: sessions and repeats are found inside."""

    key: str
    """Names the chunk: the same for the same log."""
    exposures: pa.Table
    rejected: pa.Table = field(default_factory=no_rejects)
    duplicates: int = 0
    untimed: int = 0
    unordered: int = 0
    raw: pd.DataFrame | None = None
    """The text the exposures were made from, row by row in no particular order, where the log is text."""


class Seen:
    """The items and users that chunks of a log named so far."""

    def __init__(self) -> None:
        self.items = pa.table({"item_id": pa.array([], pa.string()), "duration_ms": pa.array([], pa.float64())})
        """Each item once, with the median of its durations in the chunk that named it first."""
        self.users = pa.table({"user_id": pa.array([], pa.string())})

    def add(self, exposures: pa.Table) -> None:
        """Takes note of the rows of a chunk (EXPOSURE)."""
        durations = exposures.select(["item_id", "duration_ms"]).to_pandas().groupby("item_id")["duration_ms"].median()
        fresh = pa.table({"item_id": pa.array(durations.index, pa.string()), "duration_ms": durations.to_numpy()})
        users = exposures.select(["user_id"]).group_by("user_id").aggregate([])
        self.merge(fresh, users)

    def merge(self, items: pa.Table, users: pa.Table) -> None:
        """Takes over what another one has seen."""
        for name, table, column in (("items", items, "item_id"), ("users", users, "user_id")):
            mine: pa.Table = getattr(self, name)
            new = pc.invert(pc.is_in(table.column(column), value_set=mine.column(column).combine_chunks()))
            setattr(self, name, pa.concat_tables([mine, table.filter(new).cast(mine.schema)]).combine_chunks())

    def durations_of(self, item_ids: pa.Array) -> np.ndarray:
        """float64 [n], NaN for an item that no chunk named."""
        rows = pc.index_in(item_ids, value_set=self.items.column("item_id").combine_chunks())
        durations: np.ndarray = self.items.column("duration_ms").take(rows).to_numpy().astype(np.float64)
        return durations


class Log(Protocol):
    """A log that is read chunk by chunk."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Everything that is read: its content decides the outcome. Raises ValueError when a file is missing."""
        ...

    @property
    def parts(self) -> int:
        """About how many chunks there are."""
        ...

    def chunks(self, scratch: Path, skip: Collection[str] = ()) -> Iterator[Chunk]:
        """The log chunk by chunk, without those whose key is in ``skip``; large ones are partitioned in ``scratch``.

        Raises ValueError when a file or column is missing.
        """
        ...

    def items(self, seen: Seen) -> Iterator[tuple[pa.Table, pa.Table]]:
        """ITEM rows and rejected rows, part by part; every item in ``seen`` is among them."""
        ...

    def users(self, seen: Seen) -> pa.Table:
        """USER rows; every user in ``seen`` is among them."""
        ...


class Published(Log, Protocol):
    """A log in files of a known layout."""

    @property
    def unread(self) -> Mapping[str, str]:
        """Files beside those that are read, and why they are not."""
        ...

    @property
    def labels(self) -> Mapping[str, str]:
        """The column of the raw text that holds each flag, where there is one."""
        ...

    @property
    def played(self) -> bool:
        """Whether the rows have durations and play times."""
        ...

    def check(self) -> None:
        """Reads headers, and rows until it has met two users; raises ValueError naming what is wrong."""
        ...


def collect(log: Log, scratch: Path) -> Dataset:
    """The whole log in memory; raises ValueError when it has no valid row."""
    chunks, seen = list(log.chunks(scratch)), Seen()
    exposures = pa.concat_tables([chunk.exposures for chunk in chunks] or [EXPOSURE.empty_table()])
    if not exposures.num_rows:
        raise no_valid_row(log.name, [chunk.rejected for chunk in chunks])
    seen.add(exposures)
    items = list(log.items(seen))
    if len(chunks) > 1:
        exposures = exposures.take(pa.array(np.argsort(exposures["event_time"].cast(pa.int64()), kind="stable")))
    rejected = [*(chunk.rejected for chunk in chunks), *(rows for _, rows in items)]
    return Dataset(
        name=log.name,
        items=pa.concat_tables([table for table, _ in items]),
        users=log.users(seen),
        exposures=exposures,
        rejected=pa.concat_tables(rejected, promote_options="default"),
        duplicates=sum(chunk.duplicates for chunk in chunks),
        untimed=sum(chunk.untimed for chunk in chunks),
        unordered=sum(chunk.unordered for chunk in chunks),
    )


def no_valid_row(name: str, rejected: list[pa.Table]) -> ValueError:
    """What to raise for a log without a valid row."""
    reasons = [reason for table in rejected for reason in table["reason"].to_pylist()]
    if not reasons:
        return ValueError(f"the log {name!r} has no rows; expected exposures")
    return ValueError(f"all {len(reasons)} rows of the log {name!r} were rejected; the first: {reasons[0]}")
