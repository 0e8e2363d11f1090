"""Roll-outs: what the policy would show, with the probability it gave to every token, and how old that policy is.

OneRec samples the groups of its reinforcement learning from the inference service, to which the trainer pushes its
weights every 1000 steps (technical report, arXiv 2506.13695, 3.3): samples always come from slightly older weights.
``Sampler`` is what the alignment loop asks; ``InProcessSampler`` keeps a copy of the weights here, as old as a server's
would be, ``models.training.rollout_server`` asks a real model server. Both draw from the same distribution. Left out:
lists of session models.

Shapes: B requests, G samples of each, L SID levels.
"""

import copy
import time
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from features.histories.context import Context
from models.decoding.beam import Beams, beam_search
from models.decoding.filter import LeafFilter, blocked_leaves
from models.decoding.sample import Draw, sample
from models.decoding.trie import Trie
from models.generator import Generator
from models.pathways import PATHWAYS, to_tensors
from models.tokenizer.vocabulary import Catalogue
from models.training.device import autocast
from models.training.parallel import whole

Mode = Literal["sample", "beam"]


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How groups are drawn; equal for every sampler."""

    constrained: bool = True
    """Only SIDs that name an item; beams always are. False: the policy's own distribution over all codes."""
    exclude_seen: bool = True
    """Constrained draws leave out the items of the user's context, as serving does."""
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Samples:
    """G draws of each of B requests; a search that found fewer pads with tokens -1."""

    tokens: Tensor
    """[B, G, L] long, on the CPU."""
    log_probs: Tensor
    """[B, G, L] fp32: the sampling weights' own log-softmax at temperature 1, before any mask; NaN = padding."""
    items: np.ndarray
    """int64 [B, G], row of the catalogue: the most popular item of the SID, -1 where it names none."""
    push: np.ndarray
    """int64 [B], number of the push whose weights drew the request's group."""
    staleness: np.ndarray
    """int64 [B], optimizer steps that the trainer has made since that push."""
    seconds: float
    """How long the trainer waited for them."""

    def take(self, chosen: Tensor) -> "Samples":
        """Only the draws ``chosen`` (long [B, k]) of each request."""
        every = chosen.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1])
        return replace(
            self,
            tokens=self.tokens.gather(1, every),
            log_probs=self.log_probs.gather(1, every),
            items=np.take_along_axis(self.items, chosen.numpy(), 1),
        )

    @property
    def valid(self) -> np.ndarray:
        """bool [B, G]: names an item."""
        return self.items >= 0

    @property
    def drawn(self) -> np.ndarray:
        """bool [B, G]: False on padding."""
        found: np.ndarray = (self.tokens[..., 0] >= 0).numpy()
        return found

    @property
    def legality(self) -> float:
        """Share of the draws that name an item; 1 of none."""
        count = int(self.drawn.sum())
        return float(self.valid.sum() / count) if count else 1.0


class Sampler(Protocol):
    """Draws from a policy that follows the trainer's at a distance."""

    @property
    def config(self) -> DrawConfig:
        """How it draws."""

    def advance(self, model: Generator, step: int) -> bool:
        """Tells that ``model`` has made ``step`` steps; pushes its weights when they are due, and says whether it did.

        Every worker calls it before each draw, ``step`` never falling.
        """

    def draw(self, context: Context, count: int, *, seed: int, mode: Mode = "sample") -> Samples:
        """``count`` independent draws, or the ``count`` best by beam search, for every request of ``context``.

        Raises RuntimeError before the first ``advance``, ValueError for a count below 1.
        """

    def close(self) -> None:
        """Lets go of files and connections."""


class Names:
    """Which item a SID names: the most popular one of its leaf."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue, self.trie = catalogue, Trie.from_sids(catalogue.sids)
        leaf = self.trie.leaf_of_item.numpy()
        order = np.lexsort((-catalogue.popularity, leaf))
        self._first = order[self.trie.item_offsets[:-1].numpy()]

    def rows(self, tokens: Tensor) -> np.ndarray:
        """int64 [...], the catalogue's row for each of ``tokens`` [..., L]; -1 where they name nothing."""
        leaf = self.trie.locate(tokens).numpy()
        return np.where(leaf >= 0, self._first[leaf], -1)


class InProcessSampler:
    """Draws from a copy of the trainer's weights that is renewed every ``every`` steps; 1 is on-policy.

    ``precision`` is best the trainer's: then its ratios begin at 1.
    """

    def __init__(
        self,
        model: Generator,
        catalogue: Catalogue,
        config: DrawConfig | None = None,
        *,
        every: int = 1,
        precision: str = "fp32",
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; weights are pushed every 1 step or more")
        self.config = config or DrawConfig()
        self.names = Names(catalogue)
        self._every, self._precision = every, precision
        self._device = next(model.parameters()).device
        self._trie = self.names.trie.to(self._device)
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._push, self._step, self._pushed_at = -1, 0, 0

    def advance(self, model: Generator, step: int) -> bool:
        """See ``Sampler``; the first call always pushes."""
        self._step = step
        if self._push >= 0 and step - self._pushed_at < self._every:
            return False
        self._model.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
        self._push, self._pushed_at = self._push + 1, step
        return True

    def draw(self, context: Context, count: int, *, seed: int, mode: Mode = "sample") -> Samples:
        """See ``Sampler``."""
        if self._push < 0:
            raise RuntimeError("nothing was pushed to the sampler yet; call advance(model, step) first")
        started = time.perf_counter()
        with autocast(self._precision, self._device):
            beams = self._search(context, count, seed, mode)
        tokens, log_probs = beams.sids.cpu(), beams.log_probs.float().cpu()
        return Samples(
            tokens=tokens,
            log_probs=log_probs.masked_fill(tokens < 0, torch.nan),
            items=self.names.rows(tokens),
            push=np.full(len(context), self._push),
            staleness=np.full(len(context), self._step - self._pushed_at),
            seconds=time.perf_counter() - started,
        )

    def close(self) -> None:
        """Nothing to let go of."""

    @torch.no_grad()
    def _search(self, context: Context, count: int, seed: int, mode: Mode) -> Beams:
        kv = self._model.encode(to_tensors(context, self.names.catalogue, self._device))
        constrained = self.config.constrained or mode == "beam"
        allowed = self._unseen(context) if constrained and self.config.exclude_seen else None
        if mode == "beam":
            return beam_search(self._model, kv, self._trie, count, allowed)
        trie = self._trie if constrained else None
        generator = torch.Generator(self._device).manual_seed(seed)
        draw = Draw(temperature=self.config.temperature)
        return sample(self._model, kv, trie, count, draw=draw, generator=generator, allowed=allowed)

    def _unseen(self, context: Context) -> LeafFilter:
        seen = np.concatenate([getattr(context, name).item for name in PATHWAYS], 1)
        request, place = np.nonzero(seen >= 0)
        leaf = self._trie.leaf_of_item.cpu().numpy()
        blocked = blocked_leaves(leaf, self._trie.leaves, request, seen[request, place], len(context))
        return LeafFilter.blocking(self._trie, torch.from_numpy(blocked).to(self._device))
