"""A user's recent exposures as equally long columns, and the one fold that maintains them.

The short-term and positive-feedback pathways (OneRec technical report, section 2.2) are never stored per exposure:
training slices them from the log (``features.histories.sequences``), the on-line updater folds them event by event
(``features.updater``), and both mean the function ``fold`` below. It is a join of a semilattice (feedback of one
exposure only grows: the larger play time, flags once set stay set) followed by "the newest ``limit``", hence
idempotent, independent of order and of batching: retried and late events do no harm.

Left out: withdrawn feedback (an un-like leaves the like set).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from features.schema import FLAGS, label_bits
from features.settings import settings

ENGAGED = sum(1 << FLAGS.index(flag) for flag in ("like", "follow", "comment", "forward", "collect", "long_view"))
DISLIKED = 1 << FLAGS.index("dislike")
LONG_VIEW_MS = 18_000


LENGTHS = {"tiny": (20, 64, 64), "small": (20, 256, 256), "paper": (20, 256, 2000)}
"""Short-term, positive-feedback and lifelong pathway; the last are OneRec's own."""


def configured(position: int) -> int:
    """One length of what ``ONEREC_PATHWAYS`` names, such as ``small`` or ``20,256,500``; raises ValueError."""
    given = settings().pathways
    numbers = [int(part) if part.strip().isdigit() else 0 for part in given.split(",")]
    lengths = LENGTHS.get(given) or tuple(numbers)
    if len(lengths) != 3 or min(lengths) < 1:
        known = ", ".join(LENGTHS)
        raise ValueError(f"ONEREC_PATHWAYS is {given!r}; expected {known} or three lengths such as 20,256,500")
    return lengths[position]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many of the newest events each pathway keeps; by default what the platform is configured for."""

    short: int = field(default_factory=lambda: configured(0))
    positive: int = field(default_factory=lambda: configured(1))
    lifelong: int = field(default_factory=lambda: configured(2))

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) < 1:
                raise ValueError(f"limit {each.name} is {getattr(self, each.name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Events of one user as equally long arrays, oldest first; ties of time are ordered by id."""

    ids: np.ndarray
    """int64, ``event_ids`` of the exposure ids."""
    item_ids: np.ndarray
    """object, strings."""
    times: np.ndarray
    """int64, UTC ms."""
    play_ms: np.ndarray
    """int64"""
    duration_ms: np.ndarray
    """int64"""
    labels: np.ndarray
    """int64, bit ``i`` is ``features.schema.FLAGS[i]``."""

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window) and all(
            np.array_equal(mine, theirs) for mine, theirs in zip(self.columns(), other.columns(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def columns(self) -> tuple[np.ndarray, ...]:
        """The six arrays in the order of the fields."""
        return self.ids, self.item_ids, self.times, self.play_ms, self.duration_ms, self.labels

    def take(self, rows: np.ndarray | slice) -> "Window":
        """The rows selected by indices, a mask or a slice."""
        return Window(**{name: column[rows] for name, column in zip(COLUMNS, self.columns(), strict=True)})


COLUMNS = tuple(field.name for field in fields(Window))
"""Names of the window's columns; the feature views store the same ones."""


def empty_window() -> Window:
    """A window without events."""
    none = np.empty(0, np.int64)
    return Window(ids=none, item_ids=np.empty(0, object), times=none, play_ms=none, duration_ms=none, labels=none)


def concat_windows(windows: Sequence[Window]) -> Window:
    """All rows of ``windows``, one after the other, unmerged."""
    if not windows:
        return empty_window()
    columns = zip(*(window.columns() for window in windows), strict=True)
    return Window(**{name: np.concatenate(column) for name, column in zip(COLUMNS, columns, strict=True)})


def spans(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: first[0], first[0] + 1, ... (counts[0] of them), then those of first[1], and so on."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    result: np.ndarray = np.repeat(first - (ends - counts), counts) + np.arange(total)
    return result


def event_ids(exposure_ids: Iterable[str]) -> np.ndarray:
    """int64 [n]: the first 8 bytes of a stable hash of each exposure id."""
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in exposure_ids)
    return np.frombuffer(digests, "<i8").astype(np.int64)


def window_of(exposures: pa.Table) -> Window:
    """The rows of an exposure table (features.schema.EXPOSURE) as one window, in the table's order, unmerged."""
    return Window(
        ids=event_ids(exposures.column("exposure_id").to_pylist()),
        item_ids=exposures.column("item_id").to_pandas().to_numpy(object),
        times=exposures.column("event_time").cast(pa.int64()).to_numpy(),
        play_ms=exposures.column("play_ms").to_numpy(),
        duration_ms=exposures.column("duration_ms").to_numpy(),
        labels=np.asarray(label_bits(exposures), np.int64),
    )


def is_positive(play_ms: np.ndarray, duration_ms: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [n]: high engagement, which is an explicit positive flag or a long view, and no dislike.

    A log without the ``long_view`` flag is served by its usual definition: watched to the end or for 18 s.
    """
    long_view = (duration_ms > 0) & (play_ms >= np.minimum(duration_ms, LONG_VIEW_MS))
    return (((labels & ENGAGED) != 0) | long_view) & ((labels & DISLIKED) == 0)


def positives(window: Window) -> Window:
    """The rows of ``window`` with high engagement."""
    return window.take(is_positive(window.play_ms, window.duration_ms, window.labels))


def newest(window: Window, limit: int) -> Window:
    """The last ``limit`` rows of ``window``."""
    return window.take(slice(max(len(window) - limit, 0), len(window)))


def merge(window: Window, groups: np.ndarray | None = None) -> tuple[Window, np.ndarray]:
    """One row per (group, id), ordered by (group, time, id); also the group of every row, int64 [n].

    Rows of one id are joined: earliest time, largest play time and duration, all flags set in any of them.
    """
    groups = np.zeros(len(window), np.int64) if groups is None else groups
    if len(window) == 0:
        return window, groups
    order = np.lexsort((window.times, window.ids, groups))
    ids, sorted_groups = window.ids[order], groups[order]
    starts = np.flatnonzero(np.r_[True, (ids[1:] != ids[:-1]) | (sorted_groups[1:] != sorted_groups[:-1])])
    times = window.times[order][starts]
    by_time = np.lexsort((ids[starts], times, sorted_groups[starts]))
    merged = Window(
        ids=ids[starts][by_time],
        item_ids=window.item_ids[order][starts][by_time],
        times=times[by_time],
        play_ms=np.maximum.reduceat(window.play_ms[order], starts)[by_time],
        duration_ms=np.maximum.reduceat(window.duration_ms[order], starts)[by_time],
        labels=np.bitwise_or.reduceat(window.labels[order], starts)[by_time],
    )
    return merged, sorted_groups[starts][by_time]


def fold(window: Window, events: Window, limit: int, before_ms: int | None = None) -> Window:
    """``window`` with ``events`` merged in: the newest ``limit`` rows strictly earlier than ``before_ms``.

    An id stands for one exposure of one item at one time: its item is taken from the earliest row.
    """
    merged, _ = merge(concat_windows([window, events]))
    if before_ms is not None:
        merged = merged.take(slice(0, int(np.searchsorted(merged.times, before_ms, side="left"))))
    return newest(merged, limit)
