"""Leave-one-out evaluation of a generative recommender: last item of a user = test, last but one = validation.

The protocol of the public sequential data sets: history = the user's items in order, ranking over all items through the
beam search with the history masked, hits counted per item. Training takes every earlier position as a target, each
with a context of its own, so nothing of a later impression leaks into an earlier one (OneRec-V2, arXiv 2508.20900,
2.2). Contexts hold the latest items in the short-term pathway; the other pathways are empty, because every
interaction of such data is positive. Left out: several targets a context, which these data do not have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.histories.context import STATIC_FIELDS, Context, Pathway
from features.schema import label_bits
from models.decoding.beam import beam_search
from models.decoding.trie import Trie
from models.generator import Generator
from models.objectives.ntp import ntp_loss
from models.pathways import ItemFeatures, to_tensors
from models.tokenizer.interactions import positive, times
from models.tokenizer.vocabulary import Catalogue

CUTOFFS = (5, 10)
LEAST = 3
"""Items of a user: one to learn from, one for validation, one to test."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A small run on a CPU; ``steps`` of ``batch`` targets each."""

    steps: int = 600
    batch: int = 256
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Histories:
    """The positive interactions of users with at least ``LEAST`` of them, user after user, each in order of time."""

    item: np.ndarray
    """int32 [N], rows of the catalogue."""
    time_ms: np.ndarray
    play_ms: np.ndarray
    duration_ms: np.ndarray
    labels: np.ndarray
    """int32 [N], feedback bits."""
    starts: np.ndarray
    """int64 [U + 1], where each user's interactions begin."""
    row: np.ndarray
    """int64 [N], rows of the exposures they come from."""
    limit: int = 20
    """Latest interactions that a context holds."""
    dates: bool = True
    """Whether contexts know how long ago things were, or their order alone."""

    @classmethod
    def from_exposures(
        cls,
        exposures: pa.Table,
        catalogue: Catalogue,
        *,
        limit: int = 20,
        users: int | None = None,
        seed: int = 0,
        shuffle_ties: bool = False,
    ) -> "Histories":
        """Of an EXPOSURE table; ``users`` keeps a random sample of so many. Raises ValueError when nobody is left.

        A user's events of one second keep the table's order, or with ``shuffle_ties`` get a random one: loaders put
        events of one time a millisecond apart, so that the log's order is not lost.
        """
        rows = catalogue.rows(exposures.column("item_id").to_pylist())
        kept = positive(exposures) & (rows >= 0)
        names, user = np.unique(np.asarray(exposures.column("user_id").to_pylist(), str), return_inverse=True)
        sizes = np.bincount(user[kept], minlength=len(names))
        eligible = np.flatnonzero(sizes >= LEAST)
        if not len(eligible):
            raise ValueError(f"none of {len(names)} users has {LEAST} positive interactions; leave-one-out needs them")
        if users is not None and users < len(eligible):
            eligible = np.random.default_rng(seed).choice(eligible, users, replace=False)
        kept &= np.isin(user, eligible)
        time = times(exposures) // 1000 * 1000 if shuffle_ties else times(exposures)
        order = np.flatnonzero(kept)
        tie = np.random.default_rng(seed).random(len(order)) if shuffle_ties else order
        order = order[np.lexsort((tie, time[order], user[order]))]
        return cls(
            item=rows[order],
            time_ms=time[order],
            play_ms=exposures.column("play_ms").to_numpy()[order].astype(np.float32),
            duration_ms=exposures.column("duration_ms").to_numpy()[order].astype(np.float32),
            labels=np.asarray(label_bits(exposures), np.int32)[order],
            starts=np.append(0, np.cumsum(sizes[np.sort(eligible)])),
            row=order,
            limit=limit,
        )

    def first(self, positions: np.ndarray) -> np.ndarray:
        """Position of the first interaction of the user of each of ``positions``."""
        return self.starts[np.searchsorted(self.starts, positions, side="right") - 1]

    def lengths(self, positions: np.ndarray) -> np.ndarray:
        """How many interactions the context of each of ``positions`` holds."""
        return np.minimum(positions - self.first(positions), self.limit)

    def training(self) -> np.ndarray:
        """Positions of all targets of training: neither a user's first item nor the last two."""
        place = np.arange(len(self.item)) - np.repeat(self.starts[:-1], np.diff(self.starts))
        left = np.repeat(self.starts[1:], np.diff(self.starts)) - np.arange(len(self.item))
        return np.flatnonzero((place >= 1) & (left > 2))

    def test(self) -> np.ndarray:
        """Position of each user's last item."""
        return self.starts[1:] - 1

    def contexts(self, positions: np.ndarray) -> Context:
        """What came before the interactions at ``positions``, newest last."""
        start = self.first(positions)
        index = positions[:, None] - np.arange(self.limit, 0, -1)
        there = index >= start[:, None]
        index = np.where(there, index, 0)
        age = (self.time_ms[positions][:, None] - self.time_ms[index]) / 1000
        short = Pathway(
            item=np.where(there, self.item[index], -1).astype(np.int32),
            age_s=np.where(there & self.dates, age, 0).astype(np.float32),
            play_ms=np.where(there, self.play_ms[index], 0).astype(np.float32),
            duration_ms=np.where(there, self.duration_ms[index], 0).astype(np.float32),
            labels=np.where(there, self.labels[index], 0).astype(np.int32),
        )
        nothing = Pathway.empty(len(positions), 0)
        static = np.zeros((len(positions), STATIC_FIELDS), np.int64)
        return Context(static=static, short=short, positive=nothing, lifelong=nothing)

    def seen(self, position: int) -> np.ndarray:
        """Items of the user before ``position``."""
        start = self.starts[np.searchsorted(self.starts, position, side="right") - 1]
        return self.item[start:position]


