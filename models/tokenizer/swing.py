"""Swing, item-to-item similarity from pairs of users (Yang et al., arXiv 2010.05525), on sparse matrices.

``s(i, j) = sum over users u < v who both engaged with i and j of  w_u w_v / (alpha + |I_u & I_v|)``, ``w_u = 1 /
sqrt(|I_u|)``: two users who share little else are strong evidence that the items they share belong together. Each block
of users is multiplied with all users; the rows of pairs that share two items or more are intersected element-wise
(``X``) and the block adds ``X' diag(weight) X``. Work grows with the pairs of users that share two items, never with
the square of items or users. Left out: the time order of the two clicks.
"""

import numpy as np
from scipy import sparse

_BLOCK = 512  # users multiplied with all others at a time
_PAIRS = 200_000  # user pairs intersected at a time
_FANS = 400  # users of an item that are compared: a blockbuster's pairs grow with the square


def swing(engaged: sparse.csr_matrix, *, alpha: float = 1.0, seed: int = 0) -> sparse.csr_matrix:
    """Symmetric similarity float32 CSR [items, items], diagonal 0, of a user x item matrix (non-zero = engaged).

    An item with many users is compared through a sample of them drawn by ``seed``.
    """
    users = _sampled(engaged, seed)
    sizes = np.diff(users.indptr)
    strength = 1 / np.sqrt(np.maximum(sizes, 1))
    total = sparse.csr_matrix((users.shape[1], users.shape[1]), dtype=np.float32)
    transposed = users.T.tocsr()
    for start in range(0, users.shape[0], _BLOCK):
        shared = (users[start : start + _BLOCK] @ transposed).tocoo()
        left = shared.row + start
        kept = (shared.col > left) & (shared.data >= 2)
        left, right, overlap = left[kept], shared.col[kept], shared.data[kept]
        weight = (strength[left] * strength[right] / (alpha + overlap)).astype(np.float32)
        for cut in range(0, len(left), _PAIRS):
            part = slice(cut, cut + _PAIRS)
            both = users[left[part]].multiply(users[right[part]]).tocsr()
            total = total + both.T @ sparse.diags_array(weight[part]) @ both
    total.setdiag(0)
    total.eliminate_zeros()
    return sparse.csr_matrix(total, dtype=np.float32)


def _sampled(engaged: sparse.csr_matrix, seed: int) -> sparse.csr_matrix:
    """Ones where a user engaged, at most ``_FANS`` users an item."""
    by_item = sparse.csc_matrix(engaged)
    counts = np.diff(by_item.indptr)
    item = np.repeat(np.arange(by_item.shape[1]), counts)
    draw = np.random.default_rng(seed).random(len(item))
    order = np.lexsort((draw, item))
    rank = np.empty(len(item), np.int64)
    rank[order] = np.arange(len(item)) - np.repeat(by_item.indptr[:-1], counts)
    kept = rank < _FANS
    ones = np.ones(int(kept.sum()), np.float32)
    return sparse.csr_matrix((ones, (by_item.indices[kept], item[kept])), shape=engaged.shape)


def nearest(similarity: sparse.csr_matrix, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs int64 [m, 2] of each row with its at most ``limit`` most similar columns, and their similarity [m]."""
    counts = np.diff(similarity.indptr)
    row = np.repeat(np.arange(similarity.shape[0]), counts)
    order = np.lexsort((similarity.indices, -similarity.data, row))
    rank = np.arange(len(row)) - np.repeat(similarity.indptr[:-1], counts)
    kept = order[rank < limit]
    return np.stack([row[kept], similarity.indices[kept]], 1).astype(np.int64), similarity.data[kept]
