"""Detail: what an item's own words say, put where the embedding says least, so that variants of one product differ.

Contrast draws together what the same people watch, so shades of one nail polish end nearer to each other than the error
of three codes, and truncated text vectors no longer hold the word that tells them apart. So the TF-IDF n-grams of the
title are projected at random onto ``AXES`` numbers (Johnson and Lindenstrauss: such numbers keep distances, rare words
included), whitened, and added with a small weight along the directions that vary least over the catalogue. Ours; in
closed form, frozen with the fit. An item without a title gets none. docs/tokenizer.md has what it gains and costs.
"""

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from models.tokenizer.cooccurrence import unit
from models.tokenizer.modalities.text import inverse_frequency, ngrams, texts_of, weighted
from models.tokenizer.spread import Spread

AXES = 8
"""Numbers that an item's words become: fewer are cheap to quantise, and more keep distances better."""


class Detail:
    """``x -> unit(x + words of the item)``, float32; ``basis`` [axes, dim] holds the weight."""

    def __init__(self, idf: np.ndarray, projection: np.ndarray, spread: Spread, basis: np.ndarray) -> None:
        self.idf, self.projection, self.spread, self.basis = idf, projection, spread, basis

    @classmethod
    def fit(cls, items: pa.Table, x: np.ndarray, weight: float, seed: int) -> "Detail":
        """For the catalogue ``items`` with vectors ``x`` [n, dim]; ``weight`` is the length of what is added."""
        axes, rng = min(AXES, x.shape[1] // 2), np.random.default_rng(seed)
        counts = ngrams(texts_of(items))
        idf = inverse_frequency(counts)
        projection = rng.normal(size=(counts.shape[1], axes)).astype(np.float32)
        titled = counts.getnnz(1) > 0
        with threadpool_limits(limits=1):  # several threads add the same numbers in another order
            spread = Spread.fit(np.asarray(weighted(counts[titled], idf) @ projection, np.float32), 1.0)
            basis = weight * _idle_directions(x, axes, rng)
        return cls(idf, projection, spread, basis.astype(np.float32))

    def __call__(self, items: pa.Table, x: np.ndarray) -> np.ndarray:
        """Unit rows [n, dim] of the ITEM rows with vectors ``x``."""
        counts = ngrams(texts_of(items))
        titled = counts.getnnz(1) > 0
        x = np.array(x, np.float32)
        with threadpool_limits(limits=1):
            words = self.spread(np.asarray(weighted(counts[titled], self.idf) @ self.projection, np.float32))
            x[titled] = unit(x[titled] + words @ self.basis)
        return x

    def state(self) -> dict[str, np.ndarray]:
        """Everything by name."""
        spread = {"mean": self.spread.mean, "matrix": self.spread.matrix}
        return {"idf": self.idf, "projection": self.projection, "basis": self.basis, **spread}

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray]) -> "Detail":
        """What ``state`` gave."""
        spread = Spread(arrays["mean"], arrays["matrix"])
        return cls(arrays["idf"], arrays["projection"], spread, arrays["basis"])


def _idle_directions(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Orthonormal rows [count, dim] within the ``count`` directions in which rows ``x`` vary least."""
    centred = x - x.mean(0, dtype=np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred / len(x))
    idle = directions[:, :count] @ directions[:, :count].T  # independent of the signs that eigenvectors happen to have
    left, _, right = np.linalg.svd(rng.normal(size=(count, x.shape[1])) @ idle, full_matrices=False)
    return np.asarray(left @ right)
