from collections.abc import Callable

import numpy as np
import pytest
import torch

from models.decoding.beam import NotFinite
from models.decoding.filter import LeafFilter
from models.decoding.sample import Draw, sample
from models.decoding.trie import Trie
from models.generator import ContextKV
from models.onerec_v2 import OneRecV2

MakeKV = Callable[[int], ContextKV]
Score = Callable[[ContextKV, torch.Tensor], torch.Tensor]


def catalogue(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 7, (count, 3))


def test_samples_follow_the_model_inside_the_trie(model: OneRecV2, random_kv: MakeKV, brute_force: Score) -> None:
    kv = random_kv(1)
    with torch.no_grad():
        first = model.step(kv, None, None)[0][0, 0].log_softmax(-1)
    trie = Trie.from_sids(catalogue(30))
    draws = sample(model, kv, trie, 4000, generator=torch.Generator().manual_seed(0))
    assert (trie.locate(draws.sids) == draws.leaf).all()
    legal = trie.tokens[0]
    expected = first[legal].softmax(0)
    seen = torch.bincount(draws.sids[0, :, 0], minlength=7)[legal] / 4000
    assert (seen - expected).abs().max() < 0.04
    exact = brute_force(kv, trie.sids)[0, draws.leaf[0]]
    torch.testing.assert_close(draws.log_probs[0], exact, atol=1e-5, rtol=1e-4)


def test_free_samples_report_legality_and_top_k_narrows(model: OneRecV2, random_kv: MakeKV) -> None:
    kv = random_kv(3)
    draws = sample(model, kv, None, 300, generator=torch.Generator().manual_seed(0))
    assert draws.valid.all()
    assert (draws.leaf == -1).all()
    legality = (Trie.from_sids(catalogue(30)).locate(draws.sids) >= 0).float().mean()
    assert 0 < legality < 1
    greedy = sample(model, kv, None, 20, draw=Draw(top_k=1))
    assert (greedy.sids == greedy.sids[:, :1]).all()
    cold = sample(model, kv, None, 20, draw=Draw(temperature=1e-4))
    assert (cold.sids == greedy.sids).all()
    torch.testing.assert_close(cold.log_probs, greedy.log_probs)


def test_a_nucleus_holds_the_likeliest_codes_and_keeps_the_log_probabilities(
    model: OneRecV2, random_kv: MakeKV, brute_force: Score
) -> None:
    kv = random_kv(2)
    draws = sample(model, kv, None, 500, draw=Draw(top_p=0.6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model.step(kv, None, None)[0][:, 0].softmax(-1)
    for row in range(2):
        seen = draws.sids[row, :, 0].unique()
        assert first[row, seen].sum() >= 0.6
        assert first[row, seen].sum() - first[row, seen].min() < 0.6
        exact = brute_force(kv, draws.sids[row])[row]
        torch.testing.assert_close(draws.log_probs[row], exact, atol=1e-5, rtol=1e-4)
    narrow = sample(model, kv, None, 50, draw=Draw(top_p=1e-6))
    assert (narrow.sids == sample(model, kv, None, 50, draw=Draw(top_k=1)).sids).all()


def test_sampling_honours_the_filter_and_refuses_nonsense(model: OneRecV2, random_kv: MakeKV) -> None:
    kv = random_kv(2)
    trie = Trie.from_sids(catalogue(30))
    bitmap = torch.zeros(2, trie.leaves, dtype=torch.bool)
    bitmap[0, :3] = True
    allowed = LeafFilter.from_bitmap(trie, bitmap)
    draws = sample(model, kv, trie, 50, allowed=allowed)
    assert draws.valid[0].all()
    assert set(draws.leaf[0].tolist()) <= {0, 1, 2}
    assert not draws.valid[1].any()
    with pytest.raises(ValueError, match="temperature 0"):
        Draw(temperature=0)
    with pytest.raises(ValueError, match=r"top_p 1\.5"):
        Draw(top_p=1.5)
    with pytest.raises(ValueError, match="num_samples is 0"):
        sample(model, kv, trie, 0)
    with pytest.raises(ValueError, match="needs a trie"):
        sample(model, kv, None, 5, allowed=allowed)


@pytest.mark.parametrize("constrained", [True, False])
def test_nan_is_refused(model: OneRecV2, random_kv: MakeKV, constrained: bool) -> None:
    kv = random_kv(2)
    kv.keys[0][0] = torch.nan
    with pytest.raises(NotFinite, match="1 of 2 requests"):
        sample(model, kv, Trie.from_sids(catalogue(30)) if constrained else None, 5)
