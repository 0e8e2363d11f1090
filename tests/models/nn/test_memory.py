"""The memory of SID prefixes, alone and in the lazy decoder."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from features.histories.context import cold_context
from features.histories.windows import Limits
from models.decoding.beam import beam_search
from models.decoding.trie import Trie
from models.generator import Generator
from models.nn.memory import PathMemory
from models.objectives.ntp import ntp_loss
from models.objectives.policy import divergence, guards
from models.onerec_v2 import OneRecV2, V2Config
from models.pathways import ContextTensors, to_tensors
from models.tokenizer.vocabulary import Catalogue

CODES = 5
SIZES = {
    "levels": 3,
    "codes": CODES,
    "embed": 8,
    "d_model": 16,
    "heads": 2,
    "layers": 2,
    "head": "tied",
    "memory": True,
}
sids = st.lists(st.tuples(*[st.integers(0, CODES - 1)] * 3), min_size=1, max_size=40)


def tensor(rows: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor(rows)


@given(sids, sids)
def test_a_prefix_keeps_its_row_and_equal_prefixes_share_one(first: list[tuple[int, ...]], more: list[tuple[int, ...]]):
    memory = PathMemory(3, CODES, 4)
    memory.remember(tensor(first))
    before = memory.rows(tensor(first))
    memory.remember(tensor(more))
    for level, rows in enumerate(memory.rows(tensor(first))):
        assert torch.equal(rows, before[level])
    everything = first + more
    for level, rows in enumerate(memory.rows(tensor(everything))):
        prefixes = [row[: level + 2] for row in everything]
        assert dict(zip(prefixes, rows.tolist(), strict=True)).keys() == set(prefixes)
        assert len(set(rows.tolist())) == len(set(prefixes)) == len(memory.level(level + 1)) - 1
        assert min(rows.tolist()) > 0


@given(sids)
def test_children_are_those_remembered_and_no_others(rows: list[tuple[int, ...]]) -> None:
    memory = PathMemory(3, CODES, 4)
    memory.remember(tensor(rows))
    above = torch.arange(CODES)
    _, code, exists = memory.level(1).below(above)
    found = {(int(a), int(c)) for a, codes, there in zip(above, code, exists, strict=True) for c in codes[there]}
    assert found == {row[:2] for row in rows}


def test_leaves_name_the_whole_sids() -> None:
    rows = [(4, 0, 1), (0, 0, 0), (0, 3, 2), (4, 0, 0)]
    memory = PathMemory(3, CODES, 4)
    memory.remember(tensor(rows))
    codes = torch.stack([code for code, _ in memory.leaves()], 1)
    assert sorted(map(tuple, codes.tolist())) == sorted(rows)
    assert torch.equal(memory.rows(codes)[-1], torch.arange(1, len(rows) + 1))


def test_stored_rows_come_back_and_what_was_learned_of_later_ones_stays_zero() -> None:
    old, new = PathMemory(3, CODES, 4), PathMemory(3, CODES, 4)
    old.remember(tensor([(1, 2, 3), (0, 0, 0)]))
    for level in (1, 2):
        torch.nn.init.normal_(old.level(level).weight)
    new.remember(tensor([(0, 0, 1), (1, 2, 3)]))
    new.load_state_dict(old.state_dict())
    known, later = new.rows(tensor([(1, 2, 3)])), new.rows(tensor([(0, 0, 1)]))
    assert torch.equal(new.level(2)(known[1]), old.level(2)(old.rows(tensor([(1, 2, 3)]))[1]))
    assert torch.equal(new.level(2)(later[1]), torch.zeros(1, 4))
    assert int(later[1]) > 0


@pytest.fixture
def model() -> OneRecV2:
    torch.manual_seed(0)
    made = OneRecV2(V2Config(**SIZES, item_head=True, context_layers=1, start_from_newest=True)).eval()
    made.remember(KNOWN)
    for level in (1, 2):
        torch.nn.init.normal_(made.features.memory.level(level).weight)  # type: ignore[union-attr]
    return made


KNOWN = tensor([(0, 0, 0), (0, 0, 1), (0, 4, 1), (2, 2, 2), (3, 1, 0), (3, 1, 4)])


@pytest.fixture
def context(tiny_tokenizer: tuple[object, Catalogue]) -> ContextTensors:
    return to_tensors(cold_context(2, Limits(short=2, positive=2, lifelong=2)), tiny_tokenizer[1])


def log_prob(model: Generator, context: ContextTensors, rows: Tensor) -> Tensor:
    targets = rows.expand(len(context), -1, -1)
    return model(context, targets).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def test_the_levels_below_the_first_are_a_softmax_over_what_exists(model: OneRecV2, context: ContextTensors) -> None:
    below = log_prob(model, context, KNOWN)[..., 1:].sum(-1).exp()
    for first in KNOWN[:, 0].unique():
        torch.testing.assert_close(below[:, KNOWN[:, 0] == first].sum(1), torch.ones(2))


def test_beam_search_finds_what_teacher_forcing_scores(model: OneRecV2, context: ContextTensors) -> None:
    beams = beam_search(model, model.encode(context), Trie.from_sids(KNOWN), 6)
    scored = log_prob(model, context, KNOWN)
    for request in range(2):
        wanted = {tuple(row.tolist()): scored[request, k] for k, row in enumerate(KNOWN)}
        for sid, found in zip(beams.sids[request].tolist(), beams.log_probs[request], strict=True):
            torch.testing.assert_close(found, wanted[tuple(sid)], atol=1e-5, rtol=1e-4)


def test_an_item_remembered_later_can_be_generated_at_once(model: OneRecV2, context: ContextTensors) -> None:
    new = tensor([(0, 0, 3)])
    assert log_prob(model, context, new)[..., -1].exp().max() == 0
    model.remember(new)
    assert log_prob(model, context, new).exp().min() > 0


def test_padding_and_prefixes_that_do_not_exist_leave_losses_and_guards_finite(
    model: OneRecV2, context: ContextTensors
) -> None:
    targets = torch.stack([KNOWN[:2], torch.full((2, 3), -1)])
    mask = torch.tensor([[True, True], [False, False]])
    logits = model(context, targets)
    loss = ntp_loss(logits, targets, mask.float())
    loss.backward()
    assert loss.isfinite()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    found = guards(logits, targets, torch.zeros(2, 2), torch.full((2, 2, 3), torch.nan), mask)
    assert all(math.isfinite(value) for value in found.values())
    assert divergence(logits, logits, mask) == 0


def test_the_item_head_has_a_column_for_each_item(model: OneRecV2, context: ContextTensors) -> None:
    assert model.item_logits(model.encode(context)).shape == (2, len(KNOWN))
    with pytest.raises(ValueError, match="no item head"):
        OneRecV2(V2Config(**SIZES)).item_logits(model.encode(context))


@pytest.mark.parametrize("wrong", [{"head": "linear"}, {"levels": 1}, {"memory": False, "item_head": True}])
def test_memory_needs_what_it_stands_on(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="memory"):
        V2Config(**(SIZES | wrong))
