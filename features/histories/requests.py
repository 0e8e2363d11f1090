"""The requests of an exposure log: the contexts that training conditions on.

All exposures of one request share its context, taken at the request's earliest event: none of them, and nothing
after it, can enter it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """R requests in order of time, and the exposure rows of each."""

    names: pa.Array
    """string [R], request ids."""
    users: pa.Array
    """string [U]"""
    user: np.ndarray
    """int32 [R], rows of ``users``."""
    times_ms: np.ndarray
    """int64 [R], the earliest event time of the request."""
    offsets: np.ndarray
    """int64 [R + 1]: request ``i`` owns ``rows[offsets[i]:offsets[i + 1]]``."""
    rows: np.ndarray
    """int64 [N], rows of the exposure table, grouped by request, in order of position inside one."""

    def __len__(self) -> int:
        return len(self.times_ms)

    @cached_property
    def request_ids(self) -> np.ndarray:
        """object [R]"""
        return self.names.to_numpy(zero_copy_only=False)

    @cached_property
    def user_ids(self) -> np.ndarray:
        """object [R]"""
        names: np.ndarray = self.users.to_numpy(zero_copy_only=False)[self.user]
        return names

    def rows_of(self, request: int) -> np.ndarray:
        """Rows of the exposure table that belong to request number ``request``."""
        return self.rows[self.offsets[request] : self.offsets[request + 1]]


def requests(exposures: pa.Table) -> Requests:
    """Groups ``exposures`` (features.schema.EXPOSURE, any order) by user and request id."""
    if exposures.num_rows == 0:
        none, names = np.empty(0, np.int64), pa.array([], pa.string())
        offsets = np.zeros(1, np.int64)
        return Requests(names=names, users=names, user=none, times_ms=none, offsets=offsets, rows=none)
    users, ids = (pc.dictionary_encode(exposures.column(name)).combine_chunks() for name in ("user_id", "request_id"))
    times = exposures.column("event_time").cast(pa.int64()).to_numpy()
    position = exposures.column("position").to_numpy()
    user = users.indices.to_numpy()
    key = user.astype(np.int64) * len(ids.dictionary) + ids.indices.to_numpy()
    _, opened, group = np.unique(key, return_index=True, return_inverse=True)
    # Requests of one time stay in the order in which the table names them.
    group = np.argsort(np.argsort(opened))[group]
    earliest = np.full(group.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, group, times)
    order = np.lexsort((times, position, group, earliest[group]))
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    first = order[starts]
    return Requests(
        names=exposures.column("request_id").take(pa.array(first)).combine_chunks(),
        users=users.dictionary,
        user=user[first],
        times_ms=earliest[group[first]],
        offsets=np.r_[starts, len(order)],
        rows=order,
    )
