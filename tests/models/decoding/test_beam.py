from collections.abc import Callable

import numpy as np
import pytest
import torch

from models.decoding.beam import beam_search
from models.decoding.trie import Trie
from models.onerec_v2 import ContextKV, OneRecV2

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
    beams = beam_search(model, kv, trie, 100, allowed if filtered else None)
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
        assert beam_search(model, kv, trie, 1, only).leaf.item() == leaf
    nothing = beam_search(model, kv, trie, 4, torch.zeros(1, trie.leaves, dtype=torch.bool))
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


def test_wrong_filter_shape_is_refused(model: OneRecV2, random_kv: MakeKV) -> None:
    kv = random_kv(3)
    trie = Trie.from_sids(catalogue(10))
    with pytest.raises(ValueError, match="allowed_leaves has shape"):
        beam_search(model, kv, trie, 2, torch.ones(2, trie.leaves, dtype=torch.bool))
    with pytest.raises(ValueError, match="width is 0"):
        beam_search(model, kv, trie, 0)
