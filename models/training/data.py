"""A run's frozen data as batches: contexts strictly before each request, its exposures as targets.

OneRec-V2 (arXiv 2508.20900, 2.2) trains on impressions in chronological order with the loss on the newest only: here a
request's exposures are the targets, at most ten to a sample, and share the context taken at its first event. Sequences
and the request index are memory-mapped (``features.histories.sequences``): what stays in memory is a few integers a
request, the tables of exposures and items are read when somebody asks for them. Left out: shuffling across windows.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.histories.context import Context
from features.histories.requests import Requests, requests
from features.histories.sequences import Sequences
from features.histories.windows import Limits, is_positive, spans
from features.schema import EXPOSURE, FLAGS, conform, label_bits
from models.tokenizer.vocabulary import Catalogue

TARGETS = 10
DAY_MS = 86_400_000
HOLDOUT_SHARE = 0.4
HOLDOUT_SEED = 0
OWN = "onerec"
FOREIGN_REQUESTS = 30
"""From so many requests of other policies that can be judged on, our own are not held out."""

_TABLES = ("exposures", "items", "users")
_MAPPED = ("play_ms", "duration_ms")


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """R held-out requests: contexts strictly before each, what was seen before, and the items engaged with."""

    context: Context
    user_ids: list[str]
    times_ms: np.ndarray
    """int64 [R]"""
    seen: list[set[str]]
    relevant: list[set[str]]
    """Engaged with in the request and not seen before: what a recommender that repeats nothing can still hit."""

    def __len__(self) -> int:
        return len(self.user_ids)


def newest_day(exposures: pa.Table) -> int:
    """Start (UTC ms) of the last 24 hours of the log."""
    return _newest_day(exposures.column("event_time").cast(pa.int64()).to_numpy())


def split_holdout(exposures: pa.Table, *, users_share: float = HOLDOUT_SHARE, seed: int = HOLDOUT_SEED) -> np.ndarray:
    """bool [N]: exposures of requests that began in the last 24 hours, of the users a hash chooses.

    Only requests that another policy than ours answered, when there are enough, if need be of more users than
    ``users_share``: on what it chose itself a model looks better than any other, and the model in production better
    than its successor.
    """
    play, duration = (exposures.column(name).to_numpy() for name in ("play_ms", "duration_ms"))
    positive = is_positive(play, duration, np.asarray(label_bits(exposures), np.int64))
    user, item = (exposures.column(name).to_pandas() for name in ("user_id", "item_id"))
    new = _first_views(user, item, exposures.column("event_time").cast(pa.int64()).to_numpy())
    marks = _Marks(foreign=_foreign(exposures), relevant=positive & new)
    return _held_out(requests(exposures), newest_day(exposures), marks, users_share=users_share, seed=seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Marks:
    """bool [N] each: exposures that another policy than ours chose, and those that make a request worth judging."""

    foreign: np.ndarray
    relevant: np.ndarray
    """Engaged with, and never seen before (``Holdout.relevant``)."""


def _first_views(user: Any, item: Any, times_ms: np.ndarray) -> np.ndarray:
    """bool [N]: the exposures that were the user's first of their item."""
    views = pd.DataFrame({"user": user, "item": item}).iloc[np.argsort(times_ms, kind="stable")]
    first: np.ndarray = (~views.duplicated()).sort_index().to_numpy()
    return first


def _foreign(exposures: pa.Table) -> np.ndarray:
    """``_Marks.foreign`` of a table with the column ``source``."""
    foreign: np.ndarray = pc.not_equal(exposures.column("source"), OWN).to_numpy()
    return foreign


def _newest_day(times_ms: np.ndarray) -> int:
    return int(times_ms.max()) - DAY_MS + 1 if len(times_ms) else 0


def _held_out(
    grouped: Requests, newest: int, marks: _Marks, *, users_share: float = HOLDOUT_SHARE, seed: int = HOLDOUT_SEED
) -> np.ndarray:
    """``split_holdout`` of requests."""
    if not 0 <= users_share <= 1:
        raise ValueError(f"users_share is {users_share}; it must lie in [0, 1]")
    mask = np.zeros(len(marks.foreign), bool)
    recent = grouped.times_ms >= newest
    if not recent.any() or not users_share:
        return mask
    asked, place = np.unique(grouped.user[recent], return_inverse=True)
    drawn = np.ones(len(grouped))
    drawn[recent] = np.array([hashed(name, seed) for name in grouped.users.take(pa.array(asked)).to_pylist()])[place]
    held = recent & (drawn < users_share)
    others = recent & marks.foreign[grouped.rows[grouped.offsets[:-1]]]
    judged = others & np.logical_or.reduceat(marks.relevant[grouped.rows], grouped.offsets[:-1])
    if judged.sum() >= FOREIGN_REQUESTS:
        enough = np.sort(drawn[judged])[FOREIGN_REQUESTS - 1]
        held = others & ((drawn < users_share) | (drawn <= enough))
    mask[grouped.rows] = np.repeat(held, np.diff(grouped.offsets))
    return mask


