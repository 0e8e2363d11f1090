"""A played day against fakes that keep a diary: what was asked, shown, reported and flushed, and in which order."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.datasets.dataset import Dataset
from features.intake.events import parse
from features.schema import FLAGS, ITEM, exposure_id
from features.world.world import Visit, Watched
from pipelines.client import Client, Served
from pipelines.days import PAUSE_MS, Day, DayConfig, play_day

MIDNIGHT = datetime(2026, 1, 5, tzinfo=UTC)
START = int(MIDNIGHT.timestamp() * 1000)
DURATIONS = {f"i{k}": 5_000 + 100 * k for k in range(12)}
ILLEGAL = ["gone0", "gone1", "gone2"]
CONFIG = DayConfig(num_items=6, prefix="test")
ARMS = ("onerec", "frozen", "cascade")
USERS = [f"u{k}" for k in range(7)]
ARM_OF = {user: ARMS[k % 3] for k, user in enumerate(USERS[:6])}  # the last one is in no arm


@dataclass
class Shown:
    """One call of ``World.watch`` and what came of it."""

    user_id: str
    item_ids: list[str]
    time_ms: int
    slot: int
    watched: Watched


@dataclass
class Diary:
    """Everything that happened, in order: ("ask", user, time), ("report", exposure ids) and ("flush",)."""

    lines: list[tuple[Any, ...]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    served: list[tuple[str, str, Served]] = field(default_factory=list)
    """(arm, user, answer)"""
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class FakeWorld:
    """Users who watch a random part of each list and leave at random."""

    diary: Diary
    visits: list[Visit]
    rng: np.random.Generator
    leave_share: float = 0.2
    name: str = "fake"

    def history(self) -> Dataset:
        raise AssertionError("a day is played without reading the history")

    def start(self) -> datetime:
        return MIDNIGHT

    def new_items(self, day: int) -> pa.Table:
        return ITEM.empty_table()

    def population(self) -> list[str]:
        return sorted({visit.user_id for visit in self.visits})

    def visitors(self, day: int) -> list[Visit]:
        return sorted(self.visits, key=lambda visit: visit.time_ms)

    def watch(self, day: int, user_id: str, item_ids: list[str], time_ms: int, slot: int) -> Watched:
        assert set(item_ids) <= set(DURATIONS), "an item that does not exist was shown"
        assert item_ids
        views = int(self.rng.integers(1, len(item_ids) + 1))
        play = self.rng.integers(0, 90_000, views)
        begins = time_ms + np.r_[0, np.cumsum(play)[:-1]]
        watched = Watched(
            positions=np.arange(views),
            times_ms=begins,
            play_ms=play,
            flags={flag: self.rng.random(views) < 0.3 for flag in FLAGS},
            end_ms=int(begins[-1] + play[-1]),
            left=bool(self.rng.random() < self.leave_share),
        )
        self.diary.shown.append(Shown(user_id, list(item_ids), time_ms, slot, watched))
        return watched

    def feedback_arrives(self, day: int) -> bool:
        return True

    def drifts_on(self, day: int) -> bool:
        return False


@dataclass
class FakeArm:
    """Serves random items, now and then one that does not exist, or none at all."""

    diary: Diary
    name: str
    rng: np.random.Generator
    least: int = 0

    def recommend(
        self, user_ids: Sequence[str], times_ms: Sequence[int], request_ids: Sequence[str], num_items: int
    ) -> list[Served]:
        assert len(user_ids) == len(times_ms) == len(request_ids) == len(set(user_ids))
        return [self._serve(*row, num_items) for row in zip(user_ids, times_ms, request_ids, strict=True)]

    def _serve(self, user: str, time_ms: int, request_id: str, num_items: int) -> Served:
        size = int(self.rng.integers(self.least, num_items + 1))
        items = self.rng.choice([*DURATIONS, *ILLEGAL], size, replace=False).tolist()
        version = f"{self.name}-v{self.rng.integers(2)}"
        served = Served(
            request_id=request_id,
            item_ids=items,
            scores=[0.0] * len(items),
            sids=[[] for _ in items],
            exposure_ids=[exposure_id(request_id, version, slot) for slot in range(len(items))],
            model_version=version,
            flags=["cold"] if self.rng.random() < 0.2 else [],
        )
        self.diary.lines.append(("ask", user, time_ms))
        self.diary.served.append((self.name, user, served))
        return served


class FakeClient(Client):
    """A collector that keeps what it is told; refuses what the real one refuses."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    def report(self, events: list[dict[str, Any]]) -> int:
        for first in range(0, len(events), 1000):
            parse(json.dumps({"events": events[first : first + 1000]}).encode())
        self.diary.events += events
        self.diary.lines.append(("report", {event["user_id"] for event in events}))
        return len(events)

    def flush(self, timeout_s: float = 60) -> None:
        self.diary.lines.append(("flush",))


