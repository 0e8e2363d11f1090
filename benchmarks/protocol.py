"""What is trained on, validated on and tested on, for sequences of positive interactions.

Leave-one-out: every user's last interaction is the test, the one before it the validation (the public sequence sets'
protocol). Time split: all training lies before a date, and each user's first interaction after it is the test (the
validation likewise, some days before). Left out: several tests a user.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from benchmarks.leave_one_out import LEAST, Histories
from models.tokenizer.interactions import times

DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Positions in ``histories``, int64 and ascending; each has an interaction of its user before it."""

    histories: Histories
    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    name: str
    until_ms: int | None = None
    """Nothing of anybody from this time on may be learned from; None: of a user nothing from the validation on."""

    def sampled(self, tests: int, targets: int) -> "Split":
        """With at most ``tests`` tests and validations, and what ``targets`` positions of whole users teach; random."""
        rng = np.random.default_rng(0)
        validation, test = (
            np.sort(rng.choice(whole, min(tests, len(whole)), replace=False)) for whole in (self.validation, self.test)
        )
        user = np.searchsorted(self.histories.starts, self.training, side="right") - 1
        order = rng.permutation(np.unique(user))
        taught = order[np.cumsum(np.bincount(user)[order]) <= max(targets, np.bincount(user)[order[0]])]
        return replace(self, validation=validation, test=test, training=self.training[np.isin(user, taught)])

    def training_table(self, exposures: pa.Table) -> pa.Table:
        """The rows of ``exposures`` (what ``histories`` was made of) that may be learned from."""
        kept = np.ones(exposures.num_rows, bool)
        last = self.last()
        place = np.arange(len(self.histories.item))
        user = np.searchsorted(self.histories.starts, place, side="right") - 1
        kept[self.histories.row[place > last[user]]] = False
        if self.until_ms is not None:  # also what met no engagement, and users who are not tested
            kept &= times(exposures) < self.until_ms
        return exposures.filter(pa.array(kept))

    def last(self) -> np.ndarray:
        """int64 [U], each user's last position in training (its first interaction is an input where it has one)."""
        starts = self.histories.starts
        last = starts[:-1].copy()
        user = np.searchsorted(starts, self.training, side="right") - 1
        np.maximum.at(last, user, self.training)
        return last

    def occurrences(self, items: int) -> np.ndarray:
        """int64 [items], how often each item stands in what is learned from."""
        place = np.arange(len(self.histories.item))
        user = np.searchsorted(self.histories.starts, place, side="right") - 1
        learned = place <= self.last()[user]
        if self.until_ms is not None:
            learned &= self.histories.time_ms < self.until_ms
        return np.bincount(self.histories.item[learned], minlength=items)


def leave_one_out(histories: Histories) -> Split:
    """Last = test, last but one = validation, the positions before these but a user's first = training.

    Raises ValueError when no position is left for training.
    """
    training = histories.training()
    if not len(training):
        raise ValueError(
            f"none of {len(histories.starts) - 1} users has {LEAST + 1} positive interactions: one to begin from, one "
            "to validate and one to test on leave nothing to learn from; give longer histories"
        )
    return Split(
        histories=histories,
        training=training,
        validation=histories.test() - 1,
        test=histories.test(),
        name="leave-one-out",
    )


def time_split(histories: Histories, date_ms: int, validation_days: float = 1.0) -> Split:
    """Raises ValueError when nobody has interactions on both sides of the date."""
    position = np.arange(len(histories.item))
    follows = position > histories.first(position) if len(position) else position > 0
    border = date_ms - int(validation_days * DAY_MS)
    training = position[follows & (histories.time_ms < border)]
    validation = _first_since(histories, follows & (histories.time_ms < date_ms), border)
    test = _first_since(histories, follows, date_ms)
    if not len(training) or not len(validation) or not len(test):
        raise ValueError(
            f"{len(training)} interactions to learn from, {len(validation)} to validate and {len(test)} to test on; "
            f"choose a date that has interactions after it, within {validation_days:g} days before it and earlier"
        )
    return Split(
        histories=histories, training=training, validation=validation, test=test, name="time split", until_ms=border
    )


def _first_since(histories: Histories, eligible: np.ndarray, time_ms: int) -> np.ndarray:
    """Each user's first eligible position from ``time_ms`` on."""
    late = np.flatnonzero(eligible & (histories.time_ms >= time_ms))
    users = np.searchsorted(histories.starts, late, side="right") - 1
    return late[np.unique(users, return_index=True)[1]]
