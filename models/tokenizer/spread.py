"""Spreads embeddings over the directions they hardly use, before they are quantised.

Contrast leaves most of the variance in a few directions, and K-means spends its codes there. So vectors are centred,
each principal direction is divided by ``variance^(power / 2)``, and rows are scaled to unit length: power 0 only
centres, 1 whitens, which raises mere noise to the level of taste; between them neighbours are better than at either
end (docs/tokenizer.md). Ours; in closed form, on the catalogue of the fit, and frozen with it.
"""

import numpy as np

from models.tokenizer.cooccurrence import unit

_FLOOR = 1e-3  # least variance of a direction, relative to the largest


class Spread:
    """``x -> unit((x - mean) @ matrix)``, float32."""

    def __init__(self, mean: np.ndarray, matrix: np.ndarray) -> None:
        self.mean, self.matrix = mean, matrix

    @classmethod
    def fit(cls, x: np.ndarray, power: float) -> "Spread":
        """From rows ``x`` [n, dim]; rows that are all equal are only centred."""
        mean = x.mean(0, dtype=np.float64)
        centred = x - mean
        variance, directions = np.linalg.eigh(centred.T @ centred / len(x))
        largest = max(float(variance[-1]), 0.0)
        if largest < 1e-12:
            return cls(mean.astype(np.float32), np.eye(x.shape[1], dtype=np.float32))
        scale = (np.maximum(variance, _FLOOR * largest) / largest) ** (-power / 2)
        # Back in the old coordinates: independent of the signs that the eigenvectors happen to have.
        return cls(mean.astype(np.float32), ((directions * scale) @ directions.T).astype(np.float32))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Unit rows [n, dim]; a row at the mean stays (almost) zero."""
        return np.asarray(unit((x - self.mean) @ self.matrix), np.float32)
