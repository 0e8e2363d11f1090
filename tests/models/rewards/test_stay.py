"""Predicted stay: seconds that agree with a world whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from models.rewards.measures import stay_agreement
from models.rewards.stay import LEVELS, PlayTimes, Stay, normal_score

N = 40_000


def world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a hidden liking, play_ms, duration_ms) of N views: who likes a video watches more of it, long ones less."""
    rng = np.random.default_rng(seed)
    liking, duration = rng.normal(size=N), rng.choice([10_000, 100_000, 300_000], N)
    share = 1 / (1 + np.exp(-(liking + rng.normal(size=N) - np.log(duration / 10_000))))
    return liking, share * duration, duration


def fitted(seed: int) -> tuple[Stay, np.ndarray, np.ndarray, np.ndarray]:
    liking, play, duration = world(seed)
    quantile = np.empty(N)
    for each in np.unique(duration):
        own = duration == each
        quantile[own] = (rankdata(play[own]) - 0.5) / own.sum()
    return Stay.fit(0.3 * liking - 1, quantile, PlayTimes.of(play, duration)), liking, play, duration


def test_predicted_seconds_are_the_mean_of_what_is_played() -> None:
    stay, liking, play, duration = fitted(0)
    told = stay.seconds(0.3 * liking - 1, duration)
    for each in np.unique(duration):
        for low, high in ((-3, -1), (-0.5, 0.5), (1, 3)):
            alike = (duration == each) & (liking > low) & (liking < high)
            assert told[alike].mean() == pytest.approx(play[alike].mean() / 1000, rel=0.15)
    agreed = stay_agreement(told, play / 1000)
    assert agreed["rho"] > 0.5
    assert agreed["predicted_s"] == pytest.approx(agreed["played_s"], rel=0.05)


def test_what_is_liked_more_and_what_is_longer_is_told_apart() -> None:
    stay, _, play, duration = fitted(1)
    rising = stay.seconds(np.linspace(-1.8, -0.2, 50), np.full(50, 100_000))
    assert (np.diff(rising) > 0).all()
    again = Stay.restored(stay.arrays())
    np.testing.assert_array_equal(again.seconds(np.linspace(-1.8, -0.2, 50), np.full(50, 100_000)), rising)
    means = [play[duration == each].mean() for each in np.unique(duration)]
    average = stay.seconds(np.full(3, -1.0), np.unique(duration))
    assert list(np.argsort(average)) == list(np.argsort(means))


@given(st.lists(st.integers(1_000, 400_000), min_size=1, max_size=300), st.floats(-4, 4), st.floats(0, 2))
def test_seconds_lie_within_what_was_seen(durations: list[int], score: float, spread: float) -> None:
    duration = np.array(durations)
    plays = PlayTimes.of(duration * 0.7, duration)
    told = plays.seconds(np.full(len(duration), score), spread, duration)
    np.testing.assert_allclose(told, 0.7 * duration / 1000, rtol=1e-6)
    assert plays.ratios.shape == (len(plays.buckets), len(LEVELS))


def test_seconds_grow_with_the_score_and_a_rare_duration_takes_the_nearest_buckets() -> None:
    ratios = np.sort(np.random.default_rng(3).gamma(1.0, 0.5, (2, len(LEVELS))))
    plays = PlayTimes(buckets=np.array([3, 5]), ratios=ratios)
    told = plays.seconds(np.linspace(-3, 3, 20), 0.8, np.full(20, 20_000))
    assert (np.diff(told) > 0).all()
    assert told.max() <= 20 * ratios.max()
    again = plays.seconds(np.zeros(2), 0.8, np.array([2_000_000, 50_000]))  # buckets 10 and 5
    assert again[0] == pytest.approx(40 * again[1])


def test_no_views_teach_nothing_and_places_are_cut_off() -> None:
    with pytest.raises(ValueError, match="no views"):
        PlayTimes.of(np.empty(0), np.empty(0))
    assert np.isfinite(normal_score(np.array([0.0, 0.5, 1.0]))).all()
    assert np.isnan(stay_agreement(np.ones(3), np.arange(3.0))["rho"])
    assert np.isnan(stay_agreement(np.empty(0), np.empty(0))["rho"])
