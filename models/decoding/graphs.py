"""Beam search as CUDA graphs: on a GPU a search is hundreds of small kernels, and launching them costs most of it.

A graph is recorded for every shape that occurs and replayed with other contents, so shapes are made few: requests are
padded to a power of two, contexts to a multiple of ``CONTEXT``. Everything in a search but the last check has shapes
that depend on sizes alone (``models.decoding.beam``), which is what recording asks for. There was no GPU to run this
on: the tests replay with a stand-in, and it is off unless asked for. Left out: encoding contexts, sampling, sessions.

Shapes: B requests, S context tokens, G KV groups, D head width.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoding.beam import Beams, search_unchecked
from models.decoding.filter import LeafFilter
from models.decoding.trie import Trie
from models.generator import ContextKV, Generator

CONTEXT = 128
GRAPHS = 32
"""Shapes whose graphs are kept; each holds the memory of its search."""


class Recorded(Protocol):
    """Work that was recorded, and where its results are after every ``replay``."""

    results: Beams

    def replay(self) -> None:
        """Runs it again on what its inputs hold now."""


class CudaGraph:
    """``work`` recorded on the current device."""

    def __init__(self, work: Callable[[], Beams]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # what is allocated and chosen at the first run must not be recorded
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = work()

    def replay(self) -> None:
        """Runs it again on what its inputs hold now."""
        self._graph.replay()


class GraphSearch:
    """``beam_search`` by replay, for one model and one trie; use from one thread."""

    def __init__(
        self, model: Generator, trie: Trie, record: Callable[[Callable[[], Beams]], Recorded] = CudaGraph
    ) -> None:
        self._model, self._trie, self._record = model, trie, record
        self._known: OrderedDict[Any, tuple[list[Tensor], Recorded]] = OrderedDict()

    def __call__(self, kv: ContextKV, width: int, allowed: LeafFilter) -> Beams:
        """As ``beam_search``; the first search of a shape records it."""
        requests = len(kv)
        kv, allowed = padded(kv, allowed)
        inputs = _tensors(kv, allowed)
        key = width, tuple(tensor.shape for tensor in inputs)
        if key not in self._known:
            held = [tensor.clone() for tensor in inputs]
            own_kv, own_filter = _like(kv, held)
            recorded = self._record(lambda: search_unchecked(self._model, own_kv, self._trie, width, own_filter))
            self._known[key] = held, recorded
            if len(self._known) > GRAPHS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        held, recorded = self._known[key]
        for own, given in zip(held, inputs, strict=True):
            own.copy_(given)
        recorded.replay()
        found = recorded.results  # the next replay overwrites these
        parts = (found.sids, found.log_probs, found.leaf, found.valid)
        return Beams(*(part[:requests].clone() for part in parts)).checked()


def padded(kv: ContextKV, allowed: LeafFilter) -> tuple[ContextKV, LeafFilter]:
    """With requests up to a power of two (copies of the last one) and contexts up to a multiple of ``CONTEXT``."""
    requests, context = kv.mask.shape
    more = -context % CONTEXT
    last = torch.arange(1 << (requests - 1).bit_length(), device=kv.mask.device).clamp(max=requests - 1)

    def tokens(values: list[Tensor]) -> list[Tensor]:
        return [F.pad(value, (0, 0, 0, more))[last] for value in values]

    wide = ContextKV(
        keys=tokens(kv.keys),
        values=tokens(kv.values),
        mask=F.pad(kv.mask, (0, more))[last],
        bias=F.pad(kv.bias, (0, more), value=-torch.inf)[last],
        age=F.pad(kv.age, (0, more))[last],
    )
    return wide, LeafFilter([room[last] for room in allowed.room])


def _tensors(kv: ContextKV, allowed: LeafFilter) -> list[Tensor]:
    return [*kv.keys, *kv.values, kv.mask, kv.bias, kv.age, *allowed.room]


def _like(kv: ContextKV, tensors: list[Tensor]) -> tuple[ContextKV, LeafFilter]:
    """The inverse of ``_tensors`` for the layout of ``kv``."""
    layers = len(kv.keys)
    mask, bias, age = tensors[2 * layers : 2 * layers + 3]
    own = ContextKV(keys=tensors[:layers], values=tensors[layers : 2 * layers], mask=mask, bias=bias, age=age)
    return own, LeafFilter(tensors[2 * layers + 3 :])
