import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decoding.filter import LeafFilter, blocked_leaves
from models.decoding.trie import MANY, Trie

SIDS = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=30)


def room(trie: Trie, allowed: torch.Tensor) -> list[list[list[int]]]:
    """By counting leaves one by one."""
    return [
        [[int(row[start:end].sum()) for start, end in trie.leaf_ranges[level].tolist()] for row in allowed]
        for level in range(trie.levels)
    ]


@settings(max_examples=60)
@given(SIDS, st.data())
def test_a_bitmap_and_a_list_of_exclusions_are_the_same_filter(
    sids: list[tuple[int, ...]], data: st.DataObject
) -> None:
    """An item's leaf is closed when all of its items are excluded; a prefix counts the open leaves below."""
    trie = Trie.from_sids(np.array(sids))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, len(sids) - 1)), max_size=40))
    request, item = np.array(pairs, np.int64).reshape(-1, 2).T
    shown = np.ones((2, len(sids)), bool)
    shown[request, item] = False
    leaf_of_item = trie.leaf_of_item.numpy()
    allowed = torch.tensor([[any(row[leaf_of_item == leaf]) for leaf in range(trie.leaves)] for row in shown])
    expected = room(trie, allowed)
    bitmap = LeafFilter.from_bitmap(trie, allowed)
    blocked = blocked_leaves(leaf_of_item, trie.leaves, request, item, 2)
    listed = LeafFilter.blocking(trie, torch.from_numpy(blocked))
    for level in range(3):
        assert bitmap.room[level].tolist() == listed.room[level].tolist() == expected[level]


def test_large_counts_are_cut_and_small_remainders_exact() -> None:
    trie = Trie.from_sids(np.stack([np.zeros(400, int), np.arange(400)], 1))
    blocked = torch.arange(398)[None]
    assert LeafFilter.blocking(trie, blocked[:, :0]).room[0].tolist() == [[MANY]]
    assert LeafFilter.blocking(trie, blocked).room[0].tolist() == [[2]]


def test_wrong_bitmap_shape_is_refused() -> None:
    trie = Trie.from_sids(np.eye(3, dtype=int))
    with pytest.raises(ValueError, match=r"shape \(2, 5\); expected \[requests, 3\]"):
        LeafFilter.from_bitmap(trie, torch.ones(2, 5) > 0)
