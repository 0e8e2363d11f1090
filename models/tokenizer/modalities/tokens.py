"""What every modality gives the QFormer: tokens per item, and which of them are there.

The technical report's frozen encoder (V1, arXiv 2506.13695, 2.1.1: miniCPM-V over caption, tags, speech, OCR and
frames) is a plug-in here: whatever a data set knows of its items becomes tokens through a ``Modality`` each.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, eq=False)
class Tokens:
    """``values`` are features float32 [n, tokens, width], or hash buckets int64 [n, tokens]; ``mask`` bool [n, tokens].

    Values under a False mask mean nothing and are 0.
    """

    values: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        if self.mask.shape != self.values.shape[:2]:
            raise ValueError(f"values {self.values.shape} and mask {self.mask.shape} differ in items or tokens")
        if not np.isfinite(self.values).all():
            bad = (~np.isfinite(self.values)).reshape(len(self.values), -1).any(1)
            raise ValueError(f"{int(bad.sum())} of {len(bad)} items have NaN or infinite features; clean them first")


class Modality(Protocol):
    """One source of knowledge about items; fitted, then frozen and kept in the tokenizer's file."""

    @property
    def width(self) -> int:
        """Features of a token; 0 when its tokens are hash buckets."""

    @property
    def buckets(self) -> int:
        """Number of hash buckets; 0 when its tokens are features."""

    def encode(self, items: pa.Table) -> Tokens:
        """Tokens of ITEM rows, known and new ones alike."""

    def state(self) -> dict[str, np.ndarray]:
        """Arrays by name: everything that ``encode`` needs beside the modality's configuration."""
