import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.pathways import to_tensors
from models.rewards.inputs import item_numbers
from models.rewards.pscore import OBJECTIVES, fused_loss
from models.rewards.reward import REWARD, RewardMismatch, load_reward, save_reward
from models.tokenizer.vocabulary import Catalogue
from models.training.data import RunData
from models.training.fusion import RefitConfig, refit, search
from models.training.judged import Judged, measure, predict
from models.training.reward import RewardConfig, RewardTooWeak, assembled, fit_pscore, require, train_reward

CONFIG = RewardConfig(
    epochs=6, batch_requests=32, learning_rate=1e-2, d_model=16, heads=2, tower=8, embed=4, dropout=0.0, threads=1,
    warmup_steps=5, sessions=True,
)  # fmt: skip
X = OBJECTIVES.index("long_view")


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    return folder, train_reward(log.folder, log.catalogue, CONFIG, folder)


@pytest.fixture(scope="module")
def judged(log) -> Judged:
    data = RunData.load(log.folder)
    return Judged(data, log.catalogue, ~data.held_out)


def test_it_learns_who_likes_what_and_says_how_well(trained) -> None:
    _, metrics = trained
    watched = metrics["reward/auc"]["long_view"]
    assert watched["low"] <= watched["value"] <= watched["high"]
    assert watched["value"] > 0.8
    assert 10 <= watched["positives"] < watched["rows"]
    assert metrics["reward/auc"]["like"]["value"] is None  # nobody liked anything
    assert metrics["reward/auc"]["like"]["positives"] == 0
    assert metrics["reward/fused_auc"]["long_view"] > 0.7
    assert metrics["reward/calibration_error"]["long_view"] < 0.2
    stay = metrics["reward/stay"]
    assert stay["rho"] > 0.3
    assert 0.7 < stay["predicted_s"] / stay["played_s"] < 1.4
    assert set(metrics["session"]["auc"]) == {"swt", "vtr", "wtr", "ltr"}


def test_a_finished_training_is_not_run_again(log, trained) -> None:
    folder, metrics = trained
    before = (folder / REWARD).read_bytes()
    assert train_reward(log.folder, log.catalogue, CONFIG, folder) == json.loads((folder / "metrics.json").read_text())
    assert (folder / REWARD).read_bytes() == before
    assert metrics["step"] > 0


def test_the_saved_model_judges_as_the_trained_one(log, trained, judged, tmp_path) -> None:
    reward = load_reward(trained[0] / REWARD, log.catalogue)
    example = judged.example(judged.batches(~judged.train, CONFIG, shuffle=False)(0))
    rows = example.batch.items
    found = reward.judge(example.context, rows, log.catalogue)
    save_reward(tmp_path / REWARD, reward)
    again = load_reward(tmp_path / REWARD, log.catalogue).judge(example.context, rows, log.catalogue)
    assert torch.equal(found.p, again.p)
    loaded = load_reward(tmp_path / REWARD, log.catalogue)
    seconds = reward.seconds(example.context, rows, log.catalogue)
    np.testing.assert_array_equal(seconds, loaded.seconds(example.context, rows, log.catalogue))
    assert (seconds[rows >= 0] >= 0).all()
    assert (seconds[rows >= 0] <= 1.5 * log.catalogue.duration_ms[rows[rows >= 0]] / 1000).all()
    save_reward(tmp_path / REWARD, replace(reward, stay=None))
    with pytest.raises(ValueError, match="knows no seconds"):
        load_reward(tmp_path / REWARD, log.catalogue).seconds(example.context, rows, log.catalogue)
    assert found.objectives.shape == (*rows.shape, len(OBJECTIVES))
    lists = reward.judge_sessions(example.context, rows, log.catalogue)
    assert lists.shape == (len(rows),)
    assert ((lists > 0) & (lists < 1)).all()


def test_a_reward_model_of_another_bundle_is_refused(log, trained) -> None:
    sids = log.catalogue.sids.copy()
    sids[[0, 1]] = sids[[1, 0]]
    with pytest.raises(RewardMismatch, match="belongs to another bundle"):
        load_reward(trained[0] / REWARD, replace(log.catalogue, sids=sids))
    fewer = Catalogue.from_items(log.catalogue.items[:9], sids=sids[:9], codes=8)
    with pytest.raises(RewardMismatch, match="trained on 60 items"):
        load_reward(trained[0] / REWARD, fewer)
    save_file({"x": torch.zeros(1)}, trained[0] / "other.safetensors")
    with pytest.raises(RewardMismatch, match="no reward model"):
        load_reward(trained[0] / "other.safetensors", log.catalogue)


