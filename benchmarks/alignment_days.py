"""Simulated days in which an arm's policy serves people it may learn from, and what they did comes back.

Half of a day's visitors get the beam's best, the others a draw from the policy, so that what it is unsure of is tried
too. A visitor gets at most ``LISTS`` lists, all from what was known at midnight. Exposures carry the semantic ID and
the log-probabilities of the answer, as the server logs them. Held-out users never appear.
"""

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from benchmarks.alignment_world import BEAM, LIST, Lab, seen_by
from features.histories.context import Context
from features.schema import EXPOSURE, FLAGS, TIME, conform, exposure_id
from features.world.sessions import DAY_MS
from features.world.world import Visit, Watched
from models.cascade import Cascade
from models.generator import Generator
from models.serving.recommender import Recommendation

LISTS = 2
PAUSE_MS = 120_000


class Policy(Protocol):
    """Who answers on a simulated day."""

    source: str

    def answer(
        self, users: Sequence[str], context: Context, seen: Sequence[set[str]], count: int, now_ms: int, explore: bool
    ) -> list[Recommendation]:
        """``count`` unseen items for each of ``users``; drawn, not the best, when asked to ``explore``."""


class OfModel:
    """Serves from a generator."""

    source = "onerec"

    def __init__(self, lab: Lab, model: Generator, seed: int = 0) -> None:
        self._recommender, self._seed = lab.recommender(model), seed

    def answer(
        self, users: Sequence[str], context: Context, seen: Sequence[set[str]], count: int, now_ms: int, explore: bool
    ) -> list[Recommendation]:
        """See ``Policy``."""
        mode, width = ("sample", 4 * count) if explore else ("beam", max(BEAM // 2, 2 * count))
        return self._recommender.recommend(
            context, num_items=count, beam_width=width, mode=mode, exclude=seen, seed=self._seed
        )


class OfCascade:
    """Serves from a cascade, which does not explore."""

    source = "cascade"

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade

    def answer(
        self, users: Sequence[str], context: Context, seen: Sequence[set[str]], count: int, now_ms: int, explore: bool
    ) -> list[Recommendation]:
        """See ``Policy``."""
        ranked = self.cascade.recommend(list(users), now_ms, count, seen)
        none = np.zeros((count, 0))
        return [
            Recommendation(
                item_ids=[item for item, _ in items],
                scores=np.array([score for _, score in items], np.float32),
                sids=none[: len(items)].astype(np.int32),
                log_probs=none[: len(items)].astype(np.float32),
            )
            for items in ranked
        ]


class Town:
    """An arm's own copy of the world: its people, what they have seen, and the log so far."""

    def __init__(self, lab: Lab, visitors: int, name: str) -> None:
        self.lab, self.visitors, self.name, self.log = lab, visitors, name, lab.log
        self._world = copy.deepcopy(lab.world)

    def play(self, policy: Policy, day: int) -> pa.Table:
        """``day`` under ``policy``; returns its exposures, which are in ``log`` from now on."""
        lab, known = self.lab, set(self.lab.people)
        visits: dict[str, list[Visit]] = {}
        for visit in self._world.visitors(day):
            if visit.user_id in known:
                visits.setdefault(visit.user_id, []).append(visit)
        users = list(visits)[: self.visitors]
        midnight = lab.start_ms + day * DAY_MS
        context = lab.contexts(users, self.log, [midnight] * len(users), f"day-{self.name}")
        seen = seen_by(self.log, users)
        rows: list[dict[str, object]] = []
        for explore in (False, True):
            chosen = np.arange(int(explore), len(users), 2)
            if not len(chosen):
                continue
            names = [users[number] for number in chosen]
            answers = policy.answer(
                names, context.take(chosen), [seen[number] for number in chosen], LISTS * LIST, midnight, explore
            )
            for user, answer in zip(names, answers, strict=True):
                rows += self._watch(day, visits[user], answer, policy.source)
        table = _table(rows)
        self.log = pa.concat_tables([self.log, table])
        return table

    def _watch(self, day: int, visits: list[Visit], answer: Recommendation, source: str) -> list[dict[str, object]]:
        asked = min(sum(visit.max_requests for visit in visits), LISTS)
        rows: list[dict[str, object]] = []
        user, now = visits[0].user_id, visits[0].time_ms
        for slot in range(asked):
            part = answer.take(np.arange(slot * LIST, min((slot + 1) * LIST, len(answer))))
            if not len(part):
                break
            seen = self._world.watch(day, user, part.item_ids, now, slot)
            rows += self._rows(f"{user}-{day}-{slot}", user, part, seen, source)
            now = seen.end_ms + PAUSE_MS
        return rows

    def _rows(
        self, request: str, user: str, part: Recommendation, seen: Watched, source: str
    ) -> list[dict[str, object]]:
        catalogue = self.lab.catalogue
        durations = catalogue.duration_ms[catalogue.rows(part.item_ids)]
        return [
            {
                "exposure_id": exposure_id(request, source, int(place)),
                "request_id": request,
                "user_id": user,
                "item_id": part.item_ids[place],
                "sid": part.sids[place].tolist() or None,
                "position": int(place),
                "event_time": int(seen.times_ms[view]),
                "source": source,
                "model_version": "arm",
                "log_probs": part.log_probs[place].tolist() or None,
                "duration_ms": int(durations[place]),
                "play_ms": int(seen.play_ms[view]),
                **{flag: bool(seen.flags[flag][view]) for flag in FLAGS},
            }
            for view, place in enumerate(seen.positions)
        ]


def _table(rows: list[dict[str, object]]) -> pa.Table:
    schema = EXPOSURE.set(EXPOSURE.get_field_index("event_time"), pa.field("event_time", pa.int64()))
    table = pa.Table.from_pylist(rows, schema=schema)
    index = table.schema.get_field_index("event_time")
    return conform(table.set_column(index, "event_time", table["event_time"].cast(TIME)), EXPOSURE)
