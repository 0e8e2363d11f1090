"""Expected values of lists are what many lucky and unlucky people would show on average."""

import numpy as np
import pytest

from features.world.expectation import flag_chances
from features.world.responses import DRAWS
from features.world.simulator import Simulator, SimulatorConfig

PLACES = 6


@pytest.fixture(scope="module")
def world() -> Simulator:
    return Simulator(SimulatorConfig.scenario("laboratory", users=60, items=300, history_days=3))


def lists(world: Simulator, seed: int) -> tuple[list[str], list[list[str]]]:
    rng, items = np.random.default_rng(seed), world.history().items["item_id"].to_pylist()
    users = world.population()[:8]
    return users, [[items[row] for row in rng.permutation(len(items))[:PLACES]] for _ in users]


def test_chances_are_the_shares_of_many_draws(world: Simulator) -> None:
    rng, z = np.random.default_rng(0), np.array([[-1.0, 0.0, 1.5]])
    duration = np.array([[12_000, 50_000, 200_000]])
    many = 20_000
    drawn = world._responses.views(
        np.repeat(z, many, 0), np.repeat(duration, many, 0), rng.random((DRAWS, many, z.shape[1]))
    )
    for name, chances in flag_chances(world._responses, z, duration).items():
        assert np.abs(drawn.flags[name].mean(0) - chances[0]).max() < 0.015, name
    expected = world._responses.expected_play_ms(z, duration)[0]
    assert np.allclose(drawn.play_ms.mean(0), expected, rtol=0.04)


def test_equal_lists_have_equal_worth_whatever_happened_before(world: Simulator) -> None:
    users, chosen = lists(world, 1)
    first = world.expected(users, chosen, 0)
    again = world.expected(users, chosen, 0)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    alone = world.expected(users[2:3], chosen[2:3], 0)
    assert all(np.allclose(first[name][2], alone[name][0]) for name in first), "users are judged one by one"


def test_nobody_stays_longer_than_the_whole_list(world: Simulator) -> None:
    found = world.expected(*lists(world, 2), 0)
    assert (found["views"] >= 1).all()
    assert (found["views"] <= PLACES).all()
    assert (found["stay_s"] < found["play_s"] * 1.05).all()
    assert ((found["lt7"] > 0) & (found["lt7"] < 7)).all()


def test_liked_videos_bring_people_back(world: Simulator) -> None:
    users = world.population()[:20]
    items = world.history().items["item_id"].to_pylist()
    order = np.argsort(world.true_affinity(users, items, 0), 1)
    worst, best = (
        world.expected(users, [[items[row] for row in rows] for rows in order[:, part]], 0)
        for part in (slice(0, PLACES), slice(-PLACES, None))
    )
    for name in ("lt7", "views", "like", "long_view"):
        assert (best[name] > worst[name]).mean() > 0.9, name