def test_items_appended_since_are_judged_by_their_content(log, trained, judged) -> None:
    reward = load_reward(trained[0] / REWARD, log.catalogue)
    items = log.catalogue.items.slice(0, 2)
    new = items.set_column(0, items.schema.field(0), [["new0", "new1"]])
    grown = log.catalogue.append(new, log.catalogue.sids[:2])
    reward.check(grown)
    context = to_tensors(judged.contexts.of(judged.contexts.trainable[-3:]), grown)
    rows = np.array([[0, 60], [1, 61], [5, -1]])
    found = reward.judge(context, rows, grown)
    assert found.p.isfinite().all()
    old = reward.judge(context, rows[:, :1], log.catalogue)
    torch.testing.assert_close(found.p[:, :1], old.p)


def test_an_exposure_knows_neither_its_own_label_nor_the_future(log, judged) -> None:
    times, rows = judged.data.times_ms, judged.rows
    for exposure in range(0, len(times), 97):
        earlier = (rows == rows[exposure]) & (times < times[exposure])
        counts = np.array([[earlier.sum(), *judged.labels[earlier].sum(0)]])
        expected = item_numbers(counts, log.catalogue.duration_ms[rows[[exposure]]], judged.rates)
        np.testing.assert_allclose(judged.numbers[exposure], expected[0], atol=1e-5)
    now = judged.numbers_now()
    counts = np.array([[(judged.train & (rows == 7)).sum(), *judged.labels[judged.train & (rows == 7)].sum(0)]])
    expected = item_numbers(counts, log.catalogue.duration_ms[[7]], judged.rates)
    np.testing.assert_allclose(now[7], expected[0], atol=1e-5)


def test_the_gate_refuses_a_weak_reward_model_and_says_why(trained) -> None:
    _, metrics = trained
    require(metrics, CONFIG)
    weak = json.loads(json.dumps(metrics))
    weak["reward/auc"]["long_view"] |= {"value": 0.51, "positives": 400, "rows": 1000}
    with pytest.raises(RewardTooWeak, match=r"AUC of long_view is 0\.510 on 1000 .* below 0\.55"):
        require(weak, CONFIG)
    require(weak, replace(CONFIG, least_auc=0.0))
    weak["reward/auc"]["long_view"]["positives"] = 99  # nobody can tell
    require(weak, CONFIG)
    require(metrics, replace(CONFIG, gate="like", least_auc=0.9))  # never happened


def test_other_weights_make_another_p_from_the_same_towers(judged, tmp_path) -> None:
    model, _ = fit_pscore(judged, CONFIG, tmp_path, {})
    known, held = (predict(model, judged, select, CONFIG) for select in (judged.train, ~judged.train))
    assert len(held.rows) == (~judged.train).sum()
    config = RefitConfig(steps=60, batch=256)
    only = {name: np.eye(len(OBJECTIVES))[OBJECTIVES.index(name)] for name in ("long_view", "dislike")}
    costs = {}
    for name, weights in only.items():
        fused = refit(model.fuse, known, weights, config)(torch.from_numpy(known.features)).squeeze(-1)
        for other, of_other in only.items():
            labels, ones = torch.from_numpy(known.labels), torch.ones(len(fused))
            costs[name, other] = float(fused_loss(fused, labels, torch.from_numpy(of_other).float(), ones))
    assert costs["long_view", "long_view"] < costs["dislike", "long_view"]
    assert costs["dislike", "dislike"] < costs["long_view", "dislike"]
    path, ceiling = search(model.fuse, known, held, (judged.rates > 0).astype(float), rounds=2, config=config)
    assert np.isfinite(ceiling).sum() == np.isfinite(path[0].aucs).sum() >= 2
    assert path[0].aucs[X] > 0.7


def test_calibration_is_fitted_on_half_of_the_users(judged, trained, log) -> None:
    reward = load_reward(trained[0] / REWARD, log.catalogue)
    metrics, (scale, shift) = measure(predict(reward.pscore, judged, ~judged.train, CONFIG))
    torch.testing.assert_close(scale, reward.pscore.get_buffer("scale"))
    torch.testing.assert_close(shift, reward.pscore.get_buffer("shift"))
    assert scale[OBJECTIVES.index("like")] == 1  # too rare to tell
    assert metrics["reward/auc"]["long_view"]["value"] == pytest.approx(
        trained[1]["reward/auc"]["long_view"]["value"], abs=1e-6
    )
    assert assembled(judged, reward.pscore, reward.stay, None, metrics).sids == reward.sids


@pytest.mark.parametrize("wrong", [{"gate": "stay"}, {"least_auc": 1.0}, {"weights": (1.0,)}, {"weights": (0.0,) * 10}])
def test_impossible_settings_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RewardConfig(**wrong)
