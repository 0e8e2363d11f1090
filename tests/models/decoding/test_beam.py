from collections.abc import Callable

import numpy as np
import pytest
import torch

from models.decoding.beam import NotFinite, beam_search
from models.decoding.filter import LeafFilter
from models.decoding.trie import Trie
from models.generator import ContextKV, DecoderState
from models.onerec_v2 import OneRecV2

MakeKV = Callable[[int], ContextKV]
Score = Callable[[ContextKV, torch.Tensor], torch.Tensor]


def catalogue(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 7, (count, 3))


@pytest.mark.parametrize("filtered", [False, True])
def test_wide_beam_equals_scoring_the_whole_catalogue(
    model: OneRecV2, random_kv: MakeKV, brute_force: Score, filtered: bool
) -> None:
    kv = random_kv(3)
    trie = Trie.from_sids(catalogue(80))
    allowed = torch.rand(3, trie.leaves, generator=torch.Generator().manual_seed(1)) < (0.3 if filtered else 2)
    exact = brute_force(kv, trie.sids)
    beams = beam_search(model, kv, trie, 100, LeafFilter.from_bitmap(trie, allowed) if filtered else None)
    total = exact.sum(-1).masked_fill(~allowed, -torch.inf)
    for b in range(3):
        count = int(allowed[b].sum())
        assert beams.valid[b].tolist() == [True] * count + [False] * (100 - count)
        torch.testing.assert_close(beams.scores[b, :count], total[b].sort(descending=True).values[:count])
        leaf = beams.leaf[b, :count]
        assert sorted(leaf.tolist()) == allowed[b].nonzero().flatten().tolist()
        assert (beams.sids[b, :count] == trie.sids[leaf]).all()
        torch.testing.assert_close(beams.log_probs[b, :count], exact[b, leaf], atol=1e-5, rtol=1e-4)
        assert (beams.sids[b, count:] == -1).all()
        assert (beams.leaf[b, count:] == -1).all()


def test_a_filtered_item_never_displaces_a_servable_one(model: OneRecV2, random_kv: MakeKV) -> None:
    """Width 1: whatever is filtered, the one beam must end in an allowed leaf."""
    kv = random_kv(1)
    trie = Trie.from_sids(catalogue(60))
    for leaf in range(trie.leaves):
        only = torch.zeros(1, trie.leaves, dtype=torch.bool)
        only[0, leaf] = True
        assert beam_search(model, kv, trie, 1, LeafFilter.from_bitmap(trie, only)).leaf.item() == leaf
    nothing = beam_search(model, kv, trie, 4, LeafFilter.from_bitmap(trie, torch.zeros(1, trie.leaves) > 0))
    assert not nothing.valid.any()
    assert nothing.log_probs.isinf().all()


def test_narrow_beams_are_sorted_legal_and_distinct(model: OneRecV2, random_kv: MakeKV, brute_force: Score) -> None:
    kv = random_kv(5)
    trie = Trie.from_sids(catalogue(200))
    beams = beam_search(model, kv, trie, 9)
    assert beams.valid.all()
    assert (beams.scores.diff(dim=1) <= 0).all()
    assert (trie.locate(beams.sids) == beams.leaf).all()
    assert all(len(set(row)) == 9 for row in beams.leaf.tolist())
    recomputed = brute_force(kv, trie.sids).gather(1, beams.leaf[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(beams.log_probs, recomputed, atol=1e-5, rtol=1e-4)


def test_a_free_search_finds_the_best_of_all_codes(model: OneRecV2, random_kv: MakeKV, brute_force: Score) -> None:
    kv, grid = random_kv(2), torch.cartesian_prod(*[torch.arange(7)] * 3)
    free = beam_search(model, kv, None, 343)
    torch.testing.assert_close(free.scores, brute_force(kv, grid).sum(-1).sort(descending=True).values)
    assert (free.leaf == -1).all()
    legal = beam_search(model, kv, Trie.from_sids(grid), 343)
    assert (free.sids == legal.sids).all()
    with pytest.raises(ValueError, match="needs a trie"):
        beam_search(model, kv, None, 2, LeafFilter([torch.ones(2, 7, dtype=torch.uint8)]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_beam_wider_than_the_trie_is_padded(
    model: OneRecV2, random_kv: MakeKV, brute_force: Score, count: int
) -> None:
    kv, trie = random_kv(2), Trie.from_sids(catalogue(count))
    beams = beam_search(model, kv, trie, 64)
    assert beams.leaf.shape == (2, 64)
    assert beams.valid.sum(1).tolist() == [count, count]
    assert beams.log_probs[:, count:].isinf().all()
    torch.testing.assert_close(beams.scores[:, :count], brute_force(kv, trie.sids).sum(-1).sort(descending=True).values)


def test_the_search_asks_the_model_once_a_level_and_for_all_requests_together(
    model: OneRecV2, random_kv: MakeKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    step = model.step

    def counted(kv: ContextKV, code: torch.Tensor | None, state: DecoderState | None) -> object:
        shapes.append(None if code is None else tuple(code.shape))
        return step(kv, code, state)

    monkeypatch.setattr(model, "step", counted)
    beam_search(model, random_kv(4), Trie.from_sids(catalogue(300)), 6)
    assert shapes == [None, (4, 6), (4, 6)]


def test_nan_is_refused_with_the_request(model: OneRecV2, random_kv: MakeKV) -> None:
    kv, trie = random_kv(3), Trie.from_sids(catalogue(40))
    kv.keys[0][1] = torch.nan
    with pytest.raises(NotFinite, match=r"1 of 3 requests \(first: row 1\).*last good bundle"):
        beam_search(model, kv, trie, 8)


def test_what_does_not_fit_together_is_refused(model: OneRecV2, random_kv: MakeKV) -> None:
    kv, trie = random_kv(3), Trie.from_sids(catalogue(10))
    with pytest.raises(ValueError, match="the filter is for 2 requests; there are 3"):
        beam_search(model, kv, trie, 2, LeafFilter.from_bitmap(trie, torch.ones(2, trie.leaves) > 0))
    with pytest.raises(ValueError, match="width is 0"):
        beam_search(model, kv, trie, 0)
    with pytest.raises(ValueError, match="codes up to 7, the model 3 levels of 7 codes"):
        beam_search(model, kv, Trie.from_sids(np.full((1, 3), 7)), 2)
    with pytest.raises(ValueError, match="the trie has 2 levels"):
        beam_search(model, kv, Trie.from_sids(np.ones((1, 2))), 2)
