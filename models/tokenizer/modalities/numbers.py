"""Numbers of an item, its duration and its age, as soft one-hot codes over their quantiles.

A number becomes ``_KNOTS`` features, the weights of linear interpolation between the quantiles that ``fit`` saw:
smooth, bounded, and free of the number's scale. A duration of 0 and a missing upload time are masked.
"""

import numpy as np
import pyarrow as pa

from models.tokenizer.modalities.tokens import Tokens

_KNOTS = 8
_HOUR_MS = 3_600_000


class Numbers:
    """Two tokens: log duration and upload time."""

    buckets = 0
    width = 2 * _KNOTS

    def __init__(self, knots: np.ndarray) -> None:
        self.knots = knots  # float64 [2, _KNOTS], ascending

    @classmethod
    def fit(cls, items: pa.Table) -> "Numbers":
        """Quantiles of what is known in ITEM rows."""
        knots = np.zeros((2, _KNOTS))
        for number, values in enumerate(_numbers(items).T):
            values = values[np.isfinite(values)]
            if len(values):
                knots[number] = np.quantile(values, np.linspace(0, 1, _KNOTS))
        return cls(knots)

    def encode(self, items: pa.Table) -> Tokens:
        """Features [n, 2, 2 x knots]: each number has its own half."""
        numbers = _numbers(items)
        mask = np.isfinite(numbers) & (self.knots[:, -1] > self.knots[:, 0])
        values = np.zeros((len(numbers), 2, 2, _KNOTS), np.float32)
        for number in range(2):
            rows = np.flatnonzero(mask[:, number])
            values[rows, number, number] = _interpolation(numbers[rows, number], self.knots[number])
        return Tokens(values.reshape(len(numbers), 2, self.width), mask)

    def state(self) -> dict[str, np.ndarray]:
        """``knots``."""
        return {"knots": self.knots}


def _numbers(items: pa.Table) -> np.ndarray:
    """float64 [n, 2]: log seconds and upload hour; NaN where unknown."""
    seconds = items.column("duration_ms").to_numpy().astype(np.float64) / 1000
    uploaded = items.column("upload_time").cast(pa.int64()).to_pandas().to_numpy(np.float64)
    return np.stack([np.log(np.where(seconds > 0, seconds, np.nan)), uploaded / _HOUR_MS], 1)


def _interpolation(x: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """float32 [n, knots]: the weights with which the knots make up ``x``, clipped to their range."""
    x = np.clip(x, knots[0], knots[-1])
    right = np.clip(np.searchsorted(knots, x, side="left"), 1, len(knots) - 1)
    gap = knots[right] - knots[right - 1]
    share = np.where(gap > 0, (x - knots[right - 1]) / np.where(gap > 0, gap, 1), 1.0)
    weights = np.zeros((len(x), len(knots)), np.float32)
    rows = np.arange(len(x))
    weights[rows, right - 1] = 1 - share
    weights[rows, right] = share
    return weights