def hashed(user: str, seed: int) -> float:
    """Stable and uniform in [0, 1), another number for every seed."""
    digest = blake2b(f"holdout\x1f{seed}\x1f{user}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@dataclass(frozen=True, kw_only=True, eq=False)
class RunData:
    """The data of one run; rows of N exposures are the same in ``sequences`` and in the table ``exposures``."""

    folder: Path
    sequences: Sequences

    @classmethod
    def load(cls, folder: Path) -> "RunData":
        """Opens what the data stage wrote; raises FileNotFoundError naming what is missing."""
        missing = [f"{name}.parquet" for name in _TABLES if not (folder / f"{name}.parquet").exists()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; prepare the run's data first")
        sequences = Sequences(folder / "sequences")
        rows = pq.read_metadata(folder / "exposures.parquet").num_rows
        if rows != len(sequences):
            raise ValueError(
                f"{folder} has {len(sequences)} events in sequences/ and {rows} rows in exposures.parquet; both must "
                "come from one run's data"
            )
        return cls(folder=folder, sequences=sequences)

    def __len__(self) -> int:
        """How many exposures there are."""
        return len(self.sequences)

    @cached_property
    def exposures(self) -> pa.Table:
        """The whole table (EXPOSURE): read it where rows are few, and columns where they are enough."""
        return conform(pq.read_table(self.folder / "exposures.parquet"), EXPOSURE)

    @cached_property
    def items(self) -> pa.Table:
        """The catalogue (ITEM) when the data was frozen."""
        return pq.read_table(self.folder / "items.parquet")

    @cached_property
    def users(self) -> pa.Table:
        """All users (USER)."""
        return pq.read_table(self.folder / "users.parquet")

    @property
    def times_ms(self) -> np.ndarray:
        """int64 [N], event times of the exposures."""
        return self.sequences.events["time_ms"]

    @cached_property
    def held_out(self) -> np.ndarray:
        """bool [N]: exposures kept for evaluation, never targets of training."""
        source = pq.read_table(self.folder / "exposures.parquet", columns=["source"])
        events = self.sequences.events
        new = _first_views(events["user"], events["item"], self.times_ms)
        marks = _Marks(foreign=_foreign(source), relevant=self.positive() & new)
        return _held_out(self.sequences.requests, _newest_day(self.times_ms), marks)

    def column(self, name: str) -> np.ndarray:
        """One column of the exposures; strings as objects, play times and durations mapped."""
        if name in _MAPPED:
            return self.sequences.events[name]
        if name in FLAGS:
            flags: np.ndarray = (self.sequences.events["labels"] >> FLAGS.index(name)) & 1 != 0
            return flags
        table = pq.read_table(self.folder / "exposures.parquet", columns=[name])
        values: np.ndarray = table.column(name).to_pandas().to_numpy()
        return values

    def positive(self) -> np.ndarray:
        """bool [N]: exposures with high engagement."""
        events = self.sequences.events
        return is_positive(events["play_ms"], events["duration_ms"], events["labels"])

    def watched_seconds(self) -> np.ndarray:
        """float32 [N]: play time; a row of a log without play times (duration 0) is 1 s when positive, else 0."""
        played = (self.column("play_ms") / 1000).astype(np.float32)
        return np.where(self.column("duration_ms") > 0, played, self.positive().astype(np.float32))

    def before_newest_day(self) -> pa.Table:
        """Exposures before the last 24 hours: what a baseline may be fitted on."""
        return self.exposures.filter(pa.array(self.times_ms < _newest_day(self.times_ms)))

    def holdout(
        self, catalogue: Catalogue, limits: Limits | None = None, held_out: np.ndarray | None = None
    ) -> Holdout:
        """The held-out requests, ready to be evaluated: those of ``held_out`` (bool [N]), when others are wanted."""
        contexts = Contexts(self, catalogue, limits or Limits())
        grouped, held_out = contexts.requests, self.held_out if held_out is None else held_out
        chosen = contexts.trainable[held_out[grouped.rows[grouped.offsets[contexts.trainable]]]]
        items, positive = self.column("item_id"), self.positive()
        rows = [grouped.rows_of(request) for request in chosen]
        seen = self._seen(grouped.user[chosen], grouped.times_ms[chosen], items)
        return Holdout(
            context=contexts.of(chosen),
            user_ids=grouped.users.take(pa.array(grouped.user[chosen])).to_pylist(),
            times_ms=grouped.times_ms[chosen],
            seen=seen,
            relevant=[set(items[r[positive[r]]]) - before for r, before in zip(rows, seen, strict=True)],
        )

    def _seen(self, user: np.ndarray, times_ms: np.ndarray, items: np.ndarray) -> list[set[str]]:
        """Items each user (a row of the sequences) saw strictly before the time given."""
        events = self.sequences.events
        start, end = (np.searchsorted(events["user"], user, side) for side in ("left", "right"))
        return [
            set(items[first : first + np.searchsorted(events["time_ms"][first:last], time)])
            for first, last, time in zip(start, end, times_ms, strict=True)
        ]


class Contexts:
    """Contexts of a run's requests, built for any of them at a time.

    ``requests`` are all requests of the log, ``trainable`` (int64, ascending) those that have point-in-time features.
    """

    def __init__(self, data: RunData, catalogue: Catalogue, limits: Limits) -> None:
        self.limits, self.catalogue = limits, catalogue
        self.requests: Requests = data.sequences.requests
        self.trainable = data.sequences.trainable
        self._sequences = data.sequences
        self.item_rows = catalogue.rows(data.items.column("item_id").to_pylist()).astype(np.int32)
        """int32, the catalogue's row of each of the run's items, -1 unknown."""

    def of(self, chosen: np.ndarray) -> Context:
        """The contexts of the requests numbered ``chosen`` (all of them trainable)."""
        return Context(
            static=self._sequences.static(chosen),
            short=self._sequences.short(chosen, self.item_rows, self.limits.short),
            positive=self._sequences.positive(chosen, self.item_rows, self.limits.positive),
            lifelong=self._sequences.lifelong(chosen, self.item_rows, self.limits.lifelong),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B requests with up to T targets each."""

    context: Context
    items: np.ndarray
    """int32 [B, T], rows of the catalogue; -1 is padding."""
    exposures: np.ndarray
    """int64 [B, T], rows of the run's exposures; -1 is padding."""


class Batches:
    """Batches by step number: chronological, shuffled inside windows, anew (and deterministically) each epoch.

    A sample is a request with up to ``TARGETS`` of its exposures where ``select`` (bool [N]) holds and the item is in
    the catalogue; longer requests make several. With ``workers`` each step's requests are dealt out by rank.
    """

    def __init__(
        self,
        data: RunData,
        contexts: Contexts,
        catalogue: Catalogue,
        select: np.ndarray,
        *,
        batch_requests: int,
        shuffle_window: int = 1,
        seed: int = 0,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        if contexts.catalogue is not catalogue:
            raise ValueError("the contexts were made for another catalogue; build both from the same one")
        self.contexts = contexts
        item = data.sequences.events["item"]
        self._items = np.where(item >= 0, contexts.item_rows[item], -1) if len(contexts.item_rows) else item
        self._samples = _Samples.of(contexts, select & (self._items >= 0))
        self._batch, self._window, self._seed = batch_requests, shuffle_window, seed
        self._rank, self._workers = rank, workers
        self._epoch, self._order = -1, np.empty(0, np.int64)
        if batch_requests < workers:
            raise ValueError(f"batch_requests is {batch_requests}; {workers} workers need at least one request each")

    def __len__(self) -> int:
        """Steps in an epoch; a last batch too small for every worker is left out."""
        full, rest = divmod(len(self._samples.request), self._batch)
        return full + (rest >= self._workers and rest > 0)

    @property
    def examples(self) -> int:
        """Target exposures in an epoch."""
        return len(self._samples.rows)

    def rows(self, step: int) -> np.ndarray:
        """The samples of ``step`` that this worker trains on."""
        epoch, place = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[place * self._batch : (place + 1) * self._batch][self._rank :: self._workers]

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``, counted over epochs."""
        rows = self.rows(step)
        targets = self._samples.targets(rows)
        items = np.where(targets >= 0, self._items[targets], -1).astype(np.int32)
        return Batch(context=self.contexts.of(self._samples.request[rows]), items=items, exposures=targets)

    def _shuffled(self, epoch: int) -> np.ndarray:
        n = len(self._samples.request)
        window = np.arange(n) // self._window
        return np.lexsort((np.random.default_rng((self._seed, epoch)).random(n), window))


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """M samples in order of time: each a request and a slice of at most TARGETS of the selected exposures."""

    request: np.ndarray
    """int64 [M]"""
    start: np.ndarray
    """int64 [M + 1], slices of ``rows``."""
    rows: np.ndarray
    """int64, the selected exposures by request."""

    @classmethod
    def of(cls, contexts: Contexts, select: np.ndarray) -> "_Samples":
        grouped = contexts.requests
        trainable = np.zeros(len(grouped), bool)
        trainable[contexts.trainable] = True
        keep = np.repeat(trainable, np.diff(grouped.offsets)) & select[grouped.rows]
        counts = np.diff(np.r_[0, np.cumsum(keep)][grouped.offsets])
        pieces = -(-counts // TARGETS)  # the ceiling
        request = np.repeat(np.arange(len(grouped)), pieces)
        place = spans(np.zeros(len(pieces), np.int64), pieces)
        first = (np.cumsum(counts) - counts)[request] + place * TARGETS
        rows = grouped.rows[keep]
        return cls(request=request, start=np.r_[first, len(rows)], rows=rows)

    def targets(self, samples: np.ndarray) -> np.ndarray:
        """int64 [B, T], the exposures of each sample, -1 padded to the longest of them (at least 1)."""
        first, count = self.start[samples], self.start[samples + 1] - self.start[samples]
        place = np.arange(max(int(count.max(initial=1)), 1))
        inside = place < count[:, None]
        return np.where(inside, self.rows[np.where(inside, first[:, None] + place, 0)], -1)
