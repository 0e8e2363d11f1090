import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from models.onerec_v2 import OneRecV2, V2Config
from models.training import pretrain as module
from models.training.checkpoint import CHECKPOINT, WrongCheckpoint
from models.training.data import RunData
from models.training.loop import TrainingDiverged
from models.training.pretrain import PretrainConfig, pretrain
from models.training.stage import Job, Workshop, play_quantile

CONFIG = PretrainConfig(epochs=6, batch_requests=16, learning_rate=1e-2, warmup_steps=5, threads=1, checkpoint_every=7)


def outcome(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_learns_and_writes_what_a_bundle_needs(log, model_config, tmp_path) -> None:
    metrics = pretrain(log.folder, log.catalogue, model_config, CONFIG, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < np.log(8) * 0.8 < records[0]["loss"] * 1.1
    assert metrics["holdout/targets"] > 0
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    OneRecV2(V2Config(**config["model"])).load_state_dict(outcome(tmp_path))
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_finished_run_answers_at_once_and_another_config_is_refused(log, model_config, tmp_path, monkeypatch) -> None:
    config = replace(CONFIG, max_steps=3)
    metrics = pretrain(log.folder, log.catalogue, model_config, config, tmp_path)
    monkeypatch.setattr(module, "fit", lambda *_: pytest.fail("it trained again"))
    assert pretrain(log.folder, log.catalogue, model_config, config, tmp_path) == metrics
    with pytest.raises(WrongCheckpoint, match="other config"):
        pretrain(log.folder, log.catalogue, model_config, replace(config, seed=1), tmp_path)


def test_a_killed_run_continues_to_the_same_weights(log, model_config, tmp_path, monkeypatch) -> None:
    config = replace(CONFIG, epochs=1, max_steps=12, checkpoint_every=4)
    pretrain(log.folder, log.catalogue, model_config, config, tmp_path / "whole")
    build = Workshop.example

    def dies(self, batch):
        if len(calls) == 10:
            raise KeyboardInterrupt
        calls.append(1)
        return build(self, batch)

    calls: list[int] = []
    monkeypatch.setattr(Workshop, "example", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain(log.folder, log.catalogue, model_config, config, tmp_path / "killed")
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    monkeypatch.setattr(Workshop, "example", build)
    pretrain(log.folder, log.catalogue, model_config, config, tmp_path / "killed")
    assert same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_goes_on_from_earlier_weights(log, model_config, tmp_path) -> None:
    first = pretrain(log.folder, log.catalogue, model_config, replace(CONFIG, epochs=4), tmp_path / "first")
    short = replace(CONFIG, max_steps=2, learning_rate=1e-4)
    second = pretrain(log.folder, log.catalogue, model_config, short, tmp_path / "second", init=tmp_path / "first")
    scratch = pretrain(log.folder, log.catalogue, model_config, short, tmp_path / "scratch")
    assert second["holdout/loss"] == pytest.approx(first["holdout/loss"], abs=0.05)
    assert second["holdout/loss"] < scratch["holdout/loss"] - 0.1


def test_weights_of_another_model_are_refused(log, model_config, tmp_path) -> None:
    pretrain(log.folder, log.catalogue, model_config, replace(CONFIG, max_steps=1), tmp_path / "first")
    other = replace(model_config, d_model=32)
    with pytest.raises(ValueError, match="other d_model"):
        pretrain(log.folder, log.catalogue, other, CONFIG, tmp_path / "second", init=tmp_path / "first")
    with pytest.raises(ValueError, match="codes"):
        pretrain(log.folder, log.catalogue, replace(model_config, codes=9), CONFIG, tmp_path / "third")


def workshop(log, model_config: V2Config, config: PretrainConfig, folder: Path) -> Workshop:
    job = Job(
        stage="pretrain",
        data=log.folder,
        catalogue=log.catalogue,
        model=model_config,
        config=config,
        output=folder,
        init=None,
    )
    return Workshop(job)


def test_held_out_requests_are_no_targets(log, model_config, tmp_path) -> None:
    shop = workshop(log, model_config, CONFIG, tmp_path)
    batches = shop.batches()
    targets = np.concatenate([batches(step).exposures.ravel() for step in range(len(batches))])
    assert shop.data.held_out.any()
    assert not shop.data.held_out[targets[targets >= 0]].any()


def test_engaged_weights_follow_play_time_and_positives_count_more(log, model_config, tmp_path) -> None:
    config = replace(CONFIG, exposure_weight="engaged", positive_weight=3.0)
    shop = workshop(log, model_config, config, tmp_path)
    positive = shop.data.positive()
    assert shop.weights[positive].min() > shop.weights[~positive].max()
    assert shop.weights.min() > 0
    assert shop.weights.mean() == pytest.approx(1, rel=1e-4)


def test_watched_weights_follow_seconds_and_propensity_lifts_rare_items(log, model_config, tmp_path) -> None:
    def weights(power: float) -> np.ndarray:
        config = replace(CONFIG, exposure_weight="watched", propensity_power=power)
        return workshop(log, model_config, config, tmp_path).weights

    data = RunData.load(log.folder)
    plain, corrected = weights(0.0), weights(1.0)
    seconds = np.clip(data.column("play_ms") / 1000, 0.2, 240)
    assert np.corrcoef(plain, seconds)[0, 1] > 0.999
    counts = pd.Series(data.column("item_id")).map(pd.Series(data.column("item_id")).value_counts()).to_numpy()
    assert corrected / plain == pytest.approx((corrected / plain * (counts + 10))[0] / (counts + 10), rel=1e-3)


def test_play_quantile_is_a_mid_rank_inside_its_duration_bucket() -> None:
    play = np.array([5, 1, 1, 9, 100, 200])
    duration = np.array([1000, 1000, 1000, 1000, 90_000, 90_000])
    assert play_quantile(play, duration) == pytest.approx([2.5 / 4, 0.25, 0.25, 3.5 / 4, 0.25, 0.75])
    assert len(play_quantile(play[:0], duration[:0])) == 0


def test_divergence_is_an_error_with_advice(log, model_config, tmp_path) -> None:
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        pretrain(log.folder, log.catalogue, model_config, replace(CONFIG, learning_rate=float("inf")), tmp_path)
