"""Item embeddings for the tokenizer: what an item is, and who watches it (stand-in for V1, arXiv 2506.13695, 2.1.1).

The paper compresses frozen multimodal features with a QFormer trained on item-to-item contrast and captions.
This is the closed-form relative of those two objectives: a *content* part (hashed words, tags, author and
music, TF-IDF per field, truncated SVD; log duration) and a *collaborative* part (positive pointwise mutual
information of co-engagement inside user histories, truncated SVD; Levy and Goldberg 2014 show the kinship
with contrastive training). An item without engagement gets its collaborative part predicted from its content
by ridge regression, so a new upload lands beside the items it resembles. Left out: the QFormer, and pixels,
speech and sentence encoders.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from models.tokenizer.interactions import item_rows, newest, strength, times, user_item
from models.tokenizer.vocabulary import bucket, stable_hash

_HASHED = 8192  # columns of the hashed content features
_FIELDS = {"tags": 1.0, "title": 1.0, "author_id": 0.7, "music_id": 0.3}  # ours; a field's weight in the content part
# The weights below are ours: a compromise between KuaiRand-Pure, whose tags say little, and worlds rich in content.
_CONTENT = 0.6  # length of the content part relative to the collaborative one
_DURATION = 0.2  # one standard deviation of log duration, relative to the collaborative part
_IMPRESSION = 0.2  # co-occurrence weight of a mere impression relative to a long view
_CONFIDENCE = 5.0  # engagement at which an item's own statistics weigh as much as the prediction from content
_HISTORY = 256  # latest exposures of a user that count: pairs grow with the square
_RIDGE = 3.0


class ItemEmbedder:
    """Maps ITEM rows to vectors float32 [n, dim]; ``arrays`` is its whole state, ready for safetensors."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    @classmethod
    def fit(cls, items: pa.Table, exposures: pa.Table, dim: int = 64, seed: int = 0) -> "ItemEmbedder":
        """Learns from the ITEM rows and the EXPOSURE rows of a period; equal inputs and seeds give equal vectors.

        Raises ValueError when there are no items or ``dim`` is below 4.
        """
        if not items.num_rows or dim < 4:
            raise ValueError(f"got {items.num_rows} items and dim {dim}; expected at least one item and dim 4 or more")
        with threadpool_limits(limits=1):  # several threads add the same numbers in another order
            return cls(_fit(items, exposures, dim, seed))

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors float32 [n, dim]; items unseen in fit, or without engagement there, are placed by content alone."""
        state = self.arrays
        hashed = sparse.csr_matrix(_hashed(items).multiply(state["idf"]))
        hashed = _normalise_fields(hashed, items.num_rows)
        with threadpool_limits(limits=1):
            content = _unit(hashed @ state["content"])
            predicted = _unit(hashed @ state["ridge"] + state["intercept"])
        collaborative = _blend(predicted, state, _keys(items.column("item_id").to_pylist()))
        mean, deviation = state["duration"]
        duration = (_log_duration(items) - mean) / deviation
        parts = [collaborative, _CONTENT * content, _DURATION * np.clip(duration, -3, 3)[:, None]]
        return np.hstack(parts).astype(np.float32)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays by name, for safetensors."""
        return self.arrays

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray]) -> "ItemEmbedder":
        """The embedder that ``state_dict`` came from; raises ValueError naming missing arrays."""
        missing = {"idf", "content", "ridge", "intercept", "duration", "keys", "observed", "trust"} - set(arrays)
        if missing:
            raise ValueError(f"the embedder's state lacks {sorted(missing)}; it holds {sorted(arrays)}")
        return cls(dict(arrays))


