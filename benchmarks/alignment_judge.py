"""What an arm's policy is worth: lists for the held-out users, judged by the truth, and the guard-rails beside it.

Guard-rails are those of the platform's evaluation: cold-start share and density of what is served, legality of free
samples, and recall on the held-out users' own last day in the log. ``oracle`` and the cascade are judged the same way.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.alignment_data import write_log
from benchmarks.alignment_reward import organic_stay
from benchmarks.alignment_taste import taste_of
from benchmarks.alignment_world import BEAM, HOUR_MS, LIST, Lab, best
from models.cascade import Cascade
from models.evaluation import accuracy, describe, recommend
from models.generator import Generator
from models.pathways import to_tensors
from models.training.data import Holdout, RunData, split_holdout

MEASURES = (
    "play_s",
    "stay_s",
    "views",
    "lt7",
    "click",
    "long_view",
    "like",
    "follow",
    "comment",
    "collect",
    "forward",
    "profile_enter",
    "dislike",
)
"""Kept by user; ``play_s`` is the stay time that gaps are taken of: the oracle is exact there."""
LONG_S = 120.0
CHUNK = 32


class Judge:
    """Judges policies on one laboratory's held-out users."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        items, counts = np.unique(lab.log["item_id"].to_pylist(), return_counts=True)
        self._shown = dict(zip(items.tolist(), counts.tolist(), strict=True))

    @cached_property
    def holdout(self) -> Holdout:
        """All requests of the log's last day by held-out users."""
        return self._own.holdout(self.lab.catalogue, held_out=split_holdout(self._own.exposures, users_share=1.0))

    @cached_property
    def _own(self) -> RunData:
        """The held-out users' log."""
        lab = self.lab
        return RunData.load(write_log(lab.dataset, lab.of_users(lab.held), lab.folder / "held-out"))

    def of_lists(self, lists: Sequence[Sequence[str]]) -> dict[str, Any]:
        """True measures by held-out user, and what kind of items are served."""
        lab, found = self.lab, self.lab.judge(lists)
        at_one = Holdout(
            context=lab.asked,
            user_ids=lab.held,
            times_ms=np.full(len(lab.held), lab.start_ms + HOUR_MS),
            seen=lab.seen,
            relevant=[set() for _ in lab.held],
        )
        said = describe(lists, at_one, lab.catalogue, self._shown)
        seconds = lab.catalogue.duration_ms[lab.catalogue.rows([item for each in lists for item in each])] / 1000
        return {
            "users": {name: found[name].tolist() for name in MEASURES},
            "cold_start_share": said["cold_start_share"],
            "density": said["density"],
            "distinct": len({item for each in lists for item in each}),
            "long_share": float((seconds >= LONG_S).mean()),
            "duration_s": float(seconds.mean()),
        }

    def of_model(self, model: Generator, *, select: bool = False) -> dict[str, Any]:
        """The same of a model's beam; ``select``: beside it, of the whole beam in the order of predicted stay."""
        recommender, beams = self.lab.recommender(model), self.served(model, BEAM)
        recall = accuracy(recommend(recommender, self.holdout), self.holdout.relevant)["recall@50"]
        found = self.of_lists([items[:LIST] for items in beams])
        found |= {"recall50": recall.tolist(), "legality": recommender.legality(self.lab.asked)}
        return {**found, "selected": self.of_lists(self._selected(beams))} if select else found

    def stay_of(self, model: Generator) -> np.ndarray:
        """True seconds of the lists that ``model`` serves, [held]."""
        return self.lab.judge(self.served(model))["play_s"]

    def served(self, model: Generator, count: int = LIST) -> list[list[str]]:
        """What the beam of ``model`` would show each held-out user."""
        answers = self.lab.recommender(model).recommend(
            self.lab.asked, num_items=count, beam_width=BEAM, exclude=self.lab.seen
        )
        return [answer.item_ids for answer in answers]

    def _selected(self, lists: list[list[str]]) -> list[list[str]]:
        chosen, lab = [], self.lab
        organic = organic_stay(lab)
        own, _ = taste_of(self._own, lab.catalogue, organic.taste.item)
        judge = organic.asked_by(np.array(lab.held, object), own)
        for start in range(0, len(lists), CHUNK):
            part = lists[start : start + CHUNK]
            rows = np.full((len(part), BEAM), -1)
            for number, items in enumerate(part):
                rows[number, : len(items)] = lab.catalogue.rows(items)
            context = to_tensors(lab.asked.take(slice(start, start + CHUNK)), lab.catalogue)
            seconds = np.nan_to_num(judge(context, rows, start + np.arange(len(part))), nan=-np.inf)
            order = np.argsort(-seconds, axis=1, kind="stable")[:, :LIST]
            chosen += [[items[k] for k in row] for items, row in zip(part, order, strict=True)]
        return chosen

    def of_oracle(self) -> dict[str, Any]:
        """The ten videos each user will truly watch longest."""
        return self.of_lists(best(self.lab.truth, self.lab.catalogue.item_ids))

    def of_chance(self) -> dict[str, Any]:
        """Any ten unseen videos."""
        luck = np.random.default_rng(self.lab.seed).random(self.lab.truth.shape)
        return self.of_lists(best(np.where(np.isinf(self.lab.truth), -np.inf, luck), self.lab.catalogue.item_ids))

    def of_cascade(self, cascade: Cascade) -> dict[str, Any]:
        """The cascade, given the held-out users' histories."""
        lab = self.lab
        cascade.observe(lab.of_users(lab.held))
        ranked = cascade.recommend(lab.held, lab.start_ms + HOUR_MS, LIST, lab.seen)
        return self.of_lists([[item for item, _ in items] for items in ranked])
