"""Scenario files: each is a world that differs from the steady one where it says so."""

import pytest

from features.world import scenarios
from features.world.bots import REQUESTS, VISITS
from features.world.sessions import DAY_MS
from features.world.simulator import Simulator, SimulatorConfig, world_hash

SMALL = {"users": 120, "items": 400, "history_days": 3}


def world(name: str, **overrides: object) -> Simulator:
    return Simulator(SimulatorConfig.scenario(name, **{**SMALL, **overrides}))


def test_every_file_is_a_world_with_a_name_of_its_own() -> None:
    expected = ["bots", "duration-drift", "laboratory", "new-items", "outage", "steady", "taste-drift"]
    assert scenarios.names() == expected
    hashes = {name: world_hash(SimulatorConfig.scenario(name)) for name in scenarios.names()}
    assert len(set(hashes.values())) == len(hashes)
    assert hashes["steady"] == world_hash(SimulatorConfig(drift_day=None)), "equal worlds, equal names"
    assert world_hash(SimulatorConfig.scenario("steady", seed=1)) != hashes["steady"]
    assert all(len(scenarios.load(name)[0]) > 40 for name in hashes), "each says what happens"


def test_wrong_names_and_fields_are_named() -> None:
    with pytest.raises(ValueError, match="no scenario 'flood'; the scenarios are bots, duration-drift"):
        SimulatorConfig.scenario("flood")
    with pytest.raises(ValueError, match="the world has no field people; it has users"):
        SimulatorConfig.scenario("steady", people=3)
    with pytest.raises(ValueError, match=r"bots=1\.5"):
        SimulatorConfig(bots=1.5)


def test_uploads_of_the_new_items_scenario() -> None:
    assert world("new-items").new_items(2).num_rows == 120
    assert world("steady").new_items(2).num_rows == 10


def test_longer_videos_come_into_fashion() -> None:
    drifting = world("duration-drift")
    items = drifting.history().items
    duration = items["duration_ms"].to_numpy()
    users, ids = drifting.population()[:60], items["item_id"].to_pylist()
    change = (drifting.true_affinity(users, ids, 1) - drifting.true_affinity(users, ids, 0)).mean(axis=0)
    assert change[duration > 120_000].mean() > change[duration < 30_000].mean() + 0.3
    assert drifting.drifts_on(1)
    assert not drifting.drifts_on(0)
    steady = world("steady")
    change = (steady.true_affinity(users, ids, 1) - steady.true_affinity(users, ids, 0)).mean(axis=0)
    assert abs(change[duration > 120_000].mean() - change[duration < 30_000].mean()) < 0.1


def test_bots_come_all_day_skip_and_like_and_people_do_not_notice() -> None:
    infested, steady = world("bots"), world("steady")
    before, day = infested.visitors(0), infested.visitors(1)
    assert before == steady.visitors(0)
    assert [visit.time_ms for visit in day] == sorted(visit.time_ms for visit in day)
    counts = {user: sum(visit.user_id == user for visit in day) for user in {visit.user_id for visit in day}}
    bots = sorted(user for user, count in counts.items() if count == VISITS)
    assert len(bots) == 12
    people = [visit for visit in steady.visitors(1) if visit.user_id not in bots]
    assert [visit for visit in day if visit.user_id not in bots] == people
    assert all(visit.max_requests == REQUESTS for visit in day if visit.user_id in bots)
    ids = infested.history().items["item_id"].to_pylist()[:10]
    watched = infested.watch(1, bots[0], ids, day[0].time_ms, 3)
    again = infested.watch(1, bots[0], ids, day[0].time_ms, 3)
    assert len(watched.play_ms) == 10
    assert watched.play_ms.max() < 1_000
    assert watched.flags["like"].sum() >= 6
    assert watched.play_ms.tolist() == again.play_ms.tolist()
    assert not watched.left
    assert infested.watch(1, bots[0], [], 5, 4).left
    alike = infested.watch(0, bots[0], ids, day[0].time_ms, 3)  # the day before it is as anybody
    assert alike.play_ms.tolist() == steady.watch(0, bots[0], ids, day[0].time_ms, 3).play_ms.tolist()


def test_feedback_is_lost_on_the_days_of_the_outage() -> None:
    assert [world("outage").feedback_arrives(day) for day in range(4)] == [True, False, False, True]
    assert world("steady").feedback_arrives(1)


def test_nobody_is_in_two_places_at_once() -> None:
    """Neither within the history nor over the midnights of the days after it, however late people stay up."""
    late = world("steady", users=150)
    log = late.history().exposures.to_pandas().sort_values(["user_id", "event_time", "position"])
    begins = log.event_time.astype("datetime64[ms, UTC]").astype("int64")
    same = log.user_id.eq(log.user_id.shift(-1))
    assert not ((begins.shift(-1) < begins + log.play_ms) & same).any()
    ids = late.history().items["item_id"].to_pylist()
    busy: dict[str, int] = {}
    crossed = 0
    for day in range(4):
        midnight = int(late.start().timestamp() * 1000) + (day + 1) * DAY_MS
        slots: dict[str, int] = {}
        for visit in late.visitors(day):
            # everybody stays till after midnight: their last request of the day begins a minute before it
            first = slots.setdefault(visit.user_id, 0) == 0
            assert not first or visit.time_ms >= busy.get(visit.user_id, 0), "the visit before is still going on"
            slots[visit.user_id] += 1
        for user, slot in slots.items():
            watched = late.watch(day, user, ids[day * 10 : day * 10 + 10], midnight - 60_000, slot + 20)
            busy[user] = watched.end_ms
            crossed += watched.end_ms > midnight
    assert crossed > 50
