from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from drawn import shaken

from models.decoding.beam import NotFinite
from models.decoding.filter import LeafFilter
from models.decoding.session import session_search
from models.decoding.trie import Trie
from models.generator import ContextKV
from models.onerec_session import OneRecSession, SessionConfig

ITEMS = 3
MakeKV = Callable[[int], ContextKV]


@pytest.fixture
def writer() -> OneRecSession:
    """Writes sessions of three items; as sharp as the point-wise model, and with the KV of ``random_kv``."""
    torch.manual_seed(0)
    config = SessionConfig(
        codes=7, d_model=16, heads=4, kv_groups=2, embed=8, items=ITEMS, encoder_layers=1, decoder_layers=1, ffn=16
    )
    return shaken(OneRecSession(config))


@torch.no_grad()
def teacher_forced(model: OneRecSession, kv: ContextKV, sessions: torch.Tensor) -> torch.Tensor:
    """[B, T, m, L] log-probabilities of the sessions [B, T, m, L]."""
    logits = model.score_sessions(kv, sessions)
    return logits.log_softmax(-1).gather(-1, sessions[..., None]).squeeze(-1)


def small_catalogue(count: int) -> Trie:
    return Trie.from_sids(np.random.default_rng(1).integers(0, 7, (count, 3)))


@pytest.mark.parametrize("filtered", [False, True])
def test_a_wide_search_equals_scoring_every_list_without_repeats(
    writer: OneRecSession, random_kv: MakeKV, filtered: bool
) -> None:
    kv, trie = random_kv(2), small_catalogue(6)
    allowed = torch.ones(2, trie.leaves, dtype=torch.bool)
    if filtered:
        allowed[0, 2] = allowed[1, 0] = allowed[1, 5] = False
    found = session_search(writer, kv, trie, 150, LeafFilter.from_bitmap(trie, allowed) if filtered else None)
    for row in range(2):
        lists = torch.tensor(list(permutations(allowed[row].nonzero().flatten().tolist(), ITEMS)))
        exact = teacher_forced(writer, kv, trie.sids[lists].expand(2, *lists.shape, 3))[row]
        best = exact.sum((-1, -2)).sort(descending=True)
        count = len(lists)
        assert found.valid[row, :count].all()
        assert not found.valid[row, count:].any()
        torch.testing.assert_close(found.scores[row, :count], best.values, atol=1e-4, rtol=1e-5)
        assert sorted(found.leaf[row, :count].tolist()) == sorted(lists.tolist())


def test_narrow_lists_are_legal_have_no_repeats_and_log_the_models_probabilities(
    writer: OneRecSession, random_kv: MakeKV
) -> None:
    kv, trie = random_kv(4), small_catalogue(60)
    found = session_search(writer, kv, trie, 8)
    assert found.valid.all()
    assert (trie.locate(found.sids) == found.leaf).all()
    assert all(len(set(one)) == ITEMS for row in found.leaf.tolist() for one in row)
    assert (found.scores.diff(dim=1) <= 0).all()
    torch.testing.assert_close(found.log_probs, teacher_forced(writer, kv, found.sids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.best().scores.sum(1), found.scores[:, 0])


def test_lists_end_where_the_catalogue_does(writer: OneRecSession, random_kv: MakeKV) -> None:
    """One request may have two items, another none, a third everything; each is answered as if it were alone."""
    kv, trie = random_kv(3), small_catalogue(20)
    allowed = torch.zeros(3, trie.leaves, dtype=torch.bool)
    allowed[0, [3, 7]] = True
    allowed[2] = True
    found = session_search(writer, kv, trie, 6, LeafFilter.from_bitmap(trie, allowed))
    assert found.valid[0].tolist() == [[True, True, False]] * 2 + [[False] * 3] * 4
    assert sorted(found.leaf[0, :2].tolist()) == [[3, 7, -1], [7, 3, -1]]
    assert (found.sids[0, :2, 2] == -1).all()
    assert (found.log_probs[0, :2, 2] == 0).all()
    assert not found.valid[1].any()
    assert found.scores[1].isinf().all()
    assert found.valid[2].all()
    alone = ContextKV(*([part[2:] for part in kv.keys] for _ in range(2)), kv.mask[2:], kv.bias[2:], kv.age[2:])
    torch.testing.assert_close(session_search(writer, alone, trie, 6).scores[0], found.scores[2])


def test_a_single_item_makes_lists_of_one(writer: OneRecSession, random_kv: MakeKV) -> None:
    found = session_search(writer, random_kv(2), small_catalogue(1), 4)
    assert found.valid[:, 0].tolist() == [[True, False, False]] * 2
    assert not found.valid[:, 1:].any()


def test_what_cannot_be_searched_is_refused(writer: OneRecSession, random_kv: MakeKV) -> None:
    kv, trie = random_kv(2), small_catalogue(10)
    with pytest.raises(ValueError, match="width is 0"):
        session_search(writer, kv, trie, 0)
    kv.keys[0][1] = torch.nan
    with pytest.raises(NotFinite, match="row 1"):
        session_search(writer, kv, trie, 4)
