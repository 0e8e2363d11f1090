"""The user model: fitted on a simulated log it recovers what the simulator knows; on a real one it is calibrated."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.datasets import Dataset, load
from features.schema import FLAGS
from features.world.simulator import Simulator, SimulatorConfig
from features.world.usermodel import UserModel, UserModelConfig


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(SimulatorConfig(users=400, items=600, history_days=6))


@pytest.fixture(scope="module")
def dataset(simulator: Simulator) -> Dataset:
    """A simulated log with 60 videos that were never shown."""
    log = simulator.history()
    unseen = pa.concat_tables([simulator.new_items(d) for d in range(6)]).slice(0, 60)
    items = pa.concat_tables([log.items, unseen])
    return Dataset(name="test log", items=items, users=log.users, exposures=log.exposures)


@pytest.fixture(scope="module")
def model(dataset: Dataset) -> UserModel:
    return UserModel.fit(dataset, UserModelConfig(users=100, drift_items=30, new_items_per_day=5))


def test_says_what_it_is_and_keeps_the_log(model: UserModel, dataset: Dataset) -> None:
    assert model.name == "user model fitted on test log"
    assert model.history().exposures.equals(dataset.exposures)
    assert model.start().isoformat() == "2026-01-11T00:00:00+00:00"


def test_recovers_tastes_better_than_popularity_alone(model: UserModel, simulator: Simulator) -> None:
    users = [v.user_id for v in model.visitors(0)][:40]
    shown = set(simulator.history().exposures["item_id"].to_pylist())
    items = [i for i in model.history().items["item_id"].to_pylist() if i in shown]
    fitted, true = model.true_affinity(users, items, 0), simulator.true_affinity(users, items, 0)
    assert np.corrcoef(fitted.ravel(), true.ravel())[0, 1] > 0.4
    personal = [np.corrcoef(f, t)[0, 1] for f, t in zip(fitted - fitted.mean(0), true - true.mean(0), strict=True)]
    assert np.mean(personal) > 0.2


def test_predictions_hold_on_days_it_has_not_seen(model: UserModel) -> None:
    report = model.calibration()
    assert report["correlation"] > 0.2
    assert report["mean_absolute_gap"] < 0.05
    observed = [d["observed_percentile"] for d in report["deciles"]]
    assert observed[-1] > observed[0] + 0.2


def test_unshown_videos_arrive_once_and_most_on_the_drift_day(model: UserModel, dataset: Dataset) -> None:
    batches = [model.new_items(d) for d in range(6)]
    ids = [i for b in batches for i in b["item_id"].to_pylist()]
    assert model.new_items(3).num_rows == 30
    assert len(ids) == len(set(ids))
    assert not set(ids) & set(dataset.exposures["item_id"].to_pylist())
    assert not set(ids) & set(model.history().items["item_id"].to_pylist())
    assert batches[1]["upload_time"][0].as_py() > model.start()


def test_watching_is_repeatable_and_drift_changes_tastes(model: UserModel) -> None:
    visits = model.visitors(0)
    assert [v.time_ms for v in visits] == sorted(v.time_ms for v in visits)
    ids, user = model.history().items["item_id"].to_pylist()[:10], visits[0].user_id
    first, again = model.watch(0, user, ids, 0, 0), model.watch(0, user, ids, 0, 0)
    assert first.play_ms.tolist() == again.play_ms.tolist()
    assert set(first.flags) == set(FLAGS)
    users = sorted({v.user_id for v in visits})
    changed = np.abs(model.true_affinity(users, ids, 3) - model.true_affinity(users, ids, 2)).max(axis=1) > 1e-9
    assert 0.4 < changed.mean() < 0.8
    with pytest.raises(ValueError, match="not uploaded yet"):
        model.watch(0, user, model.new_items(3)["item_id"].to_pylist(), 0, 0)


def test_a_list_is_worth_what_its_videos_are(model: UserModel) -> None:
    users, items = model.population()[:4], model.history().items["item_id"].to_pylist()
    lists = [items[3 * row : 3 * row + 10] for row in range(4)]
    found = model.expected(users, lists, 0)
    each = [model.expected_play_ms([user], own, 0).sum() / 1000 for user, own in zip(users, lists, strict=True)]
    np.testing.assert_allclose(found["play_s"], each)
    assert (found["stay_s"] <= found["play_s"] + 1e-9).all()


def test_logs_too_small_to_fit_are_refused(dataset: Dataset) -> None:
    def cut(exposures: pa.Table) -> Dataset:
        return Dataset(name="cut", items=dataset.items, users=dataset.users, exposures=exposures)

    with pytest.raises(ValueError, match=r"needs at least 2 users"):
        UserModel.fit(cut(dataset.exposures.slice(0, 1)))
    with pytest.raises(ValueError, match=r"50 exposures .* at least 200"):
        UserModel.fit(cut(dataset.exposures.slice(0, 50)))
    with pytest.raises(ValueError, match=r"0 users"):
        UserModel.fit(cut(dataset.exposures.slice(0, 0)))


def test_real_log_is_reproduced_by_decile(kuairand: Path) -> None:
    model = UserModel.fit(load(kuairand))
    report = model.calibration()
    assert report["correlation"] > 0.4
    assert report["mean_absolute_gap"] < 0.03
    gaps, views = [bucket["gap"] for bucket in report["buckets"]], [bucket["views"] for bucket in report["buckets"]]
    assert np.average(gaps, weights=views) < 0.04
    assert abs(report["long_view"]["predicted"] - report["long_view"]["observed"]) < 0.02
    assert len(model.visitors(0)) > 900


def test_calibration_tells_play_long_views_and_returns_apart(model: UserModel) -> None:
    report = model.calibration()
    assert sum(bucket["views"] for bucket in report["buckets"]) <= report["rows"]
    for bucket in report["buckets"]:
        assert bucket["gap"] < 0.12
        assert bucket["predicted_quantiles"] == sorted(bucket["predicted_quantiles"])
        assert abs(bucket["predicted_long_view"] - bucket["observed_long_view"]) < 0.1
    assert abs(report["long_view"]["predicted"] - report["long_view"]["observed"]) < 0.05
    assert abs(report["returns"]["predicted"] - report["returns"]["observed"]) < 0.12