def play(
    visits: list[Visit], seed: int, *, leave_share: float = 0.2, least: int = 0
) -> tuple[Day, Diary, list[tuple[int, int]]]:
    """The day's record, the diary and the progress that was told."""
    rng, diary = np.random.default_rng(seed), Diary()
    progress: list[tuple[int, int]] = []
    record = play_day(
        FakeWorld(diary, visits, rng, leave_share),
        3,
        {name: FakeArm(diary, name, rng, least) for name in ARMS},
        ARM_OF,
        FakeClient(diary),
        DURATIONS,
        CONFIG,
        lambda done, total: progress.append((done, total)),
    )
    return record, diary, progress


single_visits = st.builds(
    Visit,
    user_id=st.sampled_from(USERS),
    time_ms=st.integers(START, START + 3_600_000),  # close together: visits of one user run into each other
    max_requests=st.integers(1, 4),
)
visits_of_a_day = st.lists(single_visits, max_size=15)
property_test = settings(max_examples=40)


@property_test
@given(visits_of_a_day, st.integers(0, 1000))
def test_every_view_is_reported_once_as_impression_and_feedback(visits: list[Visit], seed: int) -> None:
    record, diary, _ = play(visits, seed)
    views = Counter[str]()
    expected = []
    for shown in diary.shown:
        for place, begin, play_ms in zip(
            shown.watched.positions, shown.watched.times_ms, shown.watched.play_ms, strict=True
        ):
            expected.append((shown.user_id, shown.item_ids[place], int(begin), int(play_ms)))
            views[ARM_OF[shown.user_id]] += 1
    impressions = {e["exposure_id"]: e for e in diary.events if e["kind"] == "impression"}
    feedback = {e["exposure_id"]: e for e in diary.events if e["kind"] == "feedback"}
    assert len(diary.events) == 2 * len(expected) == 2 * len(impressions) == 2 * len(feedback)
    assert impressions.keys() == feedback.keys()
    reported = [
        (shown["user_id"], shown["item_id"], shown["event_time"], feedback[name]["play_ms"])
        for name, shown in impressions.items()
    ]
    assert sorted(reported) == sorted(expected)
    assert record.acked == len(expected)
    assert {arm: len(rows) for arm, rows in record.views.items()} == views
    for name, shown in impressions.items():
        assert shown["duration_ms"] == DURATIONS[shown["item_id"]]
        assert shown["source"] == ("cascade" if ARM_OF[shown["user_id"]] == "cascade" else "onerec")
        assert feedback[name]["event_time"] == shown["event_time"] + feedback[name]["play_ms"]
        assert feedback[name]["user_id"] == shown["user_id"]


@property_test
@given(visits_of_a_day, st.integers(0, 1000))
def test_reports_name_what_was_served(visits: list[Visit], seed: int) -> None:
    """The place in the list as served, not as shown: illegal items before it keep theirs."""
    _, diary, _ = play(visits, seed)
    place_of = {
        name: (user, served.request_id, place, served.item_ids[place])
        for _, user, served in diary.served
        for place, name in enumerate(served.exposure_ids)
    }
    for event in diary.events:
        if event["kind"] == "impression":
            named = event["user_id"], event["request_id"], event["position"], event["item_id"]
            assert place_of[event["exposure_id"]] == named


@property_test
@given(visits_of_a_day, st.integers(0, 1000))
def test_illegal_items_are_counted_and_never_shown(visits: list[Visit], seed: int) -> None:
    record, diary, _ = play(visits, seed)
    assert record.illegal == sum(item in ILLEGAL for _, _, served in diary.served for item in served.item_ids)
    assert not any(item in ILLEGAL for shown in diary.shown for item in shown.item_ids)
    assert not any(event.get("item_id") in ILLEGAL for event in diary.events)


