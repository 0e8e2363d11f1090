"""A run's frozen data as batches: contexts strictly before each request, its exposures as targets.

OneRec-V2 (arXiv 2508.20900, 2.2) trains on impressions in chronological order with the loss on the newest only: here a
request's exposures are the targets, at most ten to a sample, and share the context taken at its first event.
Short-term and positive pathways are folded from the log, static and lifelong ones are the point-in-time rows of
features.parquet. Left out: streaming a log that does not fit in memory.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from features.histories.context import Context, Pathway
from features.histories.history import History
from features.histories.lifelong import pathway_from_lists
from features.histories.requests import Requests, requests
from features.histories.windows import Limits, is_positive
from features.schema import EXPOSURE, conform, label_bits
from models.tokenizer.vocabulary import Catalogue

TARGETS = 10
DAY_MS = 86_400_000
HOLDOUT_SHARE = 0.4
HOLDOUT_SEED = 0
CHUNK = 8192
OWN = "onerec"
FOREIGN_REQUESTS = 30
"""From so many requests of other policies on, our own are not held out."""


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
    times = exposures.column("event_time").cast(pa.int64()).to_numpy()
    return int(times.max()) - DAY_MS + 1 if len(times) else 0


def split_holdout(exposures: pa.Table, *, users_share: float = HOLDOUT_SHARE, seed: int = HOLDOUT_SEED) -> np.ndarray:
    """bool [N]: exposures of requests that began in the last 24 hours, of the users a hash chooses.

    Only requests that another policy than ours answered, when there are enough: on what it chose itself a model looks
    better than any other, and the model in production better than its successor.
    """
    if not 0 <= users_share <= 1:
        raise ValueError(f"users_share is {users_share}; it must lie in [0, 1]")
    grouped = requests(exposures)
    users, names = pd.factorize(grouped.user_ids)
    chosen = np.array([_hash(name, seed) < users_share for name in names], bool)
    held = chosen[users] & (grouped.times_ms >= newest_day(exposures)) if len(names) else np.empty(0, bool)
    source = exposures.column("source").to_pandas().to_numpy()[grouped.rows[grouped.offsets[:-1]]]
    foreign = held & (source != OWN)
    held = foreign if foreign.sum() >= FOREIGN_REQUESTS else held
    mask = np.zeros(exposures.num_rows, bool)
    mask[grouped.rows] = np.repeat(held, np.diff(grouped.offsets))
    return mask


def _hash(user: str, seed: int) -> float:
    """Stable and uniform in [0, 1)."""
    digest = blake2b(f"holdout\x1f{seed}\x1f{user}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@dataclass(frozen=True, kw_only=True, eq=False)
class RunData:
    """The tables of one run; ``features`` has one row per request that may be trained on."""

    exposures: pa.Table
    items: pa.Table
    users: pa.Table
    features: pa.Table

    @classmethod
    def load(cls, folder: Path) -> "RunData":
        """Reads exposures, items, users and features.parquet; raises FileNotFoundError naming what is missing."""
        names = ("exposures", "items", "users", "features")
        missing = [name for name in names if not (folder / f"{name}.parquet").exists()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(f'{name}.parquet' for name in missing)}; prepare the run's data first"
            )
        tables = {name: pq.read_table(folder / f"{name}.parquet") for name in names}
        tables["exposures"] = conform(tables["exposures"], EXPOSURE)
        return cls(**tables)

    @cached_property
    def times_ms(self) -> np.ndarray:
        """int64 [N], event times of the exposures."""
        times: np.ndarray = self.exposures.column("event_time").cast(pa.int64()).to_numpy()
        return times

    @cached_property
    def held_out(self) -> np.ndarray:
        """bool [N]: exposures kept for evaluation, never targets of training."""
        return split_holdout(self.exposures)

    def column(self, name: str) -> np.ndarray:
        """One column of the exposures; strings as objects."""
        values: np.ndarray = self.exposures.column(name).to_pandas().to_numpy()
        return values

    def positive(self) -> np.ndarray:
        """bool [N]: exposures with high engagement."""
        labels = np.asarray(label_bits(self.exposures), np.int64)
        return is_positive(self.column("play_ms"), self.column("duration_ms"), labels)

    def before_newest_day(self) -> pa.Table:
        """Exposures before the last 24 hours: what a baseline may be fitted on."""
        return self.exposures.filter(pa.array(self.times_ms < newest_day(self.exposures)))

    def holdout(self, catalogue: Catalogue, limits: Limits | None = None) -> Holdout:
        """The held-out requests, ready to be evaluated."""
        contexts = Contexts(self, catalogue, limits or Limits())
        grouped = contexts.requests
        chosen = contexts.trainable[self.held_out[grouped.rows[grouped.offsets[contexts.trainable]]]]
        items, positive = self.column("item_id"), self.positive()
        rows = [grouped.rows_of(request) for request in chosen]
        seen = self._seen(grouped.user_ids[chosen], grouped.times_ms[chosen])
        return Holdout(
            context=contexts.of(chosen),
            user_ids=grouped.user_ids[chosen].tolist(),
            times_ms=grouped.times_ms[chosen],
            seen=seen,
            relevant=[set(items[r[positive[r]]]) - before for r, before in zip(rows, seen, strict=True)],
        )

    def _seen(self, user_ids: np.ndarray, times_ms: np.ndarray) -> list[set[str]]:
        """Items each user saw strictly before the time given."""
        wanted = pd.Index(np.unique(user_ids.astype(object)))
        users, items = self.column("user_id"), self.column("item_id")
        rows = np.flatnonzero(wanted.get_indexer(pd.Index(users)) >= 0)
        of_user = pd.Series(rows).groupby(users[rows]).indices
        result = []
        for user, time in zip(user_ids, times_ms, strict=True):
            own = rows[of_user[user]]
            result.append(set(items[own[self.times_ms[own] < time]]))
        return result


class Contexts:
    """Contexts of a run's requests, built for any of them at a time.

    ``requests`` are all requests of the log, ``trainable`` (int64, ascending) those that features.parquet covers.
    Raises ValueError when features.parquet names a request that the exposures do not have.
    """

    def __init__(self, data: RunData, catalogue: Catalogue, limits: Limits) -> None:
        self.limits = limits
        self.requests: Requests = requests(data.exposures)
        self.history = History.from_exposures(data.exposures, catalogue.index)
        table = data.features
        log = pd.MultiIndex.from_arrays([self.requests.user_ids, self.requests.request_ids])
        wanted = pd.MultiIndex.from_arrays([table.column(n).to_pandas() for n in ("user_id", "request_id")])
        found = log.get_indexer(wanted)
        if (found < 0).any():
            raise ValueError(
                f"features.parquet has {(found < 0).sum()} requests that exposures.parquet lacks, first "
                f"{wanted[int(np.argmax(found < 0))]}; both must come from one run's data"
            )
        order = np.argsort(found)
        self.trainable = found[order].astype(np.int64)
        table = table.take(pa.array(order))
        times = self.requests.times_ms[self.trainable]
        static = table.column("static").combine_chunks()
        self._static = static.flatten().to_numpy(zero_copy_only=False).astype(np.int64).reshape(len(table), -1)
        self._lifelong = _lifelong(table, times, catalogue, limits.lifelong)
        self._row = np.full(len(self.requests), -1)
        self._row[self.trainable] = np.arange(len(table))

    def of(self, chosen: np.ndarray) -> Context:
        """The contexts of the requests numbered ``chosen`` (all of them trainable)."""
        row = self._row[chosen]
        assert (row >= 0).all(), "a request without features has no context"
        users, times = self.requests.user_ids[chosen], self.requests.times_ms[chosen]
        short, positive = self.history.context_pathways(users, times, self.limits)
        return Context(static=self._static[row], short=short, positive=positive, lifelong=self._lifelong.take(row))


def _lifelong(table: pa.Table, times_ms: np.ndarray, catalogue: Catalogue, limit: int) -> Pathway:
    """Pathway [R, limit] of all rows, in chunks to bound the memory that strings take."""
    parts = [
        pathway_from_lists(table.slice(first, CHUNK), times_ms[first : first + CHUNK], catalogue.index, limit)
        for first in range(0, table.num_rows, CHUNK)
    ]
    return Pathway.concat(parts) if parts else Pathway.empty(0, limit)


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
        self.contexts = contexts
        self._items = catalogue.rows(data.column("item_id"))
        self._request, self._targets = _samples(contexts, select & (self._items >= 0))
        self._batch, self._window, self._seed = batch_requests, shuffle_window, seed
        self._rank, self._workers = rank, workers
        self._epoch, self._order = -1, np.empty(0, np.int64)
        if batch_requests < workers:
            raise ValueError(f"batch_requests is {batch_requests}; {workers} workers need at least one request each")

    def __len__(self) -> int:
        """Steps in an epoch; a last batch too small for every worker is left out."""
        full, rest = divmod(len(self._request), self._batch)
        return full + (rest >= self._workers and rest > 0)

    @property
    def examples(self) -> int:
        """Target exposures in an epoch."""
        return int((self._targets >= 0).sum())

    def rows(self, step: int) -> np.ndarray:
        """The samples of ``step`` that this worker trains on."""
        epoch, place = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[place * self._batch : (place + 1) * self._batch][self._rank :: self._workers]

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``, counted over epochs."""
        rows = self.rows(step)
        targets = self._targets[rows]
        targets = targets[:, : max(int((targets >= 0).sum(1).max(initial=1)), 1)]
        items = np.where(targets >= 0, self._items[targets], -1).astype(np.int32)
        return Batch(context=self.contexts.of(self._request[rows]), items=items, exposures=targets)

    def _shuffled(self, epoch: int) -> np.ndarray:
        n = len(self._request)
        window = np.arange(n) // self._window
        return np.lexsort((np.random.default_rng((self._seed, epoch)).random(n), window))


def _samples(contexts: Contexts, select: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Request of each sample int64 [M], in order of time, and its exposure rows int64 [M, TARGETS], -1 padded."""
    grouped = contexts.requests
    request = np.repeat(np.arange(len(grouped)), np.diff(grouped.offsets))
    trainable = np.zeros(len(grouped), bool)
    trainable[contexts.trainable] = True
    keep = trainable[request] & select[grouped.rows]
    request, rows = request[keep], grouped.rows[keep]
    if not len(rows):
        return np.empty(0, np.int64), np.empty((0, TARGETS), np.int64)
    starts = np.flatnonzero(np.r_[True, request[1:] != request[:-1]])
    place = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
    first = place % TARGETS == 0
    sample = np.cumsum(first) - 1
    targets = np.full((int(sample[-1]) + 1, TARGETS), -1, np.int64)
    targets[sample, place % TARGETS] = rows
    return request[first], targets
