"""The component ``tokenize`` against a real object store: a folder of data in, SIDs, metrics and a card out."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.tokenizer import tokenize
from features.runs import Run
from features.schema import EXPOSURE, FLAGS, ITEM, conform
from features.storage import Storage
from models.tokenizer.tokenizer import Tokenizer
from models.training.tokenizer import read_tokens

OVERRIDES = json.dumps(
    {"tokenizer.codes": 8, "tokenizer.dim": 8, "tokenizer.layers": 1, "tokenizer.max_steps": 4, "tokenizer.width": 16}
)


class Metrics(dict[str, float]):
    def log_metric(self, name: str, value: float) -> None:
        self[name] = value


def store_data(s3: Storage, run_id: str, count: int) -> str:
    """A run's data stage: ``count`` items, the first 40 watched by 12 users; returns its digest."""
    rng = np.random.default_rng(0)
    items = pa.table(
        {
            "item_id": [f"i{k}" for k in range(count)],
            "tags": [[f"t{k % 5}"] for k in range(count)],
            "duration_ms": rng.integers(5_000, 60_000, count),
        }
    )
    n = 400
    rows = rng.integers(0, 40, n)
    exposures = pa.table(
        {
            "exposure_id": [f"e{k}" for k in range(n)],
            "request_id": [f"r{k}" for k in range(n)],
            "user_id": [f"u{k % 12}" for k in range(n)],
            "item_id": [f"i{row}" for row in rows],
            "position": np.zeros(n, np.int32),
            "event_time": 1_767_225_600_000 + np.arange(n) * 60_000,
            "source": ["organic"] * n,
            "duration_ms": np.full(n, 20_000),
            "play_ms": np.full(n, 1_000),
            **{flag: rng.random(n) < 0.3 if flag == "long_view" else np.zeros(n, bool) for flag in FLAGS},
        }
    )

    def work(folder: Path) -> dict[str, int]:
        pq.write_table(conform(items, ITEM), folder / "items.parquet")
        pq.write_table(conform(exposures, EXPOSURE), folder / "exposures.parquet")
        return {"exposures": n}

    return Run(s3, run_id).stage("data", {}, work)


@pytest.mark.usefixtures("environment")
def test_tokenize_stores_sids_and_hands_out_metrics_and_card(s3: Storage, tmp_path: Path) -> None:
    data = store_data(s3, "r1", 40)
    metrics, card = Metrics(), SimpleNamespace(path=str(tmp_path / "card.html"))
    asked = {"run_id": "r1", "data": data, "preset": "tiny", "overrides": OVERRIDES, "base": "", "replaces": ""}
    digest = tokenize.python_func(**asked, metrics=metrics, card=card)
    assert {"perplexity/level1", "utilisation/level3", "unique_sid_share", "mse", "alignment/loss"} <= set(metrics)
    assert all(isinstance(value, float) for value in metrics.values())
    assert (tmp_path / "card.html").read_text().startswith("<!doctype html>")
    stored = {Path(key).name for key in s3.keys("runs/r1/tokenizer/")}
    assert {"tokenizer.safetensors", "sids.parquet", "items.parquet", "card.html", "metrics.json"} <= stored
    assert not any("alignment" in name for name in stored), "the checkpoint is no part of the outcome"
    again = Metrics()
    assert tokenize.python_func(**asked, metrics=again, card=card) == digest
    assert again == metrics


@pytest.mark.usefixtures("environment")
def test_with_a_base_new_items_are_appended(s3: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(path=str(tmp_path / "card.html"))
    asked = {"preset": "tiny", "overrides": OVERRIDES, "replaces": "", "metrics": Metrics(), "card": card}
    tokenize.python_func(run_id="r1", data=store_data(s3, "r1", 40), base="", **asked)
    first = Run(s3, "r1").fetch("tokenizer", tmp_path / "first")
    base = SimpleNamespace(tokenizer=Tokenizer.load(first / "tokenizer.safetensors"), catalogue=read_tokens(first))
    monkeypatch.setattr("models.stages.open_bundle", lambda version: base)
    tokenize.python_func(run_id="r2", data=store_data(s3, "r2", 46), base="v1", **asked)
    second = Run(s3, "r2").fetch("tokenizer", tmp_path / "second")
    longer = read_tokens(second)
    assert len(longer) == 46
    assert (longer.sids[:40] == base.catalogue.sids).all()
    assert (first / "tokenizer.safetensors").read_bytes() == (second / "tokenizer.safetensors").read_bytes()
    assert (second / "card.html").exists()


@pytest.mark.usefixtures("environment")
def test_new_codebooks_keep_the_names_of_those_they_replace(
    s3: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(path=str(tmp_path / "card.html"))
    asked = {"preset": "tiny", "base": "", "card": card}
    tokenize.python_func(
        run_id="r1", data=store_data(s3, "r1", 40), overrides=OVERRIDES, replaces="", metrics=Metrics(), **asked
    )
    first = Run(s3, "r1").fetch("tokenizer", tmp_path / "first")
    old = SimpleNamespace(tokenizer=Tokenizer.load(first / "tokenizer.safetensors"), catalogue=read_tokens(first))
    monkeypatch.setattr("models.stages.open_bundle", lambda version: old)
    other = json.dumps(json.loads(OVERRIDES) | {"tokenizer.seed": 7})
    shares = {}
    for run_id, replaces in (("r2", ""), ("r3", "v1")):
        metrics, data = Metrics(), store_data(s3, run_id, 46)
        tokenize.python_func(run_id=run_id, data=data, overrides=other, replaces=replaces, metrics=metrics, **asked)
        made = Run(s3, run_id).fetch("tokenizer", tmp_path / run_id)
        catalogue = read_tokens(made)
        shares[run_id] = (catalogue.sids[:40, 0] == old.catalogue.sids[:, 0]).mean()
        assert catalogue.codebook == Tokenizer.load(made / "tokenizer.safetensors").quantizer.version
    assert shares["r3"] > shares["r2"]
    assert metrics["kept/codes/level1"] == pytest.approx(shares["r3"])
    mapping = pq.read_table(made / "sid_mapping.parquet").to_pydict()
    assert mapping["item_id"] == old.catalogue.item_ids
    assert mapping["old_sid"] == old.catalogue.sids.tolist()
    assert mapping["new_sid"] == catalogue.sids[:40].tolist()
