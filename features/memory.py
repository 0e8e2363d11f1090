"""What nights before this one told of users' pasts: the lifelong rows in object storage, read and replaced each night.

``lifelong/rows.parquet`` holds every user's rows (``features.histories.lifelong``) within the reach of a point-in-time
join. A night reads the settled ones, goes on from them with the newest exposures, and replaces the object when it is
through; so a user's older past lives on in clusters after the exposures have left the window. One writer at a time (the
data stage); a night that fails leaves the object as it was, and a repeated one finds what it found before. Left out:
dividing the object by users, which many millions of them would need.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from features import catalog
from features.histories.lifelong import DAY_MS, LIFELONG_ROWS, daily_lifelong, settled, stamps_of
from features.histories.windows import Limits
from features.storage import ObjectMissing, Storage

KEY = "lifelong/rows.parquet"


def forget(storage: Storage) -> None:
    """Removes the rows: the next night builds them from the exposures of its window. For after an ingest."""
    storage.remove(KEY)


class Memory:
    """The rows of one night: ``rows`` for parts of the users, each user once, then ``close``."""

    def __init__(self, storage: Storage, folder: Path, end_ms: int, limit: int | None = None) -> None:
        """Reads what there is into ``folder``; ``end_ms`` is the end of the night's data."""
        self._storage, self.end_ms = storage, end_ms
        self._limit = limit or Limits().lifelong
        self.vectors = catalog.read_vectors(storage)
        self._before, self._after = folder / "lifelong-before.parquet", folder / "lifelong-after.parquet"
        try:
            self._before.write_bytes(storage.get(KEY))
        except ObjectMissing:
            pq.write_table(LIFELONG_ROWS.empty_table(), self._before)
        self._dataset = pyarrow.dataset.dataset(self._before, format="parquet")
        self._writer = pq.ParquetWriter(self._after, LIFELONG_ROWS, compression="zstd")
        self._told: list[pa.Array] = []
        self.nights, self.clustered = 0, 0
        """Rows that are new, and how many of them came from clustering anew."""

    def rows(self, exposures: pa.Table) -> pa.Table:
        """LIFELONG_ROWS of the users of ``exposures``: settled ones as they were, and those since."""
        users = pc.unique(exposures.column("user_id"))
        previous = self._read(pc.field("user_id").isin(users))
        # The part's own newest settled row tells where to go on, so that every part goes on from the same midnight.
        held = settled(previous, self.end_ms)
        rows = daily_lifelong(exposures, self._limit, self.vectors, held if held.num_rows else None)
        self._writer.write_table(rows)
        self._told.append(users)
        stamps = stamps_of(rows)
        new = stamps > stamps_of(held).max(initial=-1)
        self.nights += int(new.sum())
        self.clustered += int((new & (rows.column("clustered_ms").to_numpy() == stamps)).sum())
        return rows

    def close(self) -> dict[str, Any]:
        """Replaces the stored rows, unless they are of a later night; returns counts."""
        if self._told:
            others = self._read(~pc.field("user_id").isin(pa.concat_arrays(self._told)))
            self._writer.write_table(others)
        self._writer.close()
        newest = stamps_of(self._dataset.to_table(columns=["event_timestamp"]))
        # The last day's rows carry the midnight after it.
        stored = self._told and int(newest.max(initial=0)) < self.end_ms + DAY_MS
        if stored:
            self._storage.put(KEY, self._after.read_bytes(), "application/vnd.apache.parquet")
        version = self.vectors.version if self.vectors else ""
        return {"rows": self.nights, "clustered": self.clustered, "vectors": version, "stored": bool(stored)}

    def _read(self, condition: pc.Expression) -> pa.Table:
        table = self._dataset.to_table(filter=condition)
        return table.replace_schema_metadata(None).cast(LIFELONG_ROWS)
