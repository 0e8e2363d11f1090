"""Item-to-item contrast: the pairs and the loss (OneRec technical report, arXiv 2506.13695, 2.1.1).

Pairs are *U2I*, a positively watched target with the most collaboratively similar of the user's latest positives before
it, and *I2I*, an item with those that Swing finds most similar. The loss is in-batch InfoNCE over cosine similarity,
both ways: ``-log exp(s_ii / tau) / sum_j exp(s_ij / tau)``; the paper gives neither ``sim`` nor ``tau``. Rows of the
batch that are the same item are not negatives of each other.

*Folds* are ours. Where the collaborative vector is an input, it must not have seen the pair it is to explain: shown
vectors of the very log the pairs come from, the network learns to repeat that log's noise. So users are split into
folds; the pairs of one fold are learned with vectors made from the others (docs/log.md has the effect).
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from models.tokenizer.cooccurrence import Collaborative, collaborative, engagements
from models.tokenizer.interactions import item_rows, positive, times, user_numbers
from models.tokenizer.swing import nearest, swing

_RECENT = 20  # ours: how many of the latest positives are candidates; the paper names no number
_SIMILAR = 5  # ours: Swing neighbours of an item
_LIKED = 1.0  # least engagement of a positive, see interactions.strength


@dataclass(frozen=True, eq=False)
class Fold:
    """Pairs of rows int64 [m, 2] that one part of the users gives, and the vectors that the other users give."""

    u2i: np.ndarray
    i2i: np.ndarray
    log: Collaborative


def make_folds(
    items: pa.Table, exposures: pa.Table, count: int, dim: int, seed: int
) -> tuple[Collaborative, list[Fold]]:
    """The collaborative vectors of the whole log, and ``count`` folds whose vectors are in the same coordinates."""
    engaged = engagements(items, exposures)
    whole = collaborative(engaged, dim, seed)
    pairs, users = user_pairs(items, exposures, whole.vectors)
    liked = engaged.multiply(engaged >= _LIKED).tocsr()
    fold = np.random.default_rng(seed).integers(0, count, engaged.shape[0])
    folds = []
    for number in range(count):
        inside, outside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        log = collaborative(engaged[outside], dim, seed).turned_to(whole) if count > 1 else whole
        similar, _ = nearest(swing(sparse.csr_matrix(liked[inside]), seed=seed), _SIMILAR)
        folds.append(Fold(pairs[fold[users] == number], similar, log))
    return whole, folds


def user_pairs(items: pa.Table, exposures: pa.Table, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U2I: rows int64 [m, 2] (recent item, target) and the user number [m]; unit ``vectors`` say what is similar."""
    kept = positive(exposures)
    rows = item_rows(exposures, items.column("item_id").to_pylist())
    kept &= rows >= 0
    users = user_numbers(exposures)[kept]
    order = np.lexsort((times(exposures)[kept], users))
    users, rows = users[order], rows[kept][order]
    best = np.full(len(rows), -np.inf)
    partner = np.full(len(rows), -1)
    for lag in range(1, min(_RECENT + 1, len(rows))):
        now, before = rows[lag:], rows[:-lag]
        alike = np.einsum("nd,nd->n", vectors[now], vectors[before])
        better = (users[lag:] == users[:-lag]) & (now != before) & (alike > best[lag:])
        best[lag:][better] = alike[better]
        partner[lag:][better] = before[better]
    found = partner >= 0
    return np.stack([partner[found], rows[found]], 1).astype(np.int64), users[found]


def content_pairs(items: pa.Table) -> np.ndarray:
    """Rows int64 [m, 2] of items alike in their words, tags, author and music: for a catalogue without any log."""
    # Imported by who fits: scikit-learn takes a second or two, and a server only loads.
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.neighbors import NearestNeighbors

    columns = (items.column(name).to_pylist() for name in ("title", "tags", "author_id", "music_id"))
    names = [
        [*(title or "").lower().split(), *(tags or ()), *(f"by {author}" for author in [author] if author), music or ""]
        for title, tags, author, music in zip(*columns, strict=True)
    ]
    x = FeatureHasher(1 << 14, input_type="string", alternate_sign=False).transform(
        [[name for name in row if name] for row in names]
    )
    told = np.flatnonzero(x.getnnz(1))
    if len(told) < 2:
        return np.empty((0, 2), np.int64)
    # Without argument kneighbors leaves each row itself out.
    limit = min(_SIMILAR, len(told) - 1)
    found = NearestNeighbors(n_neighbors=limit, metric="cosine").fit(x[told]).kneighbors(return_distance=False)
    return np.stack([np.repeat(told, limit), told[found.ravel()]], 1).astype(np.int64)


def info_nce(left: Tensor, right: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of unit rows [b, dim]; ``same`` bool [b, b] marks entries that are no negatives."""
    scores = (left @ right.T).float() / temperature
    scores = scores.masked_fill(same, -torch.inf)
    target = torch.arange(len(left), device=left.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def same_items(left: Tensor, right: Tensor) -> Tensor:
    """bool [b, b], off the diagonal: where two pairs (left[i], right[i]) share an item on the same side."""
    same = (right[:, None] == right[None]) | (left[:, None] == left[None])
    same = same | (left[:, None] == right[None])
    return same & ~torch.eye(len(left), dtype=torch.bool, device=left.device)
