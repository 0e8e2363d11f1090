"""From a context to recommended items: encode once, search the trie of servable SIDs, expand SIDs to items.

Serving of OneRec-V2 (arXiv 2508.20900). Filters act inside the search: a SID all of whose items are seen or excluded
is never entered. A SID may name several items (there is no published rule for collisions); p(item | user) is taken as
p(SID | user) * p(item | SID), the second factor being the item's smoothed share of its SID's popularity, so nothing is
lost when SIDs are unique. ``log_probs`` are the model's own, per token, at temperature 1 and before any mask; in fp32
they equal the trainer's recomputation within 1e-4, under bf16 autocast within 0.15. A session model (O1, arXiv
2502.18965) also writes the list as a whole: there every token is given the items before it. Reward selection is in
``models.serving.selection``.

Shapes: B requests, W beams, L SID levels, n recommended items of one request.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from features.histories.context import Context, cold_context
from models.bundle import Bundle
from models.decoding.beam import Beams, beam_search
from models.decoding.filter import LeafFilter, blocked_leaves
from models.decoding.graphs import GraphSearch
from models.decoding.precision import for_serving
from models.decoding.sample import Draw, sample
from models.decoding.session import session_search
from models.generator import ContextKV
from models.onerec_session import OneRecSession
from models.pathways import PATHWAYS, to_tensors
from models.serving.selection import NO_REWARD, can_select, check_select, order_by_reward

MAX_CHUNK = 32
"""Requests per run of the model."""
RUN_BEAMS = 512
"""Beams of all requests of a run: more of them fall out of a CPU's caches, which costs time, and memory besides."""
MODES = ("beam", "sample", "session")


class Unwanted(RuntimeError):
    """Nobody waits for the recommendations any more."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Items for one request, best first."""

    item_ids: list[str]
    scores: np.ndarray
    """float32 [n], log p(item | user), in a session given the items before it too."""
    sids: np.ndarray
    """int32 [n, L]."""
    log_probs: np.ndarray
    """float32 [n, L], of each token of the SID."""

    def __len__(self) -> int:
        return len(self.item_ids)

    def take(self, rows: np.ndarray) -> "Recommendation":
        """The items at ``rows``, in that order."""
        return Recommendation(
            item_ids=[self.item_ids[row] for row in rows],
            scores=self.scores[rows],
            sids=self.sids[rows],
            log_probs=self.log_probs[rows],
        )


