"""The on-line updater: folds new impressions and feedback into users' windows and pushes them to the feature store.

It reads the windows a user has, folds the batch in with the same ``merge`` that training uses, and writes them back;
users are partitioned and a partition has one writer at a time (``features.ownership``), whoever else is at work. It
keeps no windows between batches: a restart loses nothing but the pairing memory below. Batches may repeat, overlap and
come in any order: the fold is idempotent and commutative.

Feast's Redis store skips a row whose timestamp is not newer than the stored one, but late feedback changes a window
without a newer event: pushes carry max(newest event, last pushed timestamp + 1 ms), strictly increasing per user.

Left out: feedback that comes after its impression has left both the windows and the pairing memory (counted as
unpaired; ``seed_windows`` from the log repairs it).
"""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
from prometheus_client import Counter, Histogram

from features.histories.windows import (
    COLUMNS,
    Limits,
    Window,
    concat_windows,
    empty_window,
    event_ids,
    merge,
    newest,
    positives,
    window_of,
)
from features.online import OnlineFeatures, UserFeatures
from features.ownership import owning, partition_of
from features.schema import label_bits

EVENTS = Counter("onerec_updater_events_total", "Events folded into the on-line windows.", ["kind"])
PUSHED = Counter("onerec_updater_pushed_users_total", "Users whose windows changed and were pushed.")
UNPAIRED = Counter("onerec_updater_unpaired_feedback_total", "Feedback whose impression was not known when it came.")
SECONDS = Histogram("onerec_updater_batch_seconds", "Time to read, fold and push one batch.")
LAG = Histogram("onerec_updater_lag_seconds", "From the acknowledgement of a batch's oldest event to its push.")

UNSHOWN = np.iinfo(np.int64).max
"""Time of a feedback row until its impression is known: ``merge`` takes the earliest, which is the impression's."""
CHUNK = 1_000

Event = tuple[str, int, int, int, int]
"""item_id, time, play_ms, duration_ms, labels"""


class Updater:
    """Applies batches of events in the order they come; owned by one thread. Several may share the work or repeat it.

    ``memory`` bounds how many recent events are remembered to pair feedback with impressions across batches.
    """

    def __init__(self, online: OnlineFeatures, limits: Limits | None = None, memory: int = 200_000) -> None:
        self.online = online
        self.limits = limits or Limits()
        self.memory = memory
        self._recent: OrderedDict[tuple[str, int], Event] = OrderedDict()

    def apply(self, impressions: pa.Table, feedback: pa.Table, accepted_at: float | None = None) -> int:
        """Folds IMPRESSION and FEEDBACK rows in; returns how many users' windows changed.

        ``accepted_at`` (``time.time()`` of the oldest acknowledgement) feeds the lag metric. Raises
        FeaturesUnavailable; the batch may simply be applied again.
        """
        with SECONDS.time():
            users, events = _by_user(*_rows(impressions, feedback))
            paired = [self._pair(user, window) for user, window in zip(users, events, strict=True)]
            pushed = update_windows(self.online, users, paired, self.limits)
        EVENTS.labels("impression").inc(impressions.num_rows)
        EVENTS.labels("feedback").inc(feedback.num_rows)
        if accepted_at is not None:
            LAG.observe(max(time.time() - accepted_at, 0.0))
        return pushed

    def remember(self, impressions: pa.Table, feedback: pa.Table) -> None:
        """Restores the pairing memory after a restart from events that were applied before; pushes nothing."""
        for user, window in zip(*_by_user(*_rows(impressions, feedback)), strict=True):
            self._pair(user, window)

    def _pair(self, user_id: str, events: Window) -> Window:
        """``events`` merged with what is remembered of the same exposures; remembers the result."""
        keys = [(user_id, int(event)) for event in events.ids]
        known = {key[1]: self._recent[key] for key in keys if key in self._recent}
        if known:
            events, _ = merge(concat_windows([events, _window(list(known), list(known.values()))]))
        ids, *columns = (column.tolist() for column in events.columns())
        for event, *row in zip(ids, *columns, strict=True):
            self._recent[user_id, event] = tuple(row)
            self._recent.move_to_end((user_id, event))
        while len(self._recent) > self.memory:
            self._recent.popitem(last=False)
        return events


