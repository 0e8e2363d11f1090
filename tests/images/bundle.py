"""Run inside the serving image: publishes a bundle of random weights, made by the image's own code, as production."""

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from features.histories.windows import Limits
from features.schema import EXPOSURE, FLAGS, ITEM, conform
from features.storage import connect
from models.bundle import publish, save, set_alias
from models.onerec_v2 import OneRecV2, V2Config
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig

ITEMS, EXPOSURES = 40, 200


def main() -> str:
    """The published version."""
    items = {"item_id": [f"i{k}" for k in range(ITEMS)], "tags": [[f"t{k % 5}"] for k in range(ITEMS)]}
    items |= {"author_id": [f"a{k % 7}" for k in range(ITEMS)], "duration_ms": np.full(ITEMS, 9_000)}
    seen = {
        "exposure_id": [f"e{k}" for k in range(EXPOSURES)],
        "request_id": [f"r{k // 5}" for k in range(EXPOSURES)],
        "user_id": [f"u{k % 20}" for k in range(EXPOSURES)],
        "item_id": [f"i{k * 7 % ITEMS}" for k in range(EXPOSURES)],
        "position": np.arange(EXPOSURES) % 5,
        "event_time": 1_767_225_600_000 + np.arange(EXPOSURES) * 60_000,
        "source": ["organic"] * EXPOSURES,
        "duration_ms": np.full(EXPOSURES, 9_000),
        "play_ms": np.arange(EXPOSURES) % 10 * 1_000,
        **{flag: np.zeros(EXPOSURES, bool) for flag in FLAGS},
    }
    catalogue_rows, exposures = conform(pa.table(items), ITEM), conform(pa.table(seen), EXPOSURE)
    tokenizer = Tokenizer.fit(catalogue_rows, exposures, TokenizerConfig(levels=3, codes=8, dim=8, seed=0))
    catalogue = tokenizer.catalogue(catalogue_rows, exposures)
    model = OneRecV2(V2Config(codes=8, levels=3, d_model=16, layers=1, heads=2, kv_groups=1, embed=8))
    limits = Limits(short=5, positive=6, lifelong=7)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        save(path, model=model, tokenizer=tokenizer, catalogue=catalogue, limits=limits, metrics={})
        version = publish(connect(), path, data_time=datetime(2026, 1, 1, tzinfo=UTC))
    set_alias(connect(), "production", version)
    return version


if __name__ == "__main__":
    sys.stdout.write(main())
