import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from features.histories.windows import Limits
from features.settings import settings as services
from models.rewards.reward import RewardMismatch, save_reward
from models.training import groups
from models.training.align import advantages, align, kept_sessions, logged_log_probs, mixed, rolled_out
from models.training.alignment import AlignConfig
from models.training.checkpoint import WrongCheckpoint
from models.training.data import Contexts, RunData
from models.training.pretrain import PretrainConfig, pretrain
from models.training.rollout_server import RolloutsUnavailable
from models.training.stage import Job, Workshop

CONFIG = AlignConfig(epochs=8, policy_weight=3.0, batch_requests=16, learning_rate=5e-3, warmup_steps=2, threads=1)


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


@pytest.mark.parametrize("wrong", [{"drop_sessions": 1.0}, {"guard_drop": 0.0}, {"policy_weight": 0.0}])
def test_impossible_settings_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AlignConfig(**wrong)


@pytest.fixture(scope="module")
def reward(log, random_reward, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    save_reward(folder / "reward.safetensors", random_reward(log.catalogue))
    return folder


ROLLED = replace(
    CONFIG,
    epochs=1,
    max_steps=4,
    objective="ecpo",
    signal="hybrid",
    users_share=0.5,
    group=8,
    rollout_requests=4,
    push_every=2,
    constrained=False,
    format="random",
    log_every=1,
    checkpoint_every=2,
    guard_targets=1,
    guard_drop=1.0,
)


def test_roll_outs_beside_exposures_with_everything_logged(log, pretrained, reward, tmp_path) -> None:
    rules = "[[rule]]\nname = 't1'\nattribute = 'tag'\nvalues = ['t1']\ntarget_share = 0.9\nboost = 2.0"
    config = replace(ROLLED, rules=rules)
    metrics = align(log.folder, log.catalogue, config, tmp_path / "out", init=pretrained, reward=reward)
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["rollouts/staleness"] for record in records] == [0, 1, 0, 1]
    wanted = {
        "ntp",
        "legality",
        "holdout/recall_level1",
        "policy/kl_pretrained",
        "policy/entropy",
        "ecpo/clip_fraction",
    }
    wanted |= {"policy/advantage_std", "rollouts/legality", "rollouts/wait_share", "rollouts/samples_per_s"}
    assert all(wanted | {"feedback/gbpo/bounded_share", "format/kept_share"} <= set(record) for record in records)
    assert {"rollouts/samples_per_s", "rollouts/wait_share", "legality"} <= set(metrics)
    assert 0 < metrics["share/t1"] < 0.9
    assert metrics["industrial/t1"] > 0
    with pytest.raises(WrongCheckpoint, match="config"):
        align(log.folder, log.catalogue, replace(ROLLED, group=9), tmp_path / "out", init=pretrained, reward=reward)
    with pytest.raises(ValueError, match="needs a reward model"):
        align(log.folder, log.catalogue, ROLLED, tmp_path / "none", init=pretrained)


def test_a_killed_alignment_goes_on_exactly_where_weights_were_pushed(
    log, pretrained, reward, tmp_path, monkeypatch
) -> None:
    align(log.folder, log.catalogue, ROLLED, tmp_path / "whole", init=pretrained, reward=reward)
    judge, calls = groups.rewarded, []

    def dying(*given):
        def judged(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return judge(*given)(*arguments)

        return judged

    monkeypatch.setattr("models.training.align.rewarded", dying)
    with pytest.raises(KeyboardInterrupt):
        align(log.folder, log.catalogue, ROLLED, tmp_path / "cut", init=pretrained, reward=reward)
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    align(log.folder, log.catalogue, ROLLED, tmp_path / "cut", init=pretrained, reward=reward)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_reward_model_of_another_bundle_is_refused(log, pretrained, random_reward, tmp_path) -> None:
    other = replace(log.catalogue, sids=log.catalogue.sids[::-1].copy())
    save_reward(tmp_path / "reward.safetensors", random_reward(other))
    with pytest.raises(RewardMismatch, match="belongs to another bundle"):
        align(log.folder, log.catalogue, ROLLED, tmp_path / "out", init=pretrained, reward=tmp_path)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_configured_server_is_asked_and_waited_for(log, pretrained, reward, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ONEREC_ROLLOUT_URL", "http://127.0.0.1:9")
    services.cache_clear()
    try:
        config = replace(ROLLED, patience_s=0.0)
        with pytest.raises(RolloutsUnavailable, match=r"127\.0\.0\.1:9 did not give a push of weights for 0 s"):
            align(log.folder, log.catalogue, config, tmp_path, init=pretrained, reward=reward)
    finally:
        services.cache_clear()
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_rolled_out_are_requests_of_some_users_and_none_held_out(log) -> None:
    data = RunData.load(log.folder)
    contexts = Contexts(data, log.catalogue, Limits())
    half = rolled_out(data, contexts, replace(ROLLED, users_share=0.5))
    everybody = rolled_out(data, contexts, replace(ROLLED, users_share=1.0))
    first = contexts.requests.rows[contexts.requests.offsets[everybody]]
    assert not data.held_out[first].any()
    assert (
        len(everybody) == (~data.held_out[contexts.requests.rows[contexts.requests.offsets[contexts.trainable]]]).sum()
    )
    users = set(contexts.requests.user[half])
    assert 0 < len(users) < 24
    assert set(half) == {request for request in everybody if contexts.requests.user[request] in users}
    with pytest.raises(ValueError, match=r"raise align\.users_share"):
        rolled_out(data, contexts, replace(ROLLED, users_share=0.0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]))
def test_our_share_of_the_exposures_is_as_configured_and_no_more_is_left_out(ours, theirs, share) -> None:
    own = np.r_[np.ones(ours + 5, bool), np.zeros(theirs + 5, bool)]
    select = np.ones(len(own), bool)
    select[[0, 1, 2, 3, 4, -1, -2, -3, -4, -5]] = False
    possible = (ours if share == 1 else theirs) if share in (0, 1) else ours and theirs
    if not possible:
        with pytest.raises(ValueError, match="own_share"):
            mixed(own, select, share, 0)
        return
    kept = mixed(own, select, share, 0)
    assert not (kept & ~select).any()
    total = kept.sum()
    assert abs((kept & own).sum() - share * total) <= 1
    assert (kept & own).sum() == ours or (kept & ~own).sum() == theirs


def test_the_policy_learns_from_the_mix_and_the_anchor_from_all(log, write_log, pretrained, tmp_path) -> None:
    table, n = RunData.load(log.folder).exposures, len(log.exposures)
    rng = np.random.default_rng(0)
    table = replaced(table, "source", np.where(rng.random(n) < 0.5, "onerec", "organic").tolist())
    data = write_log(tmp_path / "data", table)
    found = {}
    for share in (None, 0.25):
        config = replace(CONFIG, epochs=1, max_steps=3, own_share=share, log_every=3)
        found[share] = align(data.folder, data.catalogue, config, tmp_path / str(share), init=pretrained)
    assert found[0.25]["gbpo/positives"] < found[None]["gbpo/positives"]
    assert found[0.25]["examples"] == found[None]["examples"]
