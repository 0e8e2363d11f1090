"""A small world where users watch only the items of their own taste, and the tags tell which taste an item serves."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from features.schema import EXPOSURE, FLAGS, ITEM, conform

TASTES = 6


@dataclass(frozen=True)
class TasteWorld:
    """ITEM and EXPOSURE rows; ``taste`` [items] is the truth behind them."""

    items: pa.Table
    exposures: pa.Table
    taste: np.ndarray


@pytest.fixture(scope="session")
def world() -> TasteWorld:
    """300 items, 150 users, 6 000 exposures; half of what is shown serves the user's taste."""
    rng = np.random.default_rng(1)
    taste = rng.integers(0, TASTES, 300)
    duration = rng.integers(5_000, 60_000, 300)
    items = pa.table(
        {
            "item_id": [f"i{k}" for k in range(300)],
            "tags": [[f"t{kind}"] if k % 3 else None for k, kind in enumerate(taste)],
            "author_id": [f"a{kind}-{k % 5}" for k, kind in enumerate(taste)],
            "duration_ms": duration,
        }
    )
    n = 6_000
    users = rng.integers(0, 150, n)
    rows = np.where(rng.random(n) < 0.5, rng.integers(0, 300, n), -1)
    for kind in range(TASTES):
        of_kind = np.flatnonzero(taste == kind)
        wanted = (rows < 0) & (users % TASTES == kind)
        rows[wanted] = rng.choice(of_kind, wanted.sum())
    liked = taste[rows] == users % TASTES
    exposures = pa.table(
        {
            "exposure_id": [f"e{k}" for k in range(n)],
            "request_id": [f"r{k}" for k in range(n)],
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{row}" for row in rows],
            "position": np.zeros(n, np.int32),
            "event_time": 1_767_225_600_000 + np.arange(n) * 60_000,
            "source": ["organic"] * n,
            "duration_ms": duration[rows],
            "play_ms": np.where(liked, duration[rows], duration[rows] // 20),
            **{flag: liked if flag == "long_view" else np.zeros(n, bool) for flag in FLAGS},
        }
    )
    return TasteWorld(conform(items, ITEM), conform(exposures, EXPOSURE), taste)