@property_test
@given(visits_of_a_day, st.integers(0, 1000))
def test_requests_of_a_user_are_numbered_and_follow_one_another(visits: list[Visit], seed: int) -> None:
    _, diary, _ = play(visits, seed)
    names = [served.request_id for _, _, served in diary.served]
    assert len(set(names)) == len(names)
    slots = [(shown.user_id, shown.slot) for shown in diary.shown]
    assert len(set(slots)) == len(slots)
    asked: dict[str, list[int]] = defaultdict(list)
    for line in diary.lines:
        if line[0] == "ask":
            asked[line[1]].append(line[2])
    ends = {(shown.user_id, shown.time_ms): shown.watched.end_ms for shown in diary.shown}
    first_visit = {visit.user_id: visit.time_ms for visit in sorted(visits, key=lambda v: -v.time_ms)}
    assert {user: times[0] for user, times in asked.items()} == {u: first_visit[u] for u in asked}
    for user, times in asked.items():
        for earlier, later in pairwise(times):
            assert later >= ends.get((user, earlier), earlier) + PAUSE_MS


@property_test
@given(visits_of_a_day, st.integers(0, 1000))
def test_everybody_asks_as_often_as_the_visits_allow(visits: list[Visit], seed: int) -> None:
    record, diary, progress = play(visits, seed)
    allowed, at_least = Counter[str](), Counter[str]()
    for visit in visits:
        if visit.user_id in ARM_OF:
            allowed[visit.user_id] += visit.max_requests
            at_least[visit.user_id] += 1
    asked = Counter(user for _, user, _ in diary.served)
    assert asked.keys() == allowed.keys()
    assert at_least <= asked <= allowed
    assert record.requests == asked.total()
    for arm in ARMS:
        assert record.visitors[arm] == {user for user in allowed if ARM_OF[user] == arm}
        assert all(name == ARM_OF[user] for name, user, _ in diary.served)
        assert record.versions[arm] == {served.model_version for name, _, served in diary.served if name == arm}
    assert record.flags.get("cold", 0) == sum("cold" in served.flags for _, _, served in diary.served)
    assert progress == sorted(progress)
    assert not allowed or progress[-1] == (len(allowed), len(allowed))


@pytest.mark.parametrize("patient", [True, False])
@property_test
@given(visits_of_a_day, st.integers(0, 1000))
def test_a_visit_lasts_until_its_last_request_or_until_the_user_leaves(
    patient: bool, visits: list[Visit], seed: int
) -> None:
    least = len(ILLEGAL) + 1  # so that there is something to show
    _, diary, _ = play(visits, seed, leave_share=0 if patient else 1, least=least)
    expected = Counter[str]()
    for visit in visits:
        if visit.user_id in ARM_OF:
            expected[visit.user_id] += visit.max_requests if patient else 1
    assert Counter(user for _, user, _ in diary.served) == expected


@property_test
@given(visits_of_a_day, st.integers(0, 1000))
def test_features_catch_up_between_two_requests_of_a_user(visits: list[Visit], seed: int) -> None:
    """Whoever asks again has had everything he did reported and flushed."""
    _, diary, _ = play(visits, seed)
    pending: set[str] = set()
    for line in diary.lines:
        if line[0] == "ask":
            assert line[1] not in pending
            pending.add(line[1])
        elif line[0] == "flush":
            pending.clear()
    reported = [line[0] for line in diary.lines if line[0] != "ask"]
    assert reported == ["report", "flush"] * (len(reported) // 2)
    assert not pending


def test_minutes_watched_are_summed_by_user() -> None:
    visits = [Visit(user_id=user, time_ms=START, max_requests=3) for user in USERS[:3]]
    record, diary, _ = play(visits, 5)
    for arm in ARMS:
        expected: dict[str, float] = defaultdict(float)
        for shown in diary.shown:
            if ARM_OF[shown.user_id] == arm:
                expected[shown.user_id] += shown.watched.play_ms.sum() / 60_000
        assert record.stay_minutes(arm) == pytest.approx(expected)


def test_nobody_visits() -> None:
    record, diary, progress = play([], 0)
    assert (record.requests, record.acked, diary.lines, progress) == (0, 0, [], [])


def test_in_an_outage_what_was_shown_is_reported_and_what_was_done_is_not() -> None:
    visits = [Visit(user_id=user, time_ms=START, max_requests=2) for user in USERS]
    diary, rng = Diary(), np.random.default_rng(0)
    world = FakeWorld(diary, visits, rng)
    world.feedback_arrives = lambda day: day != 3
    arms = {name: FakeArm(diary, name, rng, 3) for name in ARMS}
    record = play_day(world, 3, arms, ARM_OF, FakeClient(diary), DURATIONS, CONFIG)
    assert {event["kind"] for event in diary.events} == {"impression"}
    assert record.acked == len(diary.events) == sum(len(rows) for rows in record.views.values()) > 0
