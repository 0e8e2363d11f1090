"""The reward model's way through a run: trained in the align step, carried by the bundle, used to judge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from features.runs import Run
from features.storage import connect
from models.bundle import Bundle
from models.release import evaluate_run
from models.stages import align_run, pretrain_run
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.training.tokenizer import write_tokens

SMALL = {
    "pretrain.max_steps": 3,
    "align.max_steps": 3,
    "reward.epochs": 3,
    "reward.learning_rate": 1e-2,
    "reward.least_auc": 0.6,
    "reward.least_positives": 10,
}


def test_a_run_trains_it_and_the_bundle_carries_it(
    environment, log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(connect(), "run")

    def tokens(folder: Path) -> dict:
        items, exposures = (pq.read_table(log.folder / f"{name}.parquet") for name in ("items", "exposures"))
        tokenizer = Tokenizer.fit(items, exposures, TokenizerConfig(levels=3, codes=8, dim=64, seed=0))
        write_tokens(folder, tokenizer, tokenizer.catalogue(items, exposures))
        return {}

    monkeypatch.setattr("models.infra.validate", lambda candidate: {"passed": [candidate.version], "failed": []})
    run.stage(
        "data",
        {"end": "2026-01-03T00:00:00+00:00"},
        lambda folder: shutil.copytree(log.folder, folder, dirs_exist_ok=True) and {},
    )
    run.stage("tokenizer", {}, tokens)
    options = {"preset": "tiny", "overrides": json.dumps(SMALL)}
    pretrained = pretrain_run("run", tokens="digest", base="", **options)
    aligned = align_run("run", pretrained=pretrained, **options)
    found = run.summary("reward")
    assert found["reward/auc"]["long_view"]["value"] > 0.6
    assert align_run("run", pretrained=pretrained, **options) == aligned
    assert run.summary("reward") == found
    evaluate_run("run", aligned=aligned, base="")
    evaluated = run.summary("evaluate")
    assert run.summary("infra")["passed"] == [evaluated["bundle"]["version"]], "the server was started on what it is"
    assert run.summary("infra")["bundle"] == evaluated["bundle"]
    assert {"reward", "reward_lift", "calibration_error", "latency_ms"} <= set(evaluated["candidate"])
    bundle = Bundle.load(run.fetch("evaluate", tmp_path) / "bundle")
    assert bundle.reward is not None
    assert bundle.reward.session is None
    assert bundle.reward.metrics["reward/auc"]["long_view"] == found["reward/auc"]["long_view"]
    bundle.reward.check(bundle.catalogue)
    assert json.loads((tmp_path / "evaluate/bundle/metrics.json").read_text())["training"]["reward"] == found
    assert np.isfinite(bundle.reward.numbers).all()
