import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from features.histories.windows import Limits
from models.training.align import AlignConfig, advantages, align, entropy, kept_sessions, logged_log_probs
from models.training.data import Contexts, RunData
from models.training.pretrain import PretrainConfig, pretrain
from models.training.stage import Job, Workshop

CONFIG = AlignConfig(epochs=8, gbpo_weight=3.0, batch_requests=16, learning_rate=5e-3, warmup_steps=2, threads=1)


@pytest.fixture(scope="module")
def pretrained(log, model_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    config = PretrainConfig(epochs=4, batch_requests=16, learning_rate=1e-2, warmup_steps=5, threads=1)
    pretrain(log.folder, log.catalogue, model_config, config, folder)
    return folder


def replaced(table: pa.Table, name: str, values: list) -> pa.Table:
    index = table.column_names.index(name)
    return table.set_column(index, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def preference(log, model_config, folder, tmp_path) -> float:
    """Mean log-probability of exposures with advantage +1, less that of all others."""
    job = Job(
        stage="align",
        data=log.folder,
        catalogue=log.catalogue,
        model=model_config,
        config=CONFIG,
        output=tmp_path,
        init=folder,
    )
    shop = Workshop(job)
    shop.model.eval()
    reward = advantages(shop.data, CONFIG).advantage
    batches, found, wanted = shop.batches(), [], []
    for step in range(len(batches)):
        example = shop.example(batches(step))
        with torch.no_grad():
            log_p = shop.model(example.context, example.targets).log_softmax(-1)
        chosen = log_p.gather(-1, example.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).sum(-1)
        found.append(chosen[example.mask].numpy())
        wanted.append(shop.of_exposures(reward, example)[example.mask].numpy())
    log_p, reward = np.concatenate(found), np.concatenate(wanted)
    return float(log_p[reward > 0].mean() - log_p[reward <= 0].mean())


def test_prefers_what_was_watched_and_reports_the_reward(log, model_config, pretrained, tmp_path) -> None:
    metrics = align(log.folder, log.catalogue, replace(CONFIG, epochs=24), tmp_path / "out", init=pretrained)
    before = preference(log, model_config, pretrained, tmp_path)
    assert preference(log, model_config, tmp_path / "out", tmp_path) > before + 0.3
    record = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"ntp", "gbpo", "entropy", "gbpo/ratio_mean", "gbpo/positives", "gbpo/negatives", "policy/kl"} <= set(record)
    assert 0 < metrics["reward/positive_share"] <= 0.25
    assert {"reward/tau", "reward/negative_share", "holdout/recall_level1_before"} <= set(metrics)


def test_the_guard_brings_back_the_weights_when_recall_collapses(log, pretrained, tmp_path) -> None:
    config = replace(CONFIG, learning_rate=3.0, warmup_steps=0, checkpoint_every=5, guard_targets=1, guard_drop=0.01)
    metrics = align(log.folder, log.catalogue, config, tmp_path, init=pretrained)
    assert "fell from" in metrics["stopped"]
    assert metrics["holdout/recall_level1"] >= metrics["holdout/recall_level1_before"] * 0.99
    if metrics["step"] == 0:
        before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path))
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_worse_half_of_the_sessions_is_dropped(log) -> None:
    data = RunData.load(log.folder)
    contexts = Contexts(data, log.catalogue, Limits())
    weights = kept_sessions(data, contexts, 0.5)
    frame = log.exposures.select(["request_id", "play_ms"]).to_pandas()
    frame["weight"] = weights
    sessions = frame.groupby("request_id").agg(play=("play_ms", "sum"), low=("weight", "min"), high=("weight", "max"))
    assert (sessions["low"] == sessions["high"]).all()
    assert (sessions["low"] == 0).sum() == len(sessions) // 2
    assert sessions["play"][sessions["low"] == 1].min() >= sessions["play"][sessions["low"] == 0].max()
    assert kept_sessions(data, contexts, 0.0).all()


def test_logged_probabilities_count_only_for_our_own_unchanged_items(log, write_log, tmp_path) -> None:
    data, catalogue = RunData.load(log.folder), log.catalogue
    table, n = data.exposures, data.exposures.num_rows
    sids = catalogue.sids[catalogue.rows(data.column("item_id"))].tolist()
    sids[2] = [7, 7, 7]  # the catalogue names this item otherwise now
    probs: list = [[-0.5, -1.0, -1.5]] * n
    probs[3] = None
    probs[4] = [-0.5, -1.0]
    table = replaced(table, "sid", sids)
    table = replaced(table, "log_probs", probs)
    table = replaced(table, "source", ["organic", *["onerec"] * (n - 1)])
    logged = logged_log_probs(RunData.load(write_log(tmp_path / "data", table).folder), catalogue)
    assert np.isnan(logged[[0, 2, 3, 4]]).all()
    assert np.allclose(logged[[1, *range(5, n)]], [-0.5, -1.0, -1.5])
    assert np.isnan(logged_log_probs(data, catalogue)).all()


def test_held_out_exposures_earn_nothing(log) -> None:
    data = RunData.load(log.folder)
    reward = advantages(data, CONFIG)
    assert (reward.advantage[data.held_out] == 0).all()
    assert set(np.unique(reward.advantage)) == {-1.0, 0.0, 1.0}


def test_entropy_is_that_of_the_first_code() -> None:
    logits = torch.zeros(3, 2, 3, 8)
    logits[1, :, 0, 0] = 100.0
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    assert entropy(logits, mask) == pytest.approx(np.log(8) / 2, abs=1e-4)


@pytest.mark.parametrize("wrong", [{"drop_sessions": 1.0}, {"guard_drop": 0.0}, {"gbpo_weight": -1.0}])
def test_impossible_settings_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AlignConfig(**wrong)
