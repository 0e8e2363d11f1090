"""The requests of an exposure log: the contexts that training conditions on.

All exposures of one request share its context, taken at the request's earliest event: none of them, and nothing
after it, can enter it.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Requests:
    """R requests in order of time, and the exposure rows of each."""

    request_ids: np.ndarray
    """object [R]"""
    user_ids: np.ndarray
    """object [R]"""
    times_ms: np.ndarray
    """int64 [R], the earliest event time of the request."""
    offsets: np.ndarray
    """int64 [R + 1]: request ``i`` owns ``rows[offsets[i]:offsets[i + 1]]``."""
    rows: np.ndarray
    """int64 [N], rows of the exposure table, grouped by request, in order of position inside one."""

    def __len__(self) -> int:
        return len(self.request_ids)

    def rows_of(self, request: int) -> np.ndarray:
        """Rows of the exposure table that belong to request number ``request``."""
        return self.rows[self.offsets[request] : self.offsets[request + 1]]


def requests(exposures: pa.Table) -> Requests:
    """Groups ``exposures`` (features.schema.EXPOSURE, any order) by user and request id."""
    if exposures.num_rows == 0:
        none, names = np.empty(0, np.int64), np.empty(0, object)
        return Requests(request_ids=names, user_ids=names, times_ms=none, offsets=np.zeros(1, np.int64), rows=none)
    request_ids = exposures.column("request_id").to_pandas().to_numpy(object)
    user_ids = exposures.column("user_id").to_pandas().to_numpy(object)
    times = exposures.column("event_time").cast(pa.int64()).to_numpy()
    position = exposures.column("position").to_numpy()
    group = pd.factorize(pd.MultiIndex.from_arrays([user_ids, request_ids]))[0]
    earliest = np.full(group.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, group, times)
    order = np.lexsort((times, position, group, earliest[group]))
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    first = order[starts]
    return Requests(
        request_ids=request_ids[first],
        user_ids=user_ids[first],
        times_ms=earliest[group[first]],
        offsets=np.r_[starts, len(order)],
        rows=order,
    )
