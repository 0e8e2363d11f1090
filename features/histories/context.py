"""The model-facing form of a batch of requests: user-static buckets and three padded pathways, numpy only.

Training fills it from the log (``features.histories.sequences``), serving from the on-line windows
(``from_windows``): the same arrays either way. Newest events stand last, padding (item -1) on the left. A window
is cut to its limit first and loses items unknown to the catalogue afterwards, so that both ways agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b

import numpy as np
import pandas as pd

from features.histories.windows import Limits, Window, concat_windows

STATIC_FIELDS = 8
STATIC_BUCKETS = 1024


@dataclass(frozen=True, kw_only=True)
class Pathway:
    """Events of B requests, [B, L] each, newest last, left-padded."""

    item: np.ndarray
    """int32, row in the catalogue's item index; -1 is padding."""
    age_s: np.ndarray
    """float32, seconds from the event to the request; 0 where padded."""
    play_ms: np.ndarray
    """float32"""
    duration_ms: np.ndarray
    """float32"""
    labels: np.ndarray
    """int32, feedback bits."""

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: np.ndarray | slice) -> "Pathway":
        """The requests selected by indices, a mask or a slice."""
        return Pathway(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def concat(cls, parts: Sequence["Pathway"]) -> "Pathway":
        """The requests of all ``parts``; their lengths L must agree."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    @classmethod
    def empty(cls, batch: int, length: int) -> "Pathway":
        """``batch`` requests without events."""
        shape = (batch, length)
        return cls(
            item=np.full(shape, -1, np.int32),
            age_s=np.zeros(shape, np.float32),
            play_ms=np.zeros(shape, np.float32),
            duration_ms=np.zeros(shape, np.float32),
            labels=np.zeros(shape, np.int32),
        )


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything the model knows about B requests before it generates."""

    static: np.ndarray
    """int64 [B, F], hashed user attributes; 0 is absent."""
    short: Pathway
    positive: Pathway
    lifelong: Pathway

    def __len__(self) -> int:
        return len(self.static)

    def take(self, rows: np.ndarray | slice) -> "Context":
        """The requests selected by indices, a mask or a slice."""
        return Context(
            static=self.static[rows],
            short=self.short.take(rows),
            positive=self.positive.take(rows),
            lifelong=self.lifelong.take(rows),
        )

    @classmethod
    def concat(cls, parts: Sequence["Context"]) -> "Context":
        """The requests of all ``parts``, in order."""
        return cls(
            static=np.concatenate([part.static for part in parts]),
            short=Pathway.concat([part.short for part in parts]),
            positive=Pathway.concat([part.positive for part in parts]),
            lifelong=Pathway.concat([part.lifelong for part in parts]),
        )


def compact(pathway: Pathway) -> Pathway:
    """``pathway`` with every entry of an unknown item (-1) cleared and the rest moved right, order kept."""
    known = pathway.item >= 0
    order = np.argsort(known, axis=1, kind="stable")
    kept = np.take_along_axis(known, order, axis=1)

    def move(values: np.ndarray, padding: int) -> np.ndarray:
        return np.where(kept, np.take_along_axis(values, order, axis=1), values.dtype.type(padding))

    return Pathway(
        item=move(pathway.item, -1),
        age_s=move(pathway.age_s, 0),
        play_ms=move(pathway.play_ms, 0),
        duration_ms=move(pathway.duration_ms, 0),
        labels=move(pathway.labels, 0),
    )


def pathway_from_events(
    events: Window, counts: np.ndarray, times_ms: np.ndarray, item_index: pd.Index, limit: int
) -> Pathway:
    """Pathway [B, limit] of B requests whose windows stand one after the other in ``events``, ``counts`` [B] rows each.

    Only events strictly earlier than ``times_ms`` [B] enter.
    """
    times_ms, batch = np.asarray(times_ms, np.int64), len(counts)
    pathway = Pathway.empty(batch, limit)
    if len(events) == 0:
        return pathway
    rows = np.repeat(np.arange(batch), counts)
    earlier = events.times < times_ms[rows]
    if not earlier.all():
        events, rows = events.take(earlier), rows[earlier]
    ends = np.cumsum(np.bincount(rows, minlength=batch))
    columns = np.arange(len(rows)) - ends[rows] + limit  # a request's newest event stands in the last column
    recent = columns >= 0
    if not recent.all():
        events, rows, columns = events.take(recent), rows[recent], columns[recent]
    item = item_index.get_indexer(pd.Index(events.item_ids, dtype=object))
    pathway.item[rows, columns] = item
    pathway.age_s[rows, columns] = (times_ms[rows] - events.times) / 1000
    pathway.play_ms[rows, columns] = events.play_ms
    pathway.duration_ms[rows, columns] = events.duration_ms
    pathway.labels[rows, columns] = events.labels
    return pathway if (item >= 0).all() else compact(pathway)


def pathway_from_windows(windows: Sequence[Window], times_ms: np.ndarray, item_index: pd.Index, limit: int) -> Pathway:
    """Pathway [B, limit] of one window per request; only events strictly earlier than ``times_ms`` [B] enter."""
    counts = np.array([len(window) for window in windows], np.int64)
    return pathway_from_events(concat_windows(windows), counts, times_ms, item_index, limit)


def from_windows(
    static: np.ndarray,
    short: Sequence[Window],
    positive: Sequence[Window],
    lifelong: Sequence[Window],
    times_ms: np.ndarray,
    item_index: pd.Index,
    limits: Limits,
) -> Context:
    """The context of B requests from one window per request and pathway; ``static`` is int64 [B, F]."""
    return Context(
        static=np.asarray(static, np.int64).reshape(len(short), STATIC_FIELDS),
        short=pathway_from_windows(short, times_ms, item_index, limits.short),
        positive=pathway_from_windows(positive, times_ms, item_index, limits.positive),
        lifelong=pathway_from_windows(lifelong, times_ms, item_index, limits.lifelong),
    )


def cold_context(batch: int, limits: Limits) -> Context:
    """The context of ``batch`` unknown users: no attributes, no events."""
    return Context(
        static=np.zeros((batch, STATIC_FIELDS), np.int64),
        short=Pathway.empty(batch, limits.short),
        positive=Pathway.empty(batch, limits.positive),
        lifelong=Pathway.empty(batch, limits.lifelong),
    )


def hash_static(attributes: Sequence[str] | None) -> np.ndarray:
    """int64 [F]: buckets 1..1023 of the first F ``name=value`` attributes in the order of their names; 0 is absent.

    The name is hashed too: a missing attribute shifts the slots of later ones, not their meaning.
    """
    buckets = np.zeros(STATIC_FIELDS, np.int64)
    for slot, attribute in enumerate(sorted(attributes or ())[:STATIC_FIELDS]):
        digest = int.from_bytes(blake2b(attribute.encode(), digest_size=8).digest(), "little")
        buckets[slot] = 1 + digest % (STATIC_BUCKETS - 1)
    return buckets
