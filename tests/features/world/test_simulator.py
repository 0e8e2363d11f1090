"""The simulated world: its organic marginals, its determinism, and that better recommendations pay."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from features.schema import FLAGS
from features.world.calibration import FLAG_RATES, LONG_VIEW_RATES, PLAY_PROBABILITIES, PLAY_RATIOS, ZERO_PLAY
from features.world.responses import bucket_of
from features.world.simulator import Simulator, SimulatorConfig

SMALL = {"users": 120, "items": 500, "history_days": 4, "drift_items": 80}


@pytest.fixture(scope="module")
def views() -> pd.DataFrame:
    frame = Simulator().history().exposures.to_pandas()
    return frame.assign(bucket=bucket_of(frame.duration_ms.to_numpy()), ratio=frame.play_ms / frame.duration_ms)


def test_organic_play_follows_the_measured_quantiles(views: pd.DataFrame) -> None:
    assert 55_000 < len(views) < 90_000
    for bucket, own in views.groupby("bucket"):
        if len(own) < 2000:
            continue
        assert (own.play_ms == 0).mean() == pytest.approx(ZERO_PLAY[bucket], abs=0.02)
        for probability, ratio in zip(PLAY_PROBABILITIES[1:-3], PLAY_RATIOS[bucket][1:-3], strict=True):
            assert (own.ratio <= ratio).mean() == pytest.approx(probability, abs=0.04)


def test_organic_feedback_follows_the_measured_rates(views: pd.DataFrame) -> None:
    share = np.bincount(views.bucket, minlength=7) / len(views)
    for flag, rates in {**FLAG_RATES, "long_view": LONG_VIEW_RATES}.items():
        expected = float(share @ np.asarray(rates))
        noise = 4 * np.sqrt(expected / len(views))
        assert views[flag].mean() == pytest.approx(expected, abs=noise + 0.06 * expected)
    assert views.like.corr(views.ratio.clip(upper=2)) == pytest.approx(0.12, abs=0.05)
    assert views.ratio[views.dislike].rank().mean() < views.ratio.rank().mean()


def test_popularity_and_sessions_look_like_the_real_log(views: pd.DataFrame) -> None:
    counts = views.item_id.value_counts()
    assert counts.iloc[:20].sum() / len(views) == pytest.approx(0.17, abs=0.03)
    assert counts.iloc[:200].sum() / len(views) == pytest.approx(0.60, abs=0.06)
    assert not views.duplicated(["user_id", "item_id"]).any(), "the logging policy repeats nothing"
    day = views.event_time.dt.floor("D")
    assert views.groupby([day, "user_id"]).size().mean() == pytest.approx(20, abs=6)
    assert views.event_time.is_monotonic_increasing


def test_equal_configurations_give_equal_worlds() -> None:
    one, two = Simulator(SimulatorConfig(**SMALL)), Simulator(SimulatorConfig(**SMALL))
    assert one.history().exposures.equals(two.history().exposures)
    assert not one.history().exposures.equals(Simulator(SimulatorConfig(**SMALL, seed=1)).history().exposures)
    two.new_items(5)
    assert one.new_items(3).equals(two.new_items(3)), "uploads do not depend on who asked for what first"
    assert one.visitors(0) == two.visitors(0)


def test_watching_is_repeatable_and_luck_belongs_to_the_item_and_its_place() -> None:
    world = Simulator(SimulatorConfig(**SMALL))
    ids, user = world.history().items["item_id"].to_pylist(), world.visitors(0)[0].user_id
    fresh = [i for i in ids if i not in _seen(world, user)][:12]
    first = world.watch(0, user, fresh[:10], 1000, 4)
    again = world.watch(0, user, fresh[:10], 1000, 4)
    swapped = world.watch(0, user, [*fresh[:9], fresh[11]], 1000, 4)
    shown = min(len(swapped.play_ms), len(first.play_ms), 9)
    assert first.play_ms.tolist() == again.play_ms.tolist()
    assert first.end_ms == again.end_ms
    assert first.play_ms[:shown].tolist() == swapped.play_ms[:shown].tolist()
    assert set(first.flags) == set(FLAGS)
    assert first.times_ms[0] == 1000
    assert (np.diff(first.times_ms) > first.play_ms[:-1]).all()


def _seen(world: Simulator, user: str) -> set[str]:
    log = world.history().exposures.to_pandas()
    return set(log.item_id[log.user_id == user])


def test_bad_requests_are_refused() -> None:
    world = Simulator(SimulatorConfig(**SMALL))
    future = world.new_items(2)["item_id"][0].as_py()
    with pytest.raises(ValueError, match="unknown user 'nobody'"):
        world.watch(0, "nobody", ["v00000"], 0, 0)
    with pytest.raises(ValueError, match="unknown item 'nothing'"):
        world.watch(0, "u00000", ["v00000", "nothing"], 0, 0)
    with pytest.raises(ValueError, match="not uploaded yet on day 0"):
        world.watch(0, "u00000", [future], 0, 0)
    assert world.watch(0, "u00000", [], 7, 0).left
    with pytest.raises(ValueError, match="at least 2 users"):
        SimulatorConfig(users=1)


Policy = Callable[[Simulator, list[str], list[str], int], np.ndarray]


def stay(policy: Policy, days: range) -> tuple[float, float]:
    """Minutes watched a visitor-day, and mean daily visitors, over ``days`` when ``policy`` ranks from day 0."""
    world = Simulator(SimulatorConfig(users=250, items=800, history_days=4, drift_day=2, drift_items=100))
    log = world.history().exposures.to_pandas()
    seen = {u: set(own) for u, own in log.groupby("user_id").item_id}
    ids, played, active = world.history().items["item_id"].to_pylist(), [], []
    for day in range(days.stop):
        ids += world.new_items(day)["item_id"].to_pylist()
        visits = world.visitors(day)
        users = sorted({v.user_id for v in visits})
        order = dict(zip(users, np.argsort(-policy(world, users, ids, day), axis=1), strict=True))
        total = 0
        for slot, visit in enumerate(visits):
            own = seen.setdefault(visit.user_id, set())
            chosen = [ids[i] for i in order[visit.user_id] if ids[i] not in own][:10]
            watched = world.watch(day, visit.user_id, chosen, visit.time_ms, slot)
            own.update(chosen[p] for p in watched.positions)
            total += int(watched.play_ms.sum())
        played.append(total / 60_000 / len(users))
        active.append(len(users))
    return float(np.mean(played[days.start :])), float(np.mean(active[days.start :]))


def test_better_recommendations_earn_stay_time_and_returns_and_the_drift_hurts_a_frozen_oracle() -> None:
    def chance(world: Simulator, users: list[str], ids: list[str], day: int) -> np.ndarray:
        return np.random.default_rng(day).random((len(users), len(ids)))

    def oracle(world: Simulator, users: list[str], ids: list[str], day: int) -> np.ndarray:
        return world.expected_play_ms(users, ids, day)

    def frozen(world: Simulator, users: list[str], ids: list[str], day: int) -> np.ndarray:
        known = [i for i in ids if int(i[1:]) < 810]
        scores = np.full((len(users), len(ids)), -np.inf)
        scores[:, : len(known)] = world.expected_play_ms(users, known, 1)
        return scores

    days = range(3, 6)
    (random_stay, random_users), (best_stay, best_users) = stay(chance, days), stay(oracle, days)
    frozen_stay, _ = stay(frozen, days)
    assert best_stay > 2 * random_stay
    assert best_users > 1.1 * random_users
    assert frozen_stay < 0.85 * best_stay


def test_drift_day_is_announced_and_brings_its_batch() -> None:
    world = Simulator(SimulatorConfig(**SMALL, new_items_per_day=3))
    assert [world.drifts_on(d) for d in range(5)] == [False, False, False, True, False]
    assert [world.new_items(d).num_rows for d in range(5)] == [3, 3, 3, 80, 3]
    never = Simulator(SimulatorConfig(**{**SMALL, "drift_day": None}))
    users, ids = never.history().users["user_id"].to_pylist()[:5], never.history().items["item_id"].to_pylist()
    moved, still = world.true_affinity(users, ids, 4), never.true_affinity(users, ids, 4)
    assert np.abs(moved - still).max() > 0.5
