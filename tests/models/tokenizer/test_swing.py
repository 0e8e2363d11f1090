from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from models.tokenizer import swing as module
from models.tokenizer.swing import nearest, swing


def by_definition(engaged: np.ndarray, alpha: float) -> np.ndarray:
    """The double sum of the formula, pair of users by pair of users."""
    weight = 1 / np.sqrt(np.maximum(engaged.sum(1), 1))
    scores = np.zeros((engaged.shape[1], engaged.shape[1]))
    for u, v in combinations(range(len(engaged)), 2):
        shared = np.flatnonzero(engaged[u] & engaged[v])
        for i, j in combinations(shared, 2):
            scores[i, j] += weight[u] * weight[v] / (alpha + len(shared))
            scores[j, i] = scores[i, j]
    return scores


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 5))
def test_equals_the_definition(seed: int, alpha: float) -> None:
    engaged = np.random.default_rng(seed).random((14, 9)) < 0.4
    found = swing(sparse.csr_matrix(engaged), alpha=alpha)
    assert np.allclose(found.toarray(), by_definition(engaged, alpha), atol=1e-5)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engaged = sparse.csr_matrix(np.random.default_rng(0).random((40, 20)) < 0.3)
    whole = swing(engaged).toarray()
    monkeypatch.setattr(module, "_BLOCK", 7)
    monkeypatch.setattr(module, "_PAIRS", 5)
    assert np.allclose(swing(engaged).toarray(), whole, atol=1e-5)


def test_a_blockbuster_is_compared_through_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FANS", 5)
    engaged = sparse.csr_matrix(np.ones((50, 2)))
    first, again, other = (swing(engaged, seed=seed).toarray() for seed in (0, 0, 1))
    assert (first == again).all()
    assert 0 <= first[0, 1] <= 10 / 2 / (1 + 2)  # at most 5 x 4 / 2 pairs of users, each 1/2 / (1 + 2)
    assert 0 <= other[0, 1] <= 10 / 2 / (1 + 2)


def test_nobody_and_nothing() -> None:
    assert swing(sparse.csr_matrix((0, 3))).shape == (3, 3)
    assert swing(sparse.csr_matrix((4, 3))).nnz == 0


def test_nearest_are_the_best_of_each_row() -> None:
    similarity = sparse.csr_matrix(np.array([[0, 3, 1, 2], [3, 0, 0, 0], [1, 0, 0, 9], [2, 0, 9, 0]], np.float32))
    pairs, scores = nearest(similarity, 2)
    assert pairs.tolist() == [[0, 1], [0, 3], [1, 0], [2, 3], [2, 0], [3, 2], [3, 0]]
    assert scores.tolist() == [3, 2, 3, 9, 1, 9, 2]