def train(
    model: Generator,
    histories: Histories,
    sids: np.ndarray,
    inputs: ItemFeatures,
    config: TrainingConfig,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Trains on every position of ``histories`` to name SIDs [items, levels]; the mean loss of the last tenth.

    ``inputs`` is how items enter the context: a Catalogue, or item ids (``ItemIds``).
    """
    positions, rng = histories.training(), np.random.default_rng(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    order, losses = np.empty(0, np.int64), []
    model.train()
    for step in range(config.steps):
        while len(order) < config.batch:
            order = np.concatenate([order, rng.permutation(positions)])
        chosen, order = order[: config.batch], order[config.batch :]
        targets = torch.from_numpy(sids[histories.item[chosen]].astype(np.int64))[:, None]
        logits = model(to_tensors(histories.contexts(chosen), inputs), targets)
        loss = ntp_loss(logits, targets, torch.ones(targets.shape[:2]), model.level_loss)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress is not None and step % 50 == 49:
            progress(step + 1, float(np.mean(losses[-50:])))
    return float(np.mean(losses[-max(config.steps // 10, 1) :]))


def _rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return float(0.1 + 0.9 * (1 + np.cos(np.pi * min(done, 1))) / 2)


@torch.no_grad()
def rank(
    model: Generator,
    histories: Histories,
    positions: np.ndarray,
    catalogue: Catalogue,
    inputs: ItemFeatures,
    *,
    count: int = 10,
    width: int = 50,
    batch: int = 128,
) -> np.ndarray:
    """Item rows int32 [len(positions), count], best first, -1 where the beams ran out; the user's history is masked.

    Items of one SID stand in order of popularity.
    """
    trie = Trie.from_sids(catalogue.sids)
    model.eval()
    result = np.full((len(positions), count), -1, np.int32)
    for first in range(0, len(positions), batch):
        part = positions[first : first + batch]
        kv = model.encode(to_tensors(histories.contexts(part), inputs))
        beams = beam_search(model, kv, trie, width)
        leaves = torch.where(beams.valid, beams.leaf, -1).numpy()
        for row, position in enumerate(part):
            items = expand(trie, leaves[row], catalogue.popularity)
            items = items[~np.isin(items, histories.seen(int(position)))][:count]
            result[first + row, : len(items)] = items
    return result


def expand(trie: Trie, leaves: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Items of the leaves (-1 = none) in order, those of one leaf by popularity."""
    offsets: Tensor = trie.item_offsets
    found = [trie.items[int(offsets[leaf]) : int(offsets[leaf + 1])].numpy() for leaf in leaves[leaves >= 0]]
    ordered = [items[np.argsort(-popularity[items], kind="stable")] for items in found]
    return np.concatenate(ordered) if ordered else np.empty(0, np.int64)


def places(ranked: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Place (0 = first) of the one target of each row; the largest int32 where it is not there."""
    hit = ranked == targets[:, None]
    return np.where(hit.any(1), hit.argmax(1), np.iinfo(np.int32).max)


def accuracy(ranked: np.ndarray, targets: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """``recall@k`` and ``ndcg@k`` of the one target of each row."""
    place = places(ranked, targets)
    result = {}
    for k in cutoffs:
        inside = place < k
        result[f"recall@{k}"] = float(inside.mean())
        result[f"ndcg@{k}"] = float((inside / np.log2(np.minimum(place, k) + 2)).mean())
    return result


def popularity_ranking(
    histories: Histories, positions: np.ndarray, occurrences: np.ndarray, count: int = 10
) -> np.ndarray:
    """The items with the most ``occurrences`` [items], int32 [len(positions), count], without those of the history."""
    commonest = np.argsort(-occurrences, kind="stable")
    result = np.full((len(positions), count), -1, np.int32)
    for row, position in enumerate(positions):
        seen = histories.seen(int(position))
        found = commonest[: count + len(seen)]
        found = found[~np.isin(found, seen)][:count]
        result[row, : len(found)] = found
    return result


class ItemIds:
    """Items that enter the context by their row instead of their SID; ``give_table`` fits the model to it."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.sids = np.full((len(catalogue), catalogue.levels), -1, np.int32)
        self.sids[:, 0] = np.arange(len(catalogue))
        self.author, self.tag = catalogue.author, catalogue.tag

    def give_table(self, model: Generator) -> None:
        """Replaces the first code's embeddings by one a item; the other levels read padding."""
        code = model.features.code
        embed = code[0].get_parameter("weight").shape[1]
        code[0] = torch.nn.Embedding(len(self.sids) + 1, embed, padding_idx=0)
        torch.nn.init.normal_(code[0].get_parameter("weight")[1:], std=0.1)
