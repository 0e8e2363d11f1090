"""A tiny bundle with random weights, for whatever needs a model that answers but knows nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from features.histories.windows import Limits
from features.schema import EXPOSURE, FLAGS, ITEM, conform
from models.bundle import save
from models.onerec_v2 import OneRecV2, V2Config
from models.rewards.base import BaseConfig
from models.rewards.inputs import NUMBERS
from models.rewards.pscore import PScore
from models.rewards.reward import RewardModel, sids_digest
from models.rewards.stay import PlayTimes, Stay
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.tokenizer.vocabulary import Catalogue

LIMITS = Limits(short=5, positive=6, lifelong=7)
WriteBundle = Callable[..., Path]


def random_items(count: int, rng: np.random.Generator) -> pa.Table:
    """ITEM rows i0 .. with a tag and an author each."""
    columns = {
        "item_id": [f"i{k}" for k in range(count)],
        "tags": [[f"t{k % 7}"] for k in range(count)],
        "author_id": [f"a{k % 11}" for k in range(count)],
        "duration_ms": rng.integers(5_000, 60_000, count),
    }
    return conform(pa.table(columns), ITEM)


def random_exposures(items: pa.Table, count: int, rng: np.random.Generator) -> pa.Table:
    """EXPOSURE rows of 20 users."""
    rows = rng.integers(0, items.num_rows, count)
    duration = items.column("duration_ms").to_numpy()[rows]
    columns = {
        "exposure_id": [f"e{k}" for k in range(count)],
        "request_id": [f"r{k // 5}" for k in range(count)],
        "user_id": [f"u{k % 20}" for k in range(count)],
        "item_id": [f"i{row}" for row in rows],
        "position": np.arange(count) % 5,
        "event_time": 1_767_225_600_000 + np.arange(count) * 60_000,
        "source": ["organic"] * count,
        "duration_ms": duration,
        "play_ms": (duration * rng.random(count)).astype(np.int64),
        **{flag: rng.random(count) < 0.1 for flag in FLAGS},
    }
    return conform(pa.table(columns), EXPOSURE)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> tuple[Tokenizer, Catalogue]:
    """A tokenizer (3 levels of 8 codes) and a catalogue of 120 items, the last ten with the SIDs of the first ten."""
    rng = np.random.default_rng(0)
    items = random_items(120, rng)
    exposures = random_exposures(items, 600, rng)
    tokenizer = Tokenizer.fit(items, exposures, TokenizerConfig(levels=3, codes=8, dim=8, seed=0))
    catalogue = tokenizer.catalogue(items, exposures)
    sids = catalogue.sids.copy()
    sids[-10:] = sids[:10]
    return tokenizer, replace(catalogue, sids=sids)


@pytest.fixture(scope="session")
def write_bundle(tiny_tokenizer: tuple[Tokenizer, Catalogue]) -> WriteBundle:
    """``write_bundle(folder, seed=0)`` makes a bundle folder; another seed is another model."""
    tokenizer, catalogue = tiny_tokenizer

    def write(folder: Path, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        model = OneRecV2(V2Config(codes=8, levels=3, d_model=16, layers=1, heads=2, kv_groups=1, embed=8))
        metrics = {"seed": seed}
        return save(folder, model=model, tokenizer=tokenizer, catalogue=catalogue, limits=LIMITS, metrics=metrics)

    return write


@pytest.fixture(scope="session")
def random_reward() -> Callable[[Catalogue], RewardModel]:
    """``random_reward(catalogue)``: a reward model that knows nothing, for that catalogue."""

    def make(catalogue: Catalogue) -> RewardModel:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        plays = PlayTimes.of(rng.uniform(0, 60_000, 2000), rng.uniform(1_000, 300_000, 2000))
        sizes = BaseConfig(levels=catalogue.levels, codes=catalogue.codes, embed=4, d_model=16, heads=2, tower=4)
        return RewardModel(
            pscore=PScore(sizes).eval().requires_grad_(False),
            stay=Stay(plays=plays, slope=1.0, shift=0.0, spread=0.5),
            session=None,
            numbers=np.random.default_rng(0).normal(size=(len(catalogue), len(NUMBERS))).astype(np.float32),
            sids=sids_digest(catalogue, len(catalogue)),
            metrics={"reward/auc": {}},
        )

    return make
