"""Collaborative vectors of items: who is watched together, in closed form.

Positive pointwise mutual information of co-engagement inside user histories, truncated SVD (Levy and Goldberg, "Neural
word embedding as implicit matrix factorization", 2014, show the kinship with contrastive training). They say which of a
user's recent items is *collaboratively similar* to a target, as the U2I pairs of the OneRec technical report (V1, arXiv
2506.13695, 2.1.1) need, and they are one of the modalities. Left out: order and time inside a history.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy import sparse
from scipy.linalg import orthogonal_procrustes
from threadpoolctl import threadpool_limits

from models.tokenizer.interactions import item_rows, newest, strength, times, user_item, user_numbers

_IMPRESSION = 0.2  # ours: co-occurrence weight of a mere impression relative to a long view
_HISTORY = 256  # ours: latest exposures of a user that count, as pairs grow with the square


@dataclass(frozen=True, eq=False)
class Collaborative:
    """Unit ``vectors`` float32 [n, dim], zero for an item nobody engaged with, and each item's ``engagement`` [n]."""

    vectors: np.ndarray
    engagement: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """bool [n]: which items have a vector."""
        return np.asarray(np.abs(self.vectors).sum(1) > 0)

    def turned_to(self, other: "Collaborative") -> "Collaborative":
        """The same vectors in the coordinates of ``other``: two SVDs differ by a rotation (orthogonal Procrustes)."""
        rotation, _ = orthogonal_procrustes(self.vectors, other.vectors)
        return Collaborative((self.vectors @ rotation).astype(np.float32), self.engagement)


def collaborative(engaged: sparse.csr_matrix, dim: int, seed: int) -> Collaborative:
    """The vectors of the items of a user x item matrix; all zero when it has too few pairs for ``dim`` dimensions."""
    # Imported by who fits: scikit-learn takes a second or two, and a server only loads.
    from sklearn.utils.extmath import randomized_svd

    together = sparse.csr_matrix(engaged.T @ engaged)
    together.setdiag(0)
    together.eliminate_zeros()
    mutual = ppmi(together)
    engagement = np.asarray(engaged.sum(0)).ravel()
    if mutual.nnz == 0 or min(mutual.shape) <= dim:
        return Collaborative(np.zeros((engaged.shape[1], dim), np.float32), engagement)
    with threadpool_limits(limits=1):  # several threads add the same numbers in another order
        left, values, _ = randomized_svd(mutual, dim, n_iter=4, random_state=seed)
    return Collaborative(unit(left * np.sqrt(values)).astype(np.float32), engagement)


def engagements(items: pa.Table, exposures: pa.Table) -> sparse.csr_matrix:
    """float32 CSR [users, items]: how strongly each user took to each item, from the user's latest exposures.

    Users are numbered in the order in which they appear in the EXPOSURE rows.
    """
    users = user_numbers(exposures)
    rows = item_rows(exposures, items.column("item_id").to_pylist())
    weight = strength(exposures, _IMPRESSION) * newest(users, times(exposures), _HISTORY)
    return user_item(users, rows, weight, (int(users.max(initial=-1)) + 1, items.num_rows))


def ppmi(together: sparse.csr_matrix) -> sparse.csr_matrix:
    """Positive pointwise mutual information, contexts smoothed by the usual power 3/4, symmetrised."""
    pairs = together.tocoo()
    total = np.asarray(together.sum(1)).ravel()
    smoothed = total**0.75
    smoothed = smoothed / max(smoothed.sum(), 1e-12)
    row, column = pairs.row, pairs.col
    forward = np.log(pairs.data / (total[row] * smoothed[column]))
    backward = np.log(pairs.data / (total[column] * smoothed[row]))
    mutual = (forward + backward) / 2
    kept = mutual > 0
    return sparse.csr_matrix((mutual[kept], (row[kept], column[kept])), shape=together.shape)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one; a zero row stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
