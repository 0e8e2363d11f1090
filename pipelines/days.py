"""One simulated day: users open the app, ask their arm for items, watch some, and what they did is reported.

Requests run in rounds: everybody's first request, then everybody's second, ... After a round the collector is
flushed: between two requests of a person lie minutes, in which the platform's features catch up; a compressed day
has to wait for that explicitly. The loop's clock is the world's, not the wall's.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from features.schema import FLAGS
from features.world.world import Visit, Watched, World
from pipelines.arms import Arm
from pipelines.client import Client, Served

PAUSE_MS = 2 * 60_000
"""Between two requests of one visit."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One impression as the loop's bookkeeping keeps it."""

    user_id: str
    item_id: str
    play_ms: int
    flags: dict[str, bool]


@dataclass(kw_only=True)
class Day:
    """What happened on one day, by arm."""

    views: dict[str, list[View]] = field(default_factory=lambda: defaultdict(list))
    visitors: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    versions: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    flags: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    requests: int = 0
    acked: int = 0
    illegal: int = 0

    def stay_minutes(self, arm: str) -> dict[str, float]:
        """user id -> minutes watched."""
        total: dict[str, float] = defaultdict(float)
        for view in self.views[arm]:
            total[view.user_id] += view.play_ms / 60_000
        return total


@dataclass(frozen=True, kw_only=True)
class DayConfig:
    """How users ask: items per request, and a prefix that makes request ids unique to this loop."""

    num_items: int
    prefix: str


@dataclass
class _Visitor:
    """A user's visits of the day, the present one first."""

    user_id: str
    arm: str
    visits: list[Visit]
    time_ms: int = 0
    asked: int = 0
    """Requests in the present visit."""
    slot: int = 0
    """Requests of the whole day."""

    def move_on(self, left: bool, end_ms: int) -> None:
        """The next request of this visit, or the next visit."""
        self.slot += 1
        self.asked += 1
        self.time_ms = end_ms + PAUSE_MS
        if left or self.asked >= self.visits[0].max_requests:
            self.visits.pop(0)
            self.asked = 0
            if self.visits:
                self.time_ms = max(self.time_ms, self.visits[0].time_ms)


def play_day(
    world: World,
    day: int,
    arms: Mapping[str, Arm],
    arm_of: Mapping[str, str],
    client: Client,
    durations_ms: Mapping[str, int],
    config: DayConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Day:
    """Plays day ``day`` for everybody who visits and has an arm; ``on_progress(users through, users)``.

    ``durations_ms`` holds every item that exists: a served item outside it is illegal, counted and not shown.
    """
    record = Day()
    active = _visitors(world.visitors(day), arm_of)
    total = len(active)
    kinds = ("impression", "feedback") if world.feedback_arrives(day) else ("impression",)
    while active:
        events: list[dict[str, Any]] = []
        for arm in arms:
            asking = [visitor for visitor in active if visitor.arm == arm]
            for visitor, served in zip(asking, _ask(arms[arm], asking, day, config), strict=True):
                seen = _watch(world, day, visitor, served, durations_ms, record)
                events.extend(event for event in seen if event["kind"] in kinds)
        record.acked += client.report(events) // len(kinds)
        client.flush()
        active = [visitor for visitor in active if visitor.visits]
        on_progress(total - len(active), total)
    return record


def _visitors(visits: list[Visit], arm_of: Mapping[str, str]) -> list[_Visitor]:
    by_user: dict[str, list[Visit]] = defaultdict(list)
    for visit in sorted(visits, key=lambda visit: visit.time_ms):
        by_user[visit.user_id].append(visit)
    return [
        _Visitor(user, arm_of[user], mine, time_ms=mine[0].time_ms) for user, mine in by_user.items() if user in arm_of
    ]


def _ask(arm: Arm, asking: list[_Visitor], day: int, config: DayConfig) -> list[Served]:
    if not asking:
        return []
    return arm.recommend(
        [visitor.user_id for visitor in asking],
        [visitor.time_ms for visitor in asking],
        [f"{config.prefix}-d{day}-r{visitor.slot}-{visitor.user_id}" for visitor in asking],
        config.num_items,
    )


def _watch(
    world: World, day: int, visitor: _Visitor, served: Served, durations_ms: Mapping[str, int], record: Day
) -> list[dict[str, Any]]:
    """Lets the user scroll through what was served; returns the events and moves the visitor on."""
    shown = [place for place, item in enumerate(served.item_ids) if item in durations_ms]
    record.requests += 1
    record.illegal += len(served.item_ids) - len(shown)
    record.visitors[visitor.arm].add(visitor.user_id)
    record.versions[visitor.arm].add(served.model_version)
    for flag in served.flags:
        record.flags[flag] += 1
    if not shown:
        visitor.move_on(True, visitor.time_ms)
        return []
    items = [served.item_ids[place] for place in shown]
    watched = world.watch(day, visitor.user_id, items, visitor.time_ms, visitor.slot)
    events = list(_events(watched, visitor, served, shown, durations_ms, record))
    visitor.move_on(watched.left, watched.end_ms)
    return events


def _events(
    watched: Watched,
    visitor: _Visitor,
    served: Served,
    shown: list[int],
    durations_ms: Mapping[str, int],
    record: Day,
) -> Iterator[dict[str, Any]]:
    """The impression and the feedback event of each view; also adds the view to ``record``."""
    for i, position in enumerate(watched.positions):
        place = shown[int(position)]
        item = served.item_ids[place]
        begin, play = int(watched.times_ms[i]), int(watched.play_ms[i])
        flags = {flag: bool(watched.flags[flag][i]) for flag in FLAGS}
        record.views[visitor.arm].append(View(user_id=visitor.user_id, item_id=item, play_ms=play, flags=flags))
        identity = {"exposure_id": served.exposure_ids[place], "user_id": visitor.user_id}
        yield {
            "kind": "impression",
            **identity,
            "request_id": served.request_id,
            "item_id": item,
            "position": place,
            "event_time": begin,
            "source": "cascade" if visitor.arm == "cascade" else "onerec",
            "duration_ms": durations_ms[item],
        }
        yield {"kind": "feedback", **identity, "event_time": begin + play, "play_ms": play, **flags}
