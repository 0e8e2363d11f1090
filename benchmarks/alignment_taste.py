"""What a log tells of taste by the plainest means: shrunk means of how long views were watched, and a ridge regression
for each user on what videos are about.

It stands beside the P-Score, whose context has no play time freed of duration (docs/log.md). Play times count as normal
scores of their quantile among views of like duration. A regression explains what a video's own mean leaves of a user's
views by its ``topics``: tags that come together (latent semantic analysis, Deerwester et al. 1990). ``earlier`` is the
same from earlier views alone, for calibration. Left out: decay with age, authors.

Shapes: N views, U users, n items, B requests, G items of each, E topics, K = len(COLUMNS).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from features.histories.windows import Limits
from models.rewards.inputs import totals, totals_before
from models.rewards.stay import normal_score
from models.tokenizer.vocabulary import Catalogue
from models.training.data import Contexts, RunData
from models.training.stage import play_quantile

COLUMNS = ("item", "user", "user and topics")
OF_MANY = 10.0
"""Views of an average kind that a mean is shrunk by."""
RIDGE = 6.0
"""Views of one topic that a slope is shrunk by."""
TOPICS = 24


@dataclass(frozen=True, kw_only=True)
class Taste:
    """What is known of all items, and of the users in ``users``, a row each."""

    users: pd.Index
    item: np.ndarray
    """[n]"""
    user: np.ndarray
    """[U]"""
    slopes: np.ndarray
    """[U, E]"""
    topics: np.ndarray
    """[n, E]"""

    def features(self, names: np.ndarray, items: np.ndarray) -> np.ndarray:
        """float64 [B, G, K] of catalogue rows ``items`` [B, G] for the users called ``names`` [B]; 0 for strangers."""
        row = self.users.get_indexer(pd.Index(names))
        known, row = (row >= 0)[:, None], np.maximum(row, 0)
        liked = np.einsum("be,bge->bg", self.slopes[row], self.topics[items])
        own = [self.user[row][:, None] + 0 * items, liked]
        return np.stack([self.item[items], *(np.where(known, values, 0.0) for values in own)], -1)


def scores(data: RunData) -> np.ndarray:
    """float64 [N], the normal score of each view's play time among views of like duration."""
    quantile = play_quantile(data.column("play_ms"), data.column("duration_ms"))
    return normal_score(quantile)


def taste_of(data: RunData, catalogue: Catalogue, items: np.ndarray | None = None) -> tuple[Taste, np.ndarray]:
    """What all views in ``data`` tell, and float64 [N, K] what earlier ones told.

    ``items`` [n] are means learned from other people's views, when these must not count.
    """
    item, user, times = _rows(data, catalogue), data.sequences.events["user"].astype(np.int64), data.times_ms
    score, known = scores(data), np.maximum(item, 0)
    of_item = _mean(totals(item, score[:, None], len(catalogue))) if items is None else items
    beyond, people = score - of_item[known], int(user.max(initial=-1)) + 1
    topics = topics_of(data, catalogue)
    slopes, told = regressions(user, times, topics[known], beyond, people)
    before = [
        _mean(totals_before(item, times, score[:, None])),
        _mean(totals_before(user, times, beyond[:, None])),
        told,
    ]
    taste = Taste(
        users=pd.Index(data.sequences.user_ids.to_pylist()),
        item=of_item,
        user=_mean(totals(user, beyond[:, None], people)),
        slopes=slopes,
        topics=topics,
    )
    return taste, np.stack(before, -1)


def topics_of(data: RunData, catalogue: Catalogue) -> np.ndarray:
    """float64 [n, E], unit vectors of what the catalogue's items are about by their tags; 0 without any."""
    tags = [list(each or ()) for each in data.items.column("tags").to_pylist()]
    weights = TfidfVectorizer(analyzer=lambda each: each).fit_transform(tags).toarray()
    left, sizes, _ = np.linalg.svd(weights, full_matrices=False)
    found = np.zeros((len(catalogue), min(TOPICS, len(sizes))))
    rows = catalogue.rows(data.items.column("item_id").to_pylist())
    found[rows[rows >= 0]] = (left * sizes)[rows >= 0, : found.shape[1]]
    unit: np.ndarray = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    return unit


def regressions(
    user: np.ndarray, times: np.ndarray, x: np.ndarray, y: np.ndarray, people: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [U, E] of every user's ridge regression of ``y`` [N] on ``x`` [N, E], and what it predicted before.

    Recursive least squares: the predictions [N] are those of the user's earlier views.
    """
    width = x.shape[1]
    spread, slopes = np.repeat(np.eye(width)[None] / RIDGE, people, 0), np.zeros((people, width))
    told, order = np.zeros(len(y)), np.lexsort((times, user))
    first = np.searchsorted(user[order], user[order])
    place = np.arange(len(order)) - first
    for turn in np.split(order[np.argsort(place, kind="stable")], np.cumsum(np.bincount(place))[:-1]):
        who, new = user[turn], x[turn]  # everybody's next view
        told[turn] = (slopes[who] * new).sum(1)
        moved = np.einsum("uij,uj->ui", spread[who], new)
        gain = moved / (1 + (new * moved).sum(1, keepdims=True))
        slopes[who] += gain * (y[turn] - told[turn])[:, None]
        spread[who] -= gain[:, :, None] * moved[:, None, :]
    return slopes, told


def _mean(sums: np.ndarray) -> np.ndarray:
    """[G] from ``totals`` [G, 2]: counts and sums."""
    found: np.ndarray = sums[:, 1] / (sums[:, 0] + OF_MANY)
    return found


def _rows(data: RunData, catalogue: Catalogue) -> np.ndarray:
    """int64 [N], the catalogue's row of each view, -1 unknown."""
    item = data.sequences.events["item"]
    rows = Contexts(data, catalogue, Limits()).item_rows
    found: np.ndarray = np.where(item >= 0, rows[np.maximum(item, 0)], -1).astype(np.int64)
    return found
