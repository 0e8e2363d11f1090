import pytest
import torch
from drawn import shaken

from models.decoding.beam import Beams, beam_search
from models.decoding.select import item_log_probs, reordered, select
from models.decoding.trie import Trie
from models.generator import ContextKV
from models.onerec_v2 import OneRecV2, V2Config

KNOWN = torch.tensor([(0, 0, 0), (0, 0, 1), (0, 4, 1), (2, 2, 2), (3, 1, 0), (3, 1, 4)])


@pytest.fixture
def model() -> OneRecV2:
    torch.manual_seed(0)
    sizes = V2Config(codes=5, embed=8, d_model=16, heads=2, layers=2, head="tied", memory=True, item_head=True)
    made = OneRecV2(sizes)
    made.remember(KNOWN)
    return shaken(made)


@pytest.fixture
def kv(model: OneRecV2) -> ContextKV:
    keys, mask = torch.randn(2, 2, 4, model.config.d_head), torch.ones(2, 4, dtype=torch.bool)
    return ContextKV([keys], [keys], mask, torch.zeros(2, 4), torch.randn(2, 4))


def test_each_beam_gets_its_own_items_probability(model: OneRecV2, kv: ContextKV) -> None:
    beams = beam_search(model, kv, Trie.from_sids(KNOWN), 8)
    found = item_log_probs(model, kv, beams)
    assert torch.equal(found.isfinite(), beams.valid)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2))
    by_row = model.item_logits(kv).log_softmax(-1)
    leaves = torch.stack([code for code, _ in model.features.memory.leaves()], 1)  # type: ignore[union-attr]
    for row, sid in enumerate(leaves):
        place = (beams.sids == sid).all(-1)
        torch.testing.assert_close(found[place], by_row[:, row])


def test_weight_nought_keeps_the_order_and_a_large_one_follows_the_item_head(model: OneRecV2, kv: ContextKV) -> None:
    beams = beam_search(model, kv, Trie.from_sids(KNOWN), 8)
    assert select(model, kv, beams, 0.0) is beams
    chosen = select(model, kv, beams, 1e6)
    assert (item_log_probs(model, kv, chosen)[:, : len(KNOWN)].diff(dim=1) <= 0).all()
    assert chosen.valid[:, : len(KNOWN)].all()
    assert not chosen.valid[:, len(KNOWN) :].any()


def test_everything_of_a_beam_moves_together() -> None:
    sids = torch.arange(6).view(1, 3, 2)
    beams = Beams(sids, sids.float(), torch.tensor([[7, 8, 9]]), torch.tensor([[True, True, False]]))
    moved = reordered(beams, torch.tensor([[0.0, 1.0, 99.0]]))
    assert moved.leaf.tolist() == [[8, 7, 9]]
    assert moved.sids.tolist() == [[[2, 3], [0, 1], [4, 5]]]
    assert moved.log_probs[0, 0].tolist() == [2.0, 3.0]


def test_an_item_the_memory_does_not_know_comes_last(model: OneRecV2, kv: ContextKV) -> None:
    stranger = torch.cat([KNOWN, torch.tensor([[0, 0, 2]])])
    beams = beam_search(model, kv, Trie.from_sids(stranger), 8)
    unknown = (beams.sids == stranger[-1]).all(-1)
    assert (item_log_probs(model, kv, beams)[unknown] == -torch.inf).all()
