"""What an arm's policy is worth: lists for the held-out users, judged by the truth, and the guard-rails beside it.

Guard-rails are those of the platform's evaluation: cold-start share and density of what is served, legality of free
samples, and recall of what held-out users engaged with on the log's last day, when an organic policy chose for them.
``oracle`` and the cascade are judged the same way (recall: the oracle only).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.alignment_data import write_log
from benchmarks.alignment_reward import Stay, organic_stay
from benchmarks.alignment_taste import taste_of
from benchmarks.alignment_world import BEAM, HOUR_MS, LIST, Lab, best
from features.histories.context import Context
from models.cascade import Cascade
from models.evaluation import Rankings, accuracy, describe
from models.generator import Generator
from models.pathways import to_tensors
from models.serving.recommender import Recommender
from models.tokenizer.vocabulary import Catalogue
from models.training.data import Holdout, RunData, newest_day, split_holdout

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
        lab, holdout = self.lab, self.holdout
        recommender = lab.recommender(model)
        now, then = beam(recommender, lab.asked, lab.seen), beam(recommender, holdout.context, holdout.seen)
        found = self._lists_and_recall(now, then) | {"legality": recommender.legality(lab.asked)}
        if select:
            now = ordered(now, lab.asked, self._judge_now, lab.catalogue)
            then = ordered(then, holdout.context, self._judge_then, lab.catalogue)
            found["selected"] = self._lists_and_recall(now, then)
        return found

    def _lists_and_recall(self, now: Rankings, then: Rankings) -> dict[str, Any]:
        return {**self.of_lists([items[:LIST] for items in now]), "recall50": by_user(then, self.holdout).tolist()}

    def stay_of(self, model: Generator) -> np.ndarray:
        """True seconds of the lists that ``model`` serves, [held]."""
        return self.lab.judge(self.served(model))["play_s"]

    def served(self, model: Generator, count: int = LIST) -> list[list[str]]:
        """What the beam of ``model`` would show each held-out user."""
        return [items[:count] for items in beam(self.lab.recommender(model), self.lab.asked, self.lab.seen)]

    @cached_property
    def _judge_now(self) -> Stay:
        """Predicted stay as all of the held-out users' views tell it."""
        return self._judge_of(self._own, self.lab.held)

    @cached_property
    def _judge_then(self) -> Stay:
        """As their views before the log's last day tell it."""
        lab, log = self.lab, self.lab.of_users(self.lab.held)
        before = log.filter(pa.array(log["event_time"].cast("int64").to_numpy() < newest_day(log)))
        data = RunData.load(write_log(lab.dataset, before, lab.folder / "held-out-before"))
        return self._judge_of(data, self.holdout.user_ids)

    def _judge_of(self, data: RunData, users: Sequence[str]) -> Stay:
        organic = organic_stay(self.lab)
        own, _ = taste_of(data, self.lab.catalogue, organic.taste.item)
        return organic.asked_by(np.array(users, object), own)

    def of_oracle(self) -> dict[str, Any]:
        """The videos each user will truly watch longest."""
        lab, asked = self.lab, self.holdout
        now = best(lab.truth, lab.catalogue.item_ids)
        return self._lists_and_recall(now, best(lab.truth_of(asked.user_ids, asked.seen), lab.catalogue.item_ids, 50))

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


def beam(recommender: Recommender, context: Context, seen: Sequence[set[str]]) -> list[list[str]]:
    """The ``BEAM`` best unseen items for each request."""
    answers = recommender.recommend(context, num_items=BEAM, beam_width=BEAM, exclude=seen)
    return [answer.item_ids for answer in answers]


def by_user(rankings: Rankings, holdout: Holdout) -> np.ndarray:
    """float64 [users with something to find], recall@50: the mean over each one's requests, users by name."""
    recall = accuracy(rankings, holdout.relevant)["recall@50"]
    asked = [user for user, wanted in zip(holdout.user_ids, holdout.relevant, strict=True) if wanted]
    _, user = np.unique(asked, return_inverse=True)
    found: np.ndarray = np.bincount(user, recall) / np.maximum(np.bincount(user), 1)
    return found


def ordered(lists: Rankings, context: Context, judge: Stay, catalogue: Catalogue) -> list[list[str]]:
    """``lists``, of at most ``BEAM`` items, in the order of predicted stay."""
    chosen = []
    for start in range(0, len(lists), CHUNK):
        part = lists[start : start + CHUNK]
        rows = np.full((len(part), BEAM), -1)
        for number, items in enumerate(part):
            rows[number, : len(items)] = catalogue.rows(list(items))
        tensors = to_tensors(context.take(slice(start, start + CHUNK)), catalogue)
        seconds = np.nan_to_num(judge(tensors, rows, start + np.arange(len(part))), nan=-np.inf)
        order = np.argsort(-seconds, axis=1, kind="stable")
        chosen += [[items[k] for k in row if k < len(items)] for items, row in zip(part, order, strict=True)]
    return chosen