def update_windows(online: OnlineFeatures, user_ids: Sequence[str], events: Sequence[Window], limits: Limits) -> int:
    """Folds each user's ``events`` into the windows on-line; returns how many users changed and were pushed.

    Raises FeaturesUnavailable; what was pushed by then stays, and the whole may be repeated.
    """
    owned: dict[int, list[int]] = defaultdict(list)
    for row, user in enumerate(user_ids):
        owned[partition_of(user)].append(row)
    pushed = 0
    for partition, rows in sorted(owned.items()):
        for start in range(0, len(rows), CHUNK):
            chosen = rows[start : start + CHUNK]
            with owning(online, partition):
                pushed += _update_owned(
                    online, [user_ids[row] for row in chosen], [events[row] for row in chosen], limits
                )
    return pushed


def _update_owned(online: OnlineFeatures, users: list[str], events: list[Window], limits: Limits) -> int:
    """Read, fold, write; the caller owns the users' partition."""
    # at time 0 nothing has expired: whether an old window still counts is for the reader to judge
    current = online.read(users, now_ms=0)
    folded = [fold_user(*pair, limits) for pair in zip(current, events, strict=True)]
    changed = [row for row, pair in enumerate(folded) if pair != _windows(current[row])]
    if changed:
        online.push_windows(
            [users[row] for row in changed],
            [folded[row][0] for row in changed],
            [folded[row][1] for row in changed],
            np.array([_push_time(current[row], folded[row][0]) for row in changed], np.int64),
        )
    PUSHED.inc(len(changed))
    return len(changed)


def fold_user(current: UserFeatures, events: Window, limits: Limits) -> tuple[Window, Window]:
    """The short-term and positive windows of a user after ``events``; feedback never shown is left out."""
    merged, _ = merge(concat_windows([*_windows(current), events]))
    shown = merged.times < UNSHOWN
    if not shown.all():
        UNPAIRED.inc(int(len(merged) - shown.sum()))
        merged = merged.take(shown)
    return newest(merged, limits.short), newest(positives(merged), limits.positive)


def seed_windows(online: OnlineFeatures, exposures: pa.Table, limits: Limits | None = None) -> int:
    """Folds a whole log (EXPOSURE rows) into every user's windows on-line; returns how many users changed.

    For the state after an ingest, or to repair; what is already on-line is kept. Raises FeaturesUnavailable.
    """
    limits = limits or Limits()
    users, logs = _by_user(exposures.column("user_id").to_pandas().to_numpy(object), window_of(exposures))
    events = [concat_windows([newest(log, limits.short), newest(positives(log), limits.positive)]) for log in logs]
    return update_windows(online, users, events, limits)


def _windows(current: UserFeatures) -> tuple[Window, Window]:
    return current.short or empty_window(), current.positive or empty_window()


def _push_time(current: UserFeatures, short: Window) -> int:
    """Strictly later than the last push of this user."""
    return max(int(short.times[-1]) if len(short) else 1, current.pushed_ms + 1)


def _rows(impressions: pa.Table, feedback: pa.Table) -> tuple[np.ndarray, Window]:
    """User id and event of every row, impressions before feedback, unmerged."""
    shown, told = impressions.num_rows, feedback.num_rows
    zeros = np.zeros(shown, np.int64)

    def strings(table: pa.Table, name: str) -> list[str]:
        return table.column(name).to_pylist()

    events = Window(
        ids=event_ids(strings(impressions, "exposure_id") + strings(feedback, "exposure_id")),
        item_ids=np.array([*strings(impressions, "item_id"), *[""] * told], object),
        times=np.r_[impressions.column("event_time").cast(pa.int64()).to_numpy(), np.full(told, UNSHOWN)],
        play_ms=np.r_[zeros, feedback.column("play_ms").to_numpy()],
        duration_ms=np.r_[impressions.column("duration_ms").to_numpy(), np.zeros(told, np.int64)],
        labels=np.r_[zeros, np.asarray(label_bits(feedback), np.int64)],
    )
    return np.array(strings(impressions, "user_id") + strings(feedback, "user_id"), object), events


def _by_user(user_ids: np.ndarray, events: Window) -> tuple[list[str], list[Window]]:
    """The users of a batch and the merged events of each."""
    codes, users = pd.factorize(user_ids)
    merged, groups = merge(events, codes.astype(np.int64))
    bounds = np.searchsorted(groups, np.arange(len(users) + 1))
    windows = [merged.take(slice(start, end)) for start, end in pairwise(bounds)]
    return users.tolist(), windows


def _window(ids: Sequence[int], rows: Sequence[Event]) -> Window:
    item_ids, *numbers = zip(*rows, strict=True)
    columns = [np.array(ids, np.int64), np.array(item_ids, object), *(np.array(column, np.int64) for column in numbers)]
    return Window(**dict(zip(COLUMNS, columns, strict=True)))
