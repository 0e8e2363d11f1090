"""What a graph search does around the graph, with a stand-in for the graph: there is no GPU here."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import Bundle
from models.decoding.beam import Beams, NotFinite, beam_search
from models.decoding.filter import LeafFilter
from models.decoding.graphs import CONTEXT, GraphSearch, padded
from models.generator import ContextKV
from models.pathways import to_tensors
from models.serving.recommender import Recommender


class Again:
    """Runs the work again at every replay and writes over the first results, as a graph does."""

    made = 0

    def __init__(self, work: Callable[[], Beams]) -> None:
        Again.made += 1
        self._work, self.results = work, work()

    def replay(self) -> None:
        new = self._work()
        for name in ("sids", "log_probs", "leaf", "valid"):
            getattr(self.results, name).copy_(getattr(new, name))


@pytest.fixture(scope="module")
def bundle(write_bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(write_bundle(Path(tmp_path_factory.mktemp("bundle"))))


def asked(bundle: Bundle, requests: int, length: int, seed: int) -> tuple[ContextKV, LeafFilter]:
    rng = np.random.default_rng(seed)
    context = Recommender(bundle)._invented(requests, length)
    context.short.item[context.short.item >= 0] = rng.integers(
        0, len(bundle.catalogue), (context.short.item >= 0).sum()
    )
    allowed = torch.from_numpy(rng.random((requests, bundle.trie.leaves)) < 0.8)
    return bundle.model.encode(to_tensors(context, bundle.catalogue)), LeafFilter.from_bitmap(bundle.trie, allowed)


@torch.inference_mode()
def test_replayed_searches_are_searches(bundle: Bundle) -> None:
    search, Again.made = GraphSearch(bundle.model, bundle.trie, Again), 0
    kept: list[tuple[Beams, Beams]] = []
    for requests, length, width, seed in ((3, 9, 8, 0), (4, 18, 8, 1), (3, 9, 8, 2), (5, 3, 8, 3), (3, 9, 4, 4)):
        kv, allowed = asked(bundle, requests, length, seed)
        expected = beam_search(bundle.model, kv, bundle.trie, width, allowed)
        kept.append((search(kv, width, allowed), expected))
    assert Again.made == 3  # 4 requests, 8 requests, another width
    for found, expected in kept:  # also the first ones, after later replays
        assert torch.equal(found.leaf, expected.leaf)
        assert torch.equal(found.sids, expected.sids)
        assert torch.equal(found.valid, expected.valid)
        torch.testing.assert_close(found.log_probs, expected.log_probs)


@torch.inference_mode()
def test_padding_and_what_is_not_finite(bundle: Bundle) -> None:
    kv, allowed = asked(bundle, 5, 18, 0)
    wide, rooms = padded(kv, allowed)
    assert wide.mask.shape == (8, CONTEXT)
    assert len(rooms) == 8
    assert int(wide.mask[:5].sum()) == int(kv.mask.sum())
    kv.keys[0][2] = float("nan")
    with pytest.raises(NotFinite, match="1 of 5"):
        GraphSearch(bundle.model, bundle.trie, Again)(kv, 8, allowed)