class Recommender:
    """Recommends from one bundle; safe to call from several threads."""

    def __init__(
        self, bundle: Bundle, *, bf16: bool = False, push: int | None = None, cuda_graphs: bool = False
    ) -> None:
        self.bundle = bundle
        self.push = push
        """How often a trainer pushed weights to this roll-out server; None for blessed weights."""
        self._bf16 = bf16
        self._model = for_serving(bundle.model) if bf16 else bundle.model
        self._device = bundle.trie.sids.device
        graphs = cuda_graphs and self._device.type == "cuda"
        self._graphs = GraphSearch(self._model, bundle.trie) if graphs else None
        taken_down = bundle.catalogue.rows(sorted(bundle.blocked))
        self._taken_down = taken_down[taken_down >= 0]
        self._leaf = leaf = bundle.trie.leaf_of_item.cpu().numpy()
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
        num_samples: int = 0,
        constrained: bool = True,
        select: str = "model",
        wanted: Callable[[], bool] = lambda: True,
    ) -> list[Recommendation]:
        """Up to ``num_items`` items for each of the B requests, fewer when nothing else may be served.

        ``mode`` "beam" takes the ``beam_width`` best SIDs, "sample" draws that many at ``temperature`` and keeps the
        order of drawing (so the items shown follow the policy); "session" takes the likeliest of ``beam_width`` whole
        lists, which are no longer than the model's sessions, in the model's order. ``num_samples`` (mode "sample")
        asks for that many independent draws instead, repeats kept, each with its likeliest item: the roll-outs of
        reinforcement learning; not ``constrained`` they may name no item (""). ``select`` "reward" (mode "beam") takes
        the items of highest P-Score among all that the beam found, "stay" those predicted to be watched longest, if the
        bundle's reward model can tell (see ``flags``).
        ``exclude`` holds item ids per request; ``exclude_seen`` adds those in the context. Raises ValueError for a
        mode that is unknown or not this model's, or lengths that differ, and Unwanted as soon as ``wanted`` says no.
        """
        self.check_mode(mode)
        check_select(select, mode)
        judged = select != "model" and can_select(self.bundle, select)
        exclude = exclude if exclude is not None else [()] * len(context)
        if len(exclude) != len(context):
            raise ValueError(f"exclude has {len(exclude)} rows for {len(context)} requests")
        generator = self._generator(seed)
        found: list[Recommendation] = []
        width = num_samples or beam_width
        for rows in _chunks(len(context), width):
            if not wanted():
                raise Unwanted(f"given up after {len(found)} of {len(context)} requests: nobody waits for them")
            part = context.take(rows)
            request, item = self._excluded(part, exclude[rows], exclude_seen)
            with torch.inference_mode(), self._precision():
                allowed = self._filter(request, item, len(part)) if constrained else None
                beams = self._search(self._encode(part), allowed, mode, width, temperature, generator)
            showable = np.ones((len(part), len(self.bundle.catalogue)), bool)
            showable[request, item] = False
            if num_samples:
                found += self._drawn(beams, showable)
            elif judged:
                candidates = self._expand(beams, showable, max(num_items, width), mode)
                found += self._best_judged(part, candidates, num_items, select)
            else:
                found += self._expand(beams, showable, num_items, mode)
        return found

    def flags(self, select: str) -> list[str]:
        """What answers selected so have to say: that the bundle had no reward model to select by."""
        return [] if can_select(self.bundle, select) else [NO_REWARD]

    def check_mode(self, mode: str) -> None:
        """Raises ValueError for an unknown mode, or sessions from a model that generates single items."""
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        if mode == "session" and not isinstance(self._model, OneRecSession):
            raise ValueError(
                f"mode is 'session', but bundle {self.bundle.version} holds a model of single items; "
                "use mode 'beam' or serve a session model"
            )

    def legality(self, contexts: Context, samples: int = 16, seed: int = 0) -> float:
        """Share of unconstrained samples at temperature 1 whose SID names an item: a health metric of the model."""
        legal = 0
        generator = self._generator(seed)
        for rows in _chunks(len(contexts), samples):
            with torch.inference_mode(), self._precision():
                drawn = sample(self._model, self._encode(contexts.take(rows)), None, samples, generator=generator)
                legal += int((self.bundle.trie.locate(drawn.sids) >= 0).sum())
        return legal / max(len(contexts) * samples, 1)

    def prove(self) -> None:
        """One cold request through everything; raises ValueError when the bundle's model cannot answer."""
        (answer,) = self.recommend(cold_context(1, self.bundle.limits), num_items=10, beam_width=32)
        if not len(answer) or not np.isfinite(answer.scores).all():
            raise ValueError(f"bundle {self.bundle.version} does not recommend: a cold request got {answer}")

    def warm_up(self, length: int) -> None:
        """One request of ``length`` behaviours, so that no caller pays for first times."""
        self.recommend(self._invented(1, length), num_items=10, beam_width=32, exclude_seen=False)

    def _invented(self, requests: int, length: int) -> Context:
        """Contexts of ``length`` behaviours, as far as the bundle's windows have room."""
        context = cold_context(requests, self.bundle.limits)
        for name in reversed(PATHWAYS):
            item = getattr(context, name).item
            taken = min(length, item.shape[1])
            item[:, item.shape[1] - taken :] = np.arange(taken) % len(self.bundle.catalogue)
            length -= taken
        return context

    def _encode(self, context: Context) -> ContextKV:
        return self._model.encode(to_tensors(context, self.bundle.catalogue, self._device))

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def _generator(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self._device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator

    def _excluded(
        self, context: Context, exclude: Sequence[Collection[str]], exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(request, item row) of everything that must not be shown; ids the catalogue does not know exclude nothing."""
        item = self.bundle.catalogue.rows([each for ids in exclude for each in ids])
        requests = [np.repeat(np.arange(len(exclude)), [len(ids) for ids in exclude])[item >= 0]]
        items = [item[item >= 0]]
        requests.append(np.repeat(np.arange(len(exclude)), len(self._taken_down)))
        items.append(np.tile(self._taken_down, len(exclude)))
        for name in PATHWAYS if exclude_seen else ():
            seen = getattr(context, name).item
            requests.append(np.nonzero(seen >= 0)[0])
            items.append(seen[seen >= 0])
        return np.concatenate(requests), np.concatenate(items)

    def _filter(self, request: np.ndarray, item: np.ndarray, requests: int) -> LeafFilter:
        trie = self.bundle.trie
        blocked = blocked_leaves(self._leaf, trie.leaves, request, item, requests)
        return LeafFilter.blocking(trie, torch.from_numpy(blocked).to(self._device))

    def _search(
        self,
        kv: ContextKV,
        allowed: LeafFilter | None,
        mode: str,
        width: int,
        temperature: float,
        generator: torch.Generator,
    ) -> Beams:
        model, trie = self._model, self.bundle.trie
        if allowed is None:
            return sample(model, kv, None, width, draw=Draw(temperature=temperature), generator=generator)
        if isinstance(model, OneRecSession) and mode == "session":
            return session_search(model, kv, trie, width, allowed).best()
        if mode == "beam":
            graphs = self._graphs
            return graphs(kv, width, allowed) if graphs else beam_search(model, kv, trie, width, allowed)
        return sample(model, kv, trie, width, draw=Draw(temperature=temperature), generator=generator, allowed=allowed)

    def _best_judged(
        self, context: Context, found: list[Recommendation], num_items: int, select: str
    ) -> list[Recommendation]:
        """The ``num_items`` of each request's candidates that the reward model judges best, in that order."""
        orders = order_by_reward(self.bundle, context, [answer.item_ids for answer in found], select)
        return [answer.take(order[:num_items]) for answer, order in zip(found, orders, strict=True)]

    def _drawn(self, beams: Beams, showable: np.ndarray) -> list[Recommendation]:
        """Every sample in drawing order with the likeliest ``showable`` item of its SID, "" for a SID without any."""
        leaf = self.bundle.trie.locate(beams.sids).cpu().numpy()
        sids, log_probs = beams.sids.to(torch.int32).cpu().numpy(), beams.log_probs.float().cpu().numpy()
        return [
            self._samples(leaf[row][kept], sids[row][kept], log_probs[row][kept], showable[row])
            for row, kept in enumerate(beams.valid.cpu().numpy())
        ]

    def _samples(
        self, leaf: np.ndarray, sids: np.ndarray, log_probs: np.ndarray, showable: np.ndarray
    ) -> Recommendation:
        item = np.full(len(leaf), -1)
        for each in np.unique(leaf[leaf >= 0]):
            candidates = self._items[self._offsets[each] : self._offsets[each + 1]]
            item[leaf == each] = next(iter(candidates[showable[candidates]]), -1)
        ids, share = self.bundle.catalogue.item_ids, np.where(item >= 0, self._log_share[item], 0.0)
        return Recommendation(
            item_ids=[ids[i] if i >= 0 else "" for i in item],
            scores=(log_probs.sum(-1) + share).astype(np.float32),
            sids=sids,
            log_probs=log_probs,
        )

    def _expand(self, beams: Beams, showable: np.ndarray, num_items: int, mode: str) -> list[Recommendation]:
        """The best ``showable`` (bool [B, items]) items of each request's SIDs; a session has one for each SID."""
        leaf, sids = beams.leaf.cpu().numpy(), beams.sids.to(torch.int32).cpu().numpy()
        log_probs = beams.log_probs.float().cpu().numpy()
        request, beam = _first_of_each(leaf)
        start = self._offsets[leaf[request, beam]]
        counts = self._offsets[leaf[request, beam] + 1] - start
        source = np.repeat(np.arange(len(start)), counts)
        item = self._items[np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts) + start[source]]
        request, beam = request[source], beam[source]
        servable = showable[request, item]
        rank = _rank_within(source, servable)
        request, beam, item, rank = request[servable], beam[servable], item[servable], rank[servable]
        scores = log_probs[request, beam].sum(-1) + self._log_share[item]
        # Beams compete by probability; samples keep their order, the first choice of every SID before any second one.
        order = np.lexsort((beam, -scores, request) if mode == "beam" else (beam, rank, request))
        bounds = np.searchsorted(request[order], np.arange(len(leaf) + 1))
        most = np.minimum(num_items, (leaf >= 0).sum(1) if mode == "session" else num_items)
        most = np.broadcast_to(most, len(leaf))
        best = [order[low : min(high, low + n)] for (low, high), n in zip(pairwise(bounds), most, strict=True)]
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


def _chunks(total: int, width: int) -> Iterator[slice]:
    step = max(1, min(MAX_CHUNK, RUN_BEAMS // max(width, 1)))
    return (slice(start, start + step) for start in range(0, total, step))


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
