"""From a context to recommended items: encode once, search the trie of servable SIDs, expand SIDs to items.

Serving of OneRec-V2 (arXiv 2508.20900). Filters act inside the search: a SID all of whose items are seen or excluded
is never entered. A SID may name several items (there is no published rule for collisions); p(item | user) is taken as
p(SID | user) * p(item | SID), the second factor being the item's smoothed share of its SID's popularity, so nothing is
lost when SIDs are unique. ``log_probs`` are the model's own, per token, at temperature 1 and before any mask; in fp32
they equal the trainer's recomputation within 1e-4, under bf16 autocast within 0.15. Left out: reward selection,
session mode.

Shapes: B requests, W beams, L SID levels, n recommended items of one request.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from features.histories.context import Context, cold_context
from models.bundle import Bundle
from models.decoding.beam import Beams, beam_search
from models.decoding.sample import sample
from models.onerec_v2 import ContextKV
from models.pathways import PATHWAYS, to_tensors

MAX_CHUNK = 32
"""Requests per run of the model: bounds memory at the widest beam."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Items for one request, best first."""

    item_ids: list[str]
    scores: np.ndarray
    """float32 [n], log p(item | user)."""
    sids: np.ndarray
    """int32 [n, L]."""
    log_probs: np.ndarray
    """float32 [n, L], of each token of the SID."""

    def __len__(self) -> int:
        return len(self.item_ids)


