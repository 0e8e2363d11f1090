"""Columns of a published log as exposures: with play times and sessions, or only who took what and when.

A log of *impressions* has durations; where it has no request ids, views of a user less than 30 minutes apart share
one. A log of *interactions* (ratings, purchases, clicks) has no impressions, play times or sessions: every interaction
is one exposure with ``click`` and ``long_view`` set, ``duration_ms = play_ms = 0``, and a request of its own, whose
context is everything the user did before. Its times become strictly increasing inside a user, so that an order the log
has (rows of one day, rows without a time) survives the rule that a context holds only earlier events.
"""

import time
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa

from features.schema import EXPOSURE, FLAGS, TIME, conform, exposure_id

UNKNOWN_TIME = -1
SESSION_GAP_MS = 30 * 60 * 1000
DAY_MS = 86_400_000
OLDEST_MS = 631_152_000_000
"""1990: no published log is older, but a clock that was never set says 1970 or 1980."""


def latest_ms() -> int:
    """What is later than this time, a day ahead of now, is a wrong clock."""
    return int(time.time() * 1000) + DAY_MS


def ordered_times(user: np.ndarray, times_ms: np.ndarray) -> np.ndarray:
    """int64 [N], strictly increasing inside each ``user`` in the order of the rows; users need not be contiguous.

    A row without a time (negative) gets its predecessor's, the first rows of a user the first time known of the user,
    a user without any the earliest of the log (0 when there is none). A row that is not later than its predecessor is
    put one millisecond after it: t_i = max(t_i, t_(i-1) + 1).
    """
    known = pd.Series(times_ms.astype(np.float64)).where(times_ms >= 0)
    groups = known.groupby(user)
    filled = groups.ffill().fillna(groups.bfill()).fillna(known.min() if known.notna().any() else 0.0)
    place = filled.groupby(user).cumcount()
    # max over j <= i of (t_j - j) + i is the smallest sequence that is >= t and rises by at least 1.
    times: np.ndarray = ((filled - place).groupby(user).cummax() + place).to_numpy().astype(np.int64)
    return times


def interactions_table(
    user_ids: np.ndarray, item_ids: np.ndarray, times_ms: np.ndarray, flags: Mapping[str, np.ndarray] | None = None
) -> pa.Table:
    """EXPOSURE rows in order of time; rows of one user stand in that user's order, ids are strings, -1 is no time.

    ``flags`` (bool [N] by name) are added to ``click``; without them every interaction is a click and a long view.
    """
    given = dict(flags) if flags else {"long_view": np.ones(len(user_ids), bool)}
    times = ordered_times(user_ids, np.asarray(times_ms, np.int64))
    place = pd.Series(times).groupby(user_ids).cumcount().to_numpy()
    requests = np.array([f"{user}-{k}" for user, k in zip(user_ids, place, strict=True)], object)
    nothing = np.zeros(len(user_ids), np.int64)
    given["click"] = np.ones(len(user_ids), bool)
    values = {"duration_ms": nothing, "play_ms": nothing, **given}
    # Another log may count its users from 1 as well.
    names = [f"{r}\x1f{i}\x1f{t}" for r, i, t in zip(requests, item_ids, times.tolist(), strict=True)]
    return _table(user_ids, item_ids, times, requests, nothing, values, names)


def impressions_table(
    user_ids: np.ndarray,
    item_ids: np.ndarray,
    times_ms: np.ndarray,
    values: Mapping[str, np.ndarray],
    request_ids: np.ndarray | None = None,
) -> pa.Table:
    """EXPOSURE rows in order of time; ``values`` holds duration_ms, play_ms and flags by name.

    Without ``request_ids`` views of a user less than SESSION_GAP_MS apart share one; positions count inside a request.
    """
    order = np.lexsort((np.arange(len(times_ms)), times_ms, pd.factorize(user_ids, sort=True)[0]))
    user, times = user_ids[order], np.asarray(times_ms, np.int64)[order]
    rows = np.arange(len(order))
    if request_ids is None:
        opens = np.ones(len(order), bool)
        opens[1:] = (user[1:] != user[:-1]) | (np.diff(times) >= SESSION_GAP_MS)
        first = np.flatnonzero(opens)[np.cumsum(opens) - 1] if len(order) else rows
        requests = np.array([f"{u}-{t}" for u, t in zip(user[first], times[first], strict=True)], object)
        names, position = requests.tolist(), rows - first
    else:
        requests = request_ids[order]
        names = [f"{u}\x1f{r}" for u, r in zip(user, requests, strict=True)]  # two users may carry one request id
        position = pd.Series(rows).groupby([user, requests]).cumcount().to_numpy()
    sorted_values = {name: column[order] for name, column in values.items()}
    return _table(user, item_ids[order], times, requests, position, sorted_values, names)


def _table(
    user: np.ndarray,
    item: np.ndarray,
    times: np.ndarray,
    requests: np.ndarray,
    position: np.ndarray,
    values: Mapping[str, np.ndarray],
    names: Iterable[str],
) -> pa.Table:
    """EXPOSURE rows in order of time; ``names`` [N] name requests uniquely over all users."""
    no = np.zeros(len(user), bool)
    ids = [exposure_id(name, "organic", int(p)) for name, p in zip(names, position, strict=True)]
    table = pa.table(
        {
            "exposure_id": pa.array(ids, pa.string()),
            "request_id": pa.array(requests, pa.string()),
            "user_id": pa.array(user, pa.string()),
            "item_id": pa.array(item, pa.string()),
            "position": pa.array(position, pa.int32()),
            "event_time": pa.array(times).cast(TIME),
            "source": pa.array(["organic"] * len(user), pa.string()),
            "duration_ms": pa.array(values["duration_ms"], pa.int64()),
            "play_ms": pa.array(values["play_ms"], pa.int64()),
            **{flag: values.get(flag, no) for flag in FLAGS},
        }
    )
    return conform(table.take(pa.array(np.argsort(times, kind="stable"))), EXPOSURE)
