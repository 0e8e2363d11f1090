import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from features.world.simulator import Simulator, SimulatorConfig
from models.rewards.duration import DurationConfig, duration_aware_advantage, duration_bucket
from models.tokenizer.interactions import times

ROW = st.tuples(st.integers(0, 3), st.integers(0, 6), st.sampled_from([0, 900, 5000, 5100, 60_000]), st.integers(0, 5))


def columns(rows: list[tuple[int, int, int, int]]) -> tuple[np.ndarray, ...]:
    users, times, duration, play = np.array(rows, np.int64).T
    return play, duration, np.zeros(len(rows), bool), users.astype(str), times


@settings(max_examples=150)
@given(st.lists(ROW, min_size=1, max_size=60))
def test_quantile_equals_counting_strictly_earlier_views(rows: list[tuple[int, int, int, int]]) -> None:
    play, duration, negative, users, times = columns(rows)
    result = duration_aware_advantage(play, duration, negative, users, times)
    bucket = duration_bucket(duration, DurationConfig())
    for i in range(len(rows)):
        earlier = times < times[i]
        own = earlier & (users == users[i]) & (bucket == bucket[i])
        crowd = earlier & (bucket == bucket[i])
        for history in (own, crowd, earlier):
            if history.any():
                assert result.quantile[i] == pytest.approx((play[history] <= play[i]).mean())
                break
        else:
            assert np.isnan(result.quantile[i])
            assert result.advantage[i] == 0
    assert (result.advantage > 0).sum() <= np.ceil(0.25 * len(rows))
    assert result.metrics["reward/no_evidence_share"] == pytest.approx(np.isnan(result.quantile).mean())


def test_order_of_the_rows_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    rows = [tuple(row) for row in rng.integers(0, [5, 10_000, 90_000, 90_000], (300, 4)).tolist()]
    play, duration, negative, users, times = columns(rows)
    shuffled = rng.permutation(300)
    straight = duration_aware_advantage(play, duration, negative, users, times)
    mixed = duration_aware_advantage(*(column[shuffled] for column in (play, duration, negative, users, times)))
    np.testing.assert_array_equal(mixed.quantile, straight.quantile[shuffled])
    assert mixed.metrics == straight.metrics


def test_ties_at_one_still_give_the_top_quarter() -> None:
    """Everybody beats the own history: a strict > against tau = 1 would call nobody good."""
    n = 40
    users = np.repeat([f"u{i}" for i in range(n)], 2)
    times = np.tile([0, 1], n) + np.repeat(np.arange(n) * 10, 2)
    play = np.tile([100, 200], n) + np.repeat(np.arange(n), 2)
    batch = np.tile([False, True], n)
    result = duration_aware_advantage(play, np.full(2 * n, 9000), np.zeros(2 * n, bool), users, times, batch=batch)
    assert (result.quantile[batch] == 1).all()
    assert result.metrics["reward/tau"] == 1
    assert result.metrics["reward/tie_share"] == 1
    assert result.advantage[batch].sum() == n / 4
    assert not result.advantage[~batch].any()


def test_dislike_is_minus_one_even_when_watched_long() -> None:
    play = np.arange(1, 9) * 1000
    negative = np.zeros(8, bool)
    negative[[2, 7]] = True
    result = duration_aware_advantage(play, np.full(8, 9000), negative, np.full(8, "u"), np.arange(8))
    assert result.advantage[[2, 7]].tolist() == [-1, -1]
    assert set(np.unique(result.advantage)) <= {-1, 0, 1}
    assert result.metrics["reward/negative_share"] == 0.25


def test_a_view_shorter_than_all_before_is_never_good() -> None:
    result = duration_aware_advantage(
        np.array([9, 8, 7, 6]), np.full(4, 9000), np.zeros(4, bool), np.full(4, "u"), np.arange(4)
    )
    assert not (result.advantage > 0).any()


def test_duration_is_controlled_for() -> None:
    """The same 10 s are long for short videos and short for long ones."""
    rng = np.random.default_rng(0)
    short, long = rng.integers(1000, 9000, 50), rng.integers(20_000, 200_000, 50)
    play = np.concatenate([short, long, [10_000, 10_000]])
    duration = np.concatenate([np.full(50, 10_000), np.full(50, 250_000), [10_000, 250_000]])
    result = duration_aware_advantage(play, duration, np.zeros(102, bool), np.full(102, "u"), np.arange(102))
    assert result.quantile[-2] == 1
    assert result.quantile[-1] == 0


def test_unequal_columns_and_wrong_constants_are_refused() -> None:
    with pytest.raises(ValueError, match="columns differ in length"):
        duration_aware_advantage(np.zeros(2), np.zeros(3), np.zeros(2, bool), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="beta > 1"):
        DurationConfig(beta=1.0)


def test_in_the_simulator_the_reward_does_not_favour_long_videos_and_raw_play_time_does() -> None:
    history = Simulator(SimulatorConfig(users=250, items=400, drift_day=None)).history()
    log = {name: history.exposures.column(name).to_numpy(zero_copy_only=False) for name in ("play_ms", "duration_ms")}
    users = np.asarray(history.exposures.column("user_id").to_pylist(), object)
    dislike = history.exposures.column("dislike").to_numpy(zero_copy_only=False)
    found = duration_aware_advantage(log["play_ms"], log["duration_ms"], dislike, users, times(history.exposures))
    told = np.isfinite(found.quantile)
    ours = spearmanr(found.advantage[told], log["duration_ms"][told]).statistic
    raw = spearmanr(log["play_ms"], log["duration_ms"]).statistic
    assert abs(ours) <= 0.05
    assert abs(ours) < abs(raw)
