import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decoding.trie import Trie


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_trie_locates_exactly_its_items(sids: list[tuple[int, ...]], rng: random.Random) -> None:
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