class Recommender:
    """Recommends from one bundle; safe to call from several threads."""

    def __init__(self, bundle: Bundle, *, bf16: bool = False) -> None:
        self.bundle = bundle
        self._bf16 = bf16
        self._device = bundle.trie.sids.device
        leaf = bundle.trie.leaf_of_item.cpu().numpy()
        weight = bundle.catalogue.popularity.astype(np.float64) + 1.0
        self._log_share = np.log(weight / np.bincount(leaf, weight, bundle.trie.leaves)[leaf]).astype(np.float32)
        self._offsets = bundle.trie.item_offsets.cpu().numpy()
        self._items = np.lexsort((-self._log_share, leaf))  # grouped by leaf, most popular first

    def recommend(
        self,
        context: Context,
        *,
        num_items: int,
        beam_width: int,
        mode: str = "beam",
        temperature: float = 1.0,
        exclude: Sequence[Collection[str]] | None = None,
        exclude_seen: bool = True,
        seed: int | None = None,
    ) -> list[Recommendation]:
        """Up to ``num_items`` items for each of the B requests, fewer when nothing else may be served.

        ``mode`` "beam" takes the ``beam_width`` best SIDs, "sample" draws that many at ``temperature`` and keeps the
        order of drawing (so the items shown follow the policy). ``exclude`` holds item ids per request;
        ``exclude_seen`` adds those in the context. Raises ValueError for an unknown mode or lengths that differ.
        """
        if mode not in ("beam", "sample"):
            raise ValueError(f"mode is {mode!r}; expected 'beam' or 'sample'")
        exclude = exclude if exclude is not None else [()] * len(context)
        if len(exclude) != len(context):
            raise ValueError(f"exclude has {len(exclude)} rows for {len(context)} requests")
        generator = self._generator(seed)
        found: list[Recommendation] = []
        for rows in _chunks(len(context)):
            part = context.take(rows)
            allowed = self._allowed(part, exclude[rows], exclude_seen)
            with torch.inference_mode(), self._precision():
                beams = self._search(self._encode(part), allowed, mode, beam_width, temperature, generator)
            found += self._expand(beams, allowed, num_items, by_score=mode == "beam")
        return found

    def legality(self, contexts: Context, samples: int = 16, seed: int = 0) -> float:
        """Share of unconstrained samples at temperature 1 whose SID names an item: a health metric of the model."""
        legal = 0
        generator = self._generator(seed)
        for rows in _chunks(len(contexts)):
            with torch.inference_mode(), self._precision():
                drawn = sample(self.bundle.model, self._encode(contexts.take(rows)), None, samples, generator=generator)
                legal += int((self.bundle.trie.locate(drawn.sids) >= 0).sum())
        return legal / max(len(contexts) * samples, 1)

    def warm_up(self) -> None:
        """One cold request through everything; raises when the bundle's model cannot answer."""
        (answer,) = self.recommend(cold_context(1, self.bundle.limits), num_items=10, beam_width=32)
        if not len(answer) or not np.isfinite(answer.scores).all():
            raise ValueError(f"bundle {self.bundle.version} does not recommend: a cold request got {answer}")

    def _encode(self, context: Context) -> ContextKV:
        return self.bundle.model.encode(to_tensors(context, self.bundle.catalogue, self._device))

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def _generator(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self._device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator

    def _allowed(self, context: Context, exclude: Sequence[Collection[str]], exclude_seen: bool) -> np.ndarray:
        """bool [B, items]: what may be shown to each request."""
        allowed = np.ones((len(context), len(self.bundle.catalogue)), bool)
        if exclude_seen:
            for name in PATHWAYS:
                item = getattr(context, name).item
                request, slot = np.nonzero(item >= 0)
                allowed[request, item[request, slot]] = False
        request = np.repeat(np.arange(len(exclude)), [len(ids) for ids in exclude])
        item = self.bundle.catalogue.rows([each for ids in exclude for each in ids])
        allowed[request[item >= 0], item[item >= 0]] = False
        return allowed

    def _search(
        self,
        kv: ContextKV,
        allowed: np.ndarray,
        mode: str,
        width: int,
        temperature: float,
        generator: torch.Generator,
    ) -> Beams:
        model, trie = self.bundle.model, self.bundle.trie
        leaves = trie.allow_items(torch.from_numpy(allowed).to(self._device))
        if mode == "beam":
            return beam_search(model, kv, trie, width, leaves)
        return sample(model, kv, trie, width, temperature=temperature, generator=generator, allowed_leaves=leaves)

    def _expand(self, beams: Beams, allowed: np.ndarray, num_items: int, by_score: bool) -> list[Recommendation]:
        """The best allowed items of each request's SIDs."""
        leaf, sids = beams.leaf.cpu().numpy(), beams.sids.to(torch.int32).cpu().numpy()
        log_probs = beams.log_probs.float().cpu().numpy()
        request, beam = _first_of_each(leaf)
        start = self._offsets[leaf[request, beam]]
        counts = self._offsets[leaf[request, beam] + 1] - start
        source = np.repeat(np.arange(len(start)), counts)
        item = self._items[np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts) + start[source]]
        request, beam = request[source], beam[source]
        servable = allowed[request, item]
        rank = _rank_within(source, servable)
        request, beam, item, rank = request[servable], beam[servable], item[servable], rank[servable]
        scores = log_probs[request, beam].sum(-1) + self._log_share[item]
        # Beams compete by probability; samples keep their order, the first choice of every SID before any second one.
        order = np.lexsort((beam, -scores, request) if by_score else (beam, rank, request))
        bounds = np.searchsorted(request[order], np.arange(len(leaf) + 1))
        best = [order[low : min(high, low + num_items)] for low, high in pairwise(bounds)]
        ids = self.bundle.catalogue.item_ids
        return [
            Recommendation(
                item_ids=[ids[i] for i in item[rows]],
                scores=scores[rows].astype(np.float32),
                sids=sids[request[rows], beam[rows]],
                log_probs=log_probs[request[rows], beam[rows]],
            )
            for rows in best
        ]


def _chunks(total: int) -> Iterator[slice]:
    return (slice(start, start + MAX_CHUNK) for start in range(0, total, MAX_CHUNK))


def _first_of_each(leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(request, beam) of the first occurrence of every real leaf of a request [B, W], in order."""
    request, beam = np.nonzero(leaf >= 0)
    pairs = np.stack([request, leaf[request, beam]], 1)
    first = np.sort(np.unique(pairs, axis=0, return_index=True)[1])
    return request[first], beam[first]


def _rank_within(group: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """For rows sorted by ``group``: how many kept rows of the same group come before each."""
    before = np.cumsum(kept) - kept
    starts = np.searchsorted(group, group)
    return before - before[starts] if len(group) else before
