import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decoding.beam import beam_search
from models.decoding.sample import sample
from models.decoding.trie import Trie
from models.onerec_v2 import ContextKV, OneRecV2


def catalogue(count: int, codes: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, codes, (count, 3))


@torch.no_grad()
def brute_force(model: OneRecV2, kv: ContextKV, trie: Trie) -> torch.Tensor:
    """[B, leaves, L] log-probabilities of every SID of the catalogue."""
    every = trie.sids.expand(len(kv), -1, -1)
    return model.score(kv, every).log_softmax(-1).gather(-1, every[..., None]).squeeze(-1)


@pytest.mark.parametrize("filtered", [False, True])
def test_wide_beam_equals_scoring_the_whole_catalogue(build_model, build_context, filtered) -> None:  # type: ignore[no-untyped-def]
    model = build_model()
    with torch.no_grad():
        kv = model.encode(build_context(model))
    trie = Trie.from_sids(catalogue(80))
    allowed = torch.rand(3, trie.leaves, generator=torch.Generator().manual_seed(1)) < (0.3 if filtered else 2)
    exact = brute_force(model, kv, trie)
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


def test_a_filtered_item_never_displaces_a_servable_one(build_model, build_context) -> None:  # type: ignore[no-untyped-def]
    """Width 1: whatever is filtered, the one beam must end in an allowed leaf."""
    model = build_model()
    with torch.no_grad():
        kv = model.encode(build_context(model, requests=1))
    trie = Trie.from_sids(catalogue(60))
    for leaf in range(trie.leaves):
        only = torch.zeros(1, trie.leaves, dtype=torch.bool)
        only[0, leaf] = True
        assert beam_search(model, kv, trie, 1, only).leaf.item() == leaf
    nothing = beam_search(model, kv, trie, 4, torch.zeros(1, trie.leaves, dtype=torch.bool))
    assert not nothing.valid.any()
    assert nothing.log_probs.isinf().all()


def test_narrow_beams_are_sorted_legal_and_distinct(build_model, build_context) -> None:  # type: ignore[no-untyped-def]
    model = build_model()
    with torch.no_grad():
        kv = model.encode(build_context(model, requests=5))
    trie = Trie.from_sids(catalogue(200))
    beams = beam_search(model, kv, trie, 9)
    assert beams.valid.all()
    assert (beams.scores.diff(dim=1) <= 0).all()
    assert (trie.locate(beams.sids) == beams.leaf).all()
    assert all(len(set(row)) == 9 for row in beams.leaf.tolist())
    recomputed = brute_force(model, kv, trie).gather(1, beams.leaf[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(beams.log_probs, recomputed, atol=1e-5, rtol=1e-4)


def test_wrong_filter_shape_is_refused(build_model, build_context) -> None:  # type: ignore[no-untyped-def]
    model = build_model()
    kv = model.encode(build_context(model))
    trie = Trie.from_sids(catalogue(10))
    with pytest.raises(ValueError, match="allowed_leaves has shape"):
        beam_search(model, kv, trie, 2, torch.ones(2, trie.leaves, dtype=torch.bool))
    with pytest.raises(ValueError, match="width is 0"):
        beam_search(model, kv, trie, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_trie_locates_exactly_its_items(sids, rng) -> None:  # type: ignore[no-untyped-def]
    trie = Trie.from_sids(np.array(sids))
    assert trie.leaves == len(set(sids))
    assert (trie.sids[trie.leaf_of_item] == torch.tensor(sids)).all()
    for leaf in range(trie.leaves):
        items = trie.items[trie.item_offsets[leaf] : trie.item_offsets[leaf + 1]]
        assert items.tolist() == [row for row, sid in enumerate(sids) if list(sid) == trie.sids[leaf].tolist()]
    grid = torch.cartesian_prod(*[torch.arange(6)] * 3)
    legal = torch.tensor([tuple(sid) in set(sids) for sid in grid.tolist()])
    assert ((trie.locate(grid) >= 0) == legal).all()
    allowed = torch.tensor([[rng.random() < 0.5 for _ in sids]])
    expected = [any(allowed[0, i] for i in (trie.leaf_of_item == leaf).nonzero()) for leaf in range(trie.leaves)]
    assert trie.allow_items(allowed)[0].tolist() == expected


def test_empty_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[n > 0, levels\]"):
        Trie.from_sids(np.zeros((0, 3)))


def test_samples_follow_the_model_inside_the_trie(build_model, build_context) -> None:  # type: ignore[no-untyped-def]
    model = build_model()
    with torch.no_grad():
        kv = model.encode(build_context(model, requests=1))
        first = model.step(kv, None, None)[0][0, 0].log_softmax(-1)
    trie = Trie.from_sids(catalogue(30))
    draws = sample(model, kv, trie, 4000, generator=torch.Generator().manual_seed(0))
    assert (trie.locate(draws.sids) == draws.leaf).all()
    legal = trie.tokens[0]
    expected = first[legal].softmax(0)
    seen = torch.bincount(draws.sids[0, :, 0], minlength=7)[legal] / 4000
    assert (seen - expected).abs().max() < 0.04
    exact = brute_force(model, kv, trie)[0, draws.leaf[0]]
    torch.testing.assert_close(draws.log_probs[0], exact, atol=1e-5, rtol=1e-4)


def test_free_samples_report_legality_and_top_k_narrows(build_model, build_context) -> None:  # type: ignore[no-untyped-def]
    model = build_model()
    with torch.no_grad():
        kv = model.encode(build_context(model))
    draws = sample(model, kv, None, 300, generator=torch.Generator().manual_seed(0))
    assert draws.valid.all()
    assert (draws.leaf == -1).all()
    legality = (Trie.from_sids(catalogue(30)).locate(draws.sids) >= 0).float().mean()
    assert 0 < legality < 1
    greedy = sample(model, kv, None, 20, top_k=1)
    assert (greedy.sids == greedy.sids[:, :1]).all()
    cold = sample(model, kv, None, 20, temperature=1e-4)
    assert (cold.sids == greedy.sids).all()
    torch.testing.assert_close(cold.log_probs, greedy.log_probs)


def test_sampling_honours_the_filter_and_refuses_nonsense(build_model, build_context) -> None:  # type: ignore[no-untyped-def]
    model = build_model()
    with torch.no_grad():
        kv = model.encode(build_context(model, requests=2))
    trie = Trie.from_sids(catalogue(30))
    allowed = torch.zeros(2, trie.leaves, dtype=torch.bool)
    allowed[0, :3] = True
    draws = sample(model, kv, trie, 50, allowed_leaves=allowed)
    assert draws.valid[0].all()
    assert set(draws.leaf[0].tolist()) <= {0, 1, 2}
    assert not draws.valid[1].any()
    with pytest.raises(ValueError, match="temperature 0"):
        sample(model, kv, trie, 5, temperature=0)
    with pytest.raises(ValueError, match="needs a trie"):
        sample(model, kv, None, 5, allowed_leaves=allowed)
