import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decoding.trie import Trie

SIDS = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40)


@settings(max_examples=40)
@given(SIDS)
def test_trie_locates_exactly_its_items(sids: list[tuple[int, ...]]) -> None:
    trie = Trie.from_sids(np.array(sids))
    assert trie.leaves == len(set(sids))
    assert (trie.sids[trie.leaf_of_item] == torch.tensor(sids)).all()
    for leaf in range(trie.leaves):
        items = trie.items[trie.item_offsets[leaf] : trie.item_offsets[leaf + 1]]
        assert items.tolist() == [row for row, sid in enumerate(sids) if list(sid) == trie.sids[leaf].tolist()]
    grid = torch.cartesian_prod(*[torch.arange(-1, 6)] * 3)
    located = trie.locate(grid)
    assert ((located >= 0) == torch.tensor([tuple(sid) in set(sids) for sid in grid.tolist()])).all()
    assert (trie.sids[located[located >= 0]] == grid[located >= 0]).all()


@settings(max_examples=40)
@given(SIDS, st.data())
def test_children_packed_and_padded_are_the_prefixes_that_exist(
    sids: list[tuple[int, ...]], data: st.DataObject
) -> None:
    trie = Trie.from_sids(np.array(sids))
    for level in range(3):
        prefixes = sorted({sid[:level] for sid in sids})
        longer = sorted({sid[: level + 1] for sid in sids})
        chosen = data.draw(st.lists(st.integers(0, len(prefixes) - 1), min_size=1, max_size=6, unique=True))
        valid = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))])
        expected = [
            (beam, prefix[-1], node)
            for beam, row in enumerate(chosen)
            for node, prefix in enumerate(longer)
            if prefix[:-1] == prefixes[row]
        ]
        packed = trie.expand(level, torch.tensor([chosen]), valid)
        parts = (part[packed.exists].tolist() for part in (packed.beam, packed.code, packed.node))
        assert list(zip(*parts, strict=True)) == [each for each in expected if valid[0, each[0]]]
        node, code, exists = trie.children(level, torch.tensor(chosen))
        beam = torch.arange(len(chosen))[:, None].expand_as(node)
        parts = (part[exists].tolist() for part in (beam, code, node))
        assert list(zip(*parts, strict=True)) == expected


def test_slots_are_what_the_widest_nodes_need() -> None:
    trie = Trie.from_sids(np.array([(0, c) for c in range(5)] + [(1, 0), (2, 0), (2, 1)]))
    assert [trie.slots(1, width) for width in (1, 2, 3, 100)] == [5, 7, 8, 8]
    assert trie.slots(1, 2, repeated=True) == 10
    twice = trie.expand(1, torch.tensor([[0, 0]]), torch.tensor([[True, True]]), repeated=True)
    assert twice.exists.all()
    assert twice.beam.tolist() == [[0] * 5 + [1] * 5]


def test_empty_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[n > 0, levels\]"):
        Trie.from_sids(np.zeros((0, 3)))
