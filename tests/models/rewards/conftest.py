"""A little catalogue, contexts of it and a reward model with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from features.schema import FLAGS
from models.pathways import NUMERIC, ContextTensors
from models.rewards.base import BaseConfig
from models.rewards.inputs import NUMBERS, TargetItems, target_items

SIZES = BaseConfig(levels=3, codes=8, embed=4, d_model=16, heads=2, tower=8, dropout=0.0)
ITEMS = 40


@dataclass(frozen=True)
class Shop:
    """Items and how to ask about them."""

    catalogue: SimpleNamespace
    numbers: np.ndarray

    def items(self, rows: np.ndarray) -> TargetItems:
        return target_items(rows, self.numbers[np.maximum(rows, 0)], self.catalogue)


@pytest.fixture(scope="session")
def sizes() -> BaseConfig:
    return SIZES


@pytest.fixture(scope="session")
def shop() -> Shop:
    rng = np.random.default_rng(0)
    catalogue = SimpleNamespace(
        sids=rng.integers(0, 8, (ITEMS, 3)).astype(np.int32),
        author=rng.integers(0, 9, ITEMS),
        tag=rng.integers(0, 5, ITEMS),
    )
    return Shop(catalogue, rng.normal(size=(ITEMS, len(NUMBERS))).astype(np.float32))


@pytest.fixture(scope="session")
def contexts() -> Callable[..., ContextTensors]:
    """``contexts(batch, filled)``: random behaviours in the first ``filled`` of 12 slots, 4 a pathway."""

    def make(batch: int, filled: int = 12, seed: int = 0) -> ContextTensors:
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.arange(12) < filled).expand(batch, 12)

        def draw(high: int, *shape: int) -> torch.Tensor:
            there = mask.view(batch, 12, *[1] * len(shape))
            return torch.randint(0, high, (batch, 12, *shape), generator=generator) * there

        return ContextTensors(
            static=torch.randint(0, 1024, (batch, 8), generator=generator),
            sids=draw(8, 3) + mask[..., None].long(),
            author=draw(9),
            tag=draw(5),
            numeric=torch.randn(batch, 12, len(NUMERIC), generator=generator) * mask[..., None],
            labels=draw(2, len(FLAGS)).float(),
            kind=torch.arange(3).repeat_interleave(4),
            mask=mask.clone(),
        )

    return make
