import numpy as np
import pytest

from models.tokenizer.quality import code_usage, neighbour_hit_rate, neighbour_pairs


def test_an_even_table() -> None:
    sids = np.stack([np.arange(16) % 4, np.arange(16) // 4], axis=1)
    usage = code_usage(sids, 4)
    assert usage["entropy_nats"] == pytest.approx([np.log(4)] * 2)
    assert usage["perplexity"] == pytest.approx([4, 4])
    assert usage["gini"] == pytest.approx([0, 0])
    assert usage["dead_codes"] == [0, 0]
    assert (usage["unique_sid_share"], usage["distinct_sids"], usage["largest_collision"]) == (1.0, 16, 1)


def test_a_collapsed_table() -> None:
    usage = code_usage(np.array([[0, 0]] * 3 + [[0, 1]]), 4)
    assert usage["utilisation"] == [0.25, 0.5]
    assert usage["dead_codes"] == [3, 2]
    assert usage["entropy_nats"][0] == 0
    assert usage["gini"][0] == pytest.approx(0.75)
    assert (usage["unique_sid_share"], usage["largest_collision"]) == (0.25, 3)


def test_hit_rate_of_random_pairs_is_chance() -> None:
    rng = np.random.default_rng(0)
    sids = rng.integers(0, 4, (200, 3))
    rates = neighbour_hit_rate(sids, rng.integers(0, 200, (20_000, 2)))
    assert rates["prefix1"] == pytest.approx(rates["prefix1_chance"], abs=0.02)
    assert rates["prefix1_chance"] == pytest.approx(0.25, abs=0.02)


def test_popular_codes_get_no_credit() -> None:
    sids = np.array([[0, 0, 0]] * 99 + [[1, 0, 0]])
    rates = neighbour_hit_rate(sids, np.stack([np.arange(100), np.roll(np.arange(100), 1)], axis=1))
    assert rates["prefix1"] <= rates["prefix1_chance"]


def test_pairs_are_consecutive_positives_of_one_user(world) -> None:
    pairs = neighbour_pairs(world.exposures, world.items.column("item_id").to_pylist())
    assert len(pairs) > 1000
    assert (world.taste[pairs[:, 0]] == world.taste[pairs[:, 1]]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert neighbour_hit_rate(np.zeros((3, 3), int), np.zeros((0, 2), int)) == {}