def _fit(items: pa.Table, exposures: pa.Table, dim: int, seed: int) -> dict[str, np.ndarray]:
    content_dim = max(1, (dim - 1) * 3 // 8)
    collaborative_dim = dim - 1 - content_dim
    counted = _hashed(items)
    frequency = np.asarray((counted > 0).sum(0)).ravel()
    idf = (np.log((1 + items.num_rows) / (1 + frequency)) + 1).astype(np.float32)
    hashed = _normalise_fields(sparse.csr_matrix(counted.multiply(idf)), items.num_rows)
    content = _right_vectors(hashed, content_dim, seed)
    observed, engagement = _collaborative(items, exposures, collaborative_dim, seed)
    known = np.flatnonzero(np.linalg.norm(observed, axis=1) > 0)
    ridge, intercept = np.zeros((hashed.shape[1], collaborative_dim)), np.zeros(collaborative_dim)
    if len(known):
        weight = engagement[known] / (engagement[known] + _CONFIDENCE)
        model = Ridge(alpha=_RIDGE, solver="sparse_cg", tol=1e-4).fit(hashed[known], observed[known], weight)
        ridge, intercept = model.coef_.reshape(collaborative_dim, -1).T, np.atleast_1d(model.intercept_)
    keys = _keys([items.column("item_id")[int(row)].as_py() for row in known])
    order = np.argsort(keys)
    duration = _log_duration(items)
    return {
        "idf": idf,
        "content": content.astype(np.float32),
        "ridge": np.ascontiguousarray(ridge, np.float32),
        "intercept": np.asarray(intercept, np.float32),
        "duration": np.array([duration.mean(), max(float(duration.std()), 1e-3)], np.float32),
        "keys": keys[order],
        "observed": observed[known][order].astype(np.float32),
        "trust": (engagement[known] / (engagement[known] + _CONFIDENCE))[order].astype(np.float32),
    }


def _collaborative(items: pa.Table, exposures: pa.Table, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [n, dim] from co-engagement (zero rows where there is none) and each item's engagement [n]."""
    n = items.num_rows
    users = pd.factorize(np.asarray(exposures.column("user_id").to_pylist(), object))[0]
    rows = item_rows(exposures, items.column("item_id").to_pylist())
    weight = strength(exposures, _IMPRESSION) * newest(users, times(exposures), _HISTORY)
    engaged = user_item(users, rows, weight, (int(users.max(initial=-1)) + 1, n))
    together = sparse.csr_matrix(engaged.T @ engaged)
    together.setdiag(0)
    together.eliminate_zeros()
    mutual = _ppmi(together)
    engagement = np.asarray(engaged.sum(0)).ravel()
    if mutual.nnz == 0 or min(mutual.shape) <= dim:
        return np.zeros((n, dim)), engagement
    left, values, _ = randomized_svd(mutual, dim, n_iter=4, random_state=seed)
    return _unit(left * np.sqrt(values)), engagement


def _ppmi(together: sparse.csr_matrix) -> sparse.csr_matrix:
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


def _blend(predicted: np.ndarray, state: dict[str, np.ndarray], keys: np.ndarray) -> np.ndarray:
    """Unit vectors between what was observed of an item and what its content predicts, by its ``trust``."""
    blended = predicted.astype(np.float64)
    stored = state["keys"]
    if len(stored):
        place = np.minimum(np.searchsorted(stored, keys), len(stored) - 1)
        found = stored[place] == keys
        trust = state["trust"][place[found], None]
        blended[found] = trust * state["observed"][place[found]] + (1 - trust) * predicted[found]
    return _unit(blended)


def _hashed(items: pa.Table) -> sparse.csr_matrix:
    """Counts [n, fields x hashed] of the hashed names in each field of the items."""
    rows: list[int] = []
    columns: list[int] = []
    for position, field in enumerate(_FIELDS):
        for row, value in enumerate(items.column(field).to_pylist()):
            names = _names(field, value)
            rows.extend([row] * len(names))
            columns.extend(position * _HASHED + bucket(name, _HASHED) for name in names)
    shape = (items.num_rows, len(_FIELDS) * _HASHED)
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)


def _names(field: str, value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    if field == "title":
        return re.findall(r"\w+", str(value).lower())
    return [value] if isinstance(value, str) else [name for name in value if name]


def _normalise_fields(hashed: sparse.csr_matrix, n: int) -> sparse.csr_matrix:
    """Each field's columns scaled to unit length in every row, times the field's weight."""
    scaled = []
    for position, weight in enumerate(_FIELDS.values()):
        block = hashed[:, position * _HASHED : (position + 1) * _HASHED]
        length = np.sqrt(np.asarray(block.multiply(block).sum(1)).ravel())
        scaled.append(sparse.diags_array(weight / np.maximum(length, 1e-9), shape=(n, n)) @ block)
    return sparse.csr_matrix(sparse.hstack(scaled, format="csr"))


def _right_vectors(hashed: sparse.csr_matrix, dim: int, seed: int) -> np.ndarray:
    """Top right singular vectors [columns, dim], zero-padded when the matrix has fewer."""
    used = np.flatnonzero(np.asarray(np.abs(hashed).sum(0)).ravel())
    vectors = np.zeros((hashed.shape[1], dim))
    rank = min(dim, len(used), hashed.shape[0])
    if rank:
        _, _, right = randomized_svd(hashed[:, used], rank, n_iter=4, random_state=seed)
        vectors[used, :rank] = right.T
    return vectors


def _log_duration(items: pa.Table) -> np.ndarray:
    seconds = items.column("duration_ms").to_numpy().astype(np.float64) / 1000
    return np.log1p(np.maximum(seconds, 0))


def _keys(item_ids: Sequence[str]) -> np.ndarray:
    """Stable int64 hashes of item ids, so that the state needs no strings."""
    return np.fromiter((stable_hash(item_id) >> 1 for item_id in item_ids), np.int64, len(item_ids))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
