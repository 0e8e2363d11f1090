"""A small random model and random context KV for the decoders."""

from collections.abc import Callable

import pytest
import torch
from drawn import shaken

from models.generator import ContextKV
from models.onerec_v2 import OneRecV2, V2Config


@pytest.fixture
def model() -> OneRecV2:
    """7 codes, 3 levels; heads sharp enough that codes differ in probability."""
    torch.manual_seed(0)
    return shaken(OneRecV2(V2Config(codes=7, d_model=16, layers=2, heads=4, kv_groups=2, embed=8)))


@pytest.fixture
def random_kv(model: OneRecV2) -> Callable[[int], ContextKV]:
    """KV of as many requests, with some context tokens padded out."""

    def build(requests: int) -> ContextKV:
        draw = torch.Generator().manual_seed(requests)
        keys = torch.randn(requests, 2, 9, model.config.d_head, generator=draw)
        mask = torch.rand(requests, 9, generator=draw) < 0.7
        mask[:, 0] = True
        bias = torch.zeros(requests, 9).masked_fill(~mask, -torch.inf)
        return ContextKV([keys], [keys], mask, bias, torch.randn(requests, 9, generator=draw))

    return build


@pytest.fixture
def brute_force(model: OneRecV2) -> Callable[[ContextKV, torch.Tensor], torch.Tensor]:
    """[B, n, L] log-probabilities of the SIDs [n, L], by teacher forcing."""

    @torch.no_grad()
    def score(kv: ContextKV, sids: torch.Tensor) -> torch.Tensor:
        every = sids.expand(len(kv), -1, -1)
        return model.score(kv, every).log_softmax(-1).gather(-1, every[..., None]).squeeze(-1)

    return score
