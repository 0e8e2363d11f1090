"""Shrunk means of how long views were watched: by item, by user, by user and tag, by user and first code.

The plainest thing a log tells about taste, beside the P-Score, whose context has no play time freed of duration
(docs/log.md). Play times count as normal scores of their quantile among views of like duration. ``earlier`` is the same
from strictly earlier views, for calibration. Left out: decay with age.

Shapes: N views, U users, n items, B requests, G items of each, K = len(COLUMNS).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri

from features.histories.windows import Limits
from models.rewards.inputs import totals, totals_before
from models.tokenizer.vocabulary import Catalogue
from models.training.data import Contexts, RunData
from models.training.stage import play_quantile

COLUMNS = ("item", "user", "user and tag", "user and code")
OF_MANY, OF_FEW = 10.0, 4.0
"""Views of an average kind that a mean is shrunk by."""
LEAST = 0.005


@dataclass(frozen=True, kw_only=True)
class Taste:
    """Means by what they are of; ``groups`` are of the users in ``users``, a row each."""

    users: pd.Index
    item: np.ndarray
    """[n]"""
    user: np.ndarray
    """[U]"""
    tag: np.ndarray
    """[U, tags]"""
    code: np.ndarray
    """[U, codes]"""
    tags: np.ndarray
    """[n], the item's column of ``tag``."""
    codes: np.ndarray
    """[n], the item's column of ``code``."""

    def features(self, names: np.ndarray, items: np.ndarray) -> np.ndarray:
        """float64 [B, G, K] of catalogue rows ``items`` [B, G] for the users called ``names`` [B]; 0 for strangers."""
        row = self.users.get_indexer(pd.Index(names))
        known, row = (row >= 0)[:, None], np.maximum(row, 0)[:, None]
        own = [self.user[row] + 0 * items, self.tag[row, self.tags[items]], self.code[row, self.codes[items]]]
        return np.stack([self.item[items], *(np.where(known, values, 0.0) for values in own)], -1)


def scores(data: RunData) -> np.ndarray:
    """float64 [N], the normal score of each view's play time among views of like duration."""
    quantile = play_quantile(data.column("play_ms"), data.column("duration_ms"))
    found: np.ndarray = ndtri(np.clip(quantile, LEAST, 1 - LEAST))
    return found


def taste_of(data: RunData, catalogue: Catalogue, items: np.ndarray | None = None) -> tuple[Taste, np.ndarray]:
    """The means of all views in ``data``, and float64 [N, K] those of strictly earlier ones.

    ``items`` [n] are means learned from other people's views, when these must not count.
    """
    item, user, times = _rows(data, catalogue), data.sequences.events["user"].astype(np.int64), data.times_ms
    score, known = scores(data), np.maximum(item, 0)
    of_item = _mean(totals(item, score[:, None], len(catalogue)), OF_MANY) if items is None else items
    beyond = score - of_item[known]
    tags, codes = catalogue.tag.astype(np.int64), catalogue.sids[:, 0].astype(np.int64)
    people, wide, long = int(user.max(initial=-1)) + 1, int(tags.max(initial=0)) + 1, catalogue.codes
    groups = {
        "user": (user, people, OF_MANY),
        "tag": (user * wide + tags[known], people * wide, OF_FEW),
        "code": (user * long + codes[known], people * long, OF_FEW),
    }
    means = {name: _mean(totals(group, beyond[:, None], n), k) for name, (group, n, k) in groups.items()}
    before = [_mean(totals_before(item, times, score[:, None]), OF_MANY)]
    before += [_mean(totals_before(group, times, beyond[:, None]), k) for group, _, k in groups.values()]
    taste = Taste(
        users=pd.Index(data.sequences.user_ids.to_pylist()),
        item=of_item,
        user=means["user"],
        tag=means["tag"].reshape(people, wide),
        code=means["code"].reshape(people, long),
        tags=tags,
        codes=codes,
    )
    return taste, np.stack(before, -1)


def _mean(sums: np.ndarray, views: float) -> np.ndarray:
    """[G] from ``totals`` [G, 2]: counts and sums."""
    found: np.ndarray = sums[:, 1] / (sums[:, 0] + views)
    return found


def _rows(data: RunData, catalogue: Catalogue) -> np.ndarray:
    """int64 [N], the catalogue's row of each view, -1 unknown."""
    item = data.sequences.events["item"]
    rows = Contexts(data, catalogue, Limits()).item_rows
    found: np.ndarray = np.where(item >= 0, rows[np.maximum(item, 0)], -1).astype(np.int64)
    return found
