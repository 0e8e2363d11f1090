"""Who likes what, estimated from a log by empirical Bayes: biases and each user's taste for tags and durations.

The target is the normal score of a view's play ratio within its duration bucket, so that long and short videos compare.
``affinity = weights . [user bias, item bias, user taste . item traits]``. Biases are shrunken means (an item's towards
its tags' and author's); a taste is a posterior mean under a prior whose variance is measured by the covariance of a
user's views that share a trait against those that do not. Weights are fitted on out-of-fold predictions. On
KuaiRand-Pure (9 views a user) alternating least squares was tried first and predicted nothing out of fold (correlation
0.00 with what biases leave, against 0.02 for tags and durations), so matrix factorisation is left out; so are time,
user attributes and neural models.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse
from scipy.special import ndtri
from sklearn.linear_model import LinearRegression, Ridge

from features.world.responses import BUCKETS, bucket_of

FOLDS = 3
_ITEM_SHRINKAGE, _USER_SHRINKAGE = 10.0, 8.0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Views as arrays [n]: user row, item row, and the target score."""

    user: np.ndarray
    item: np.ndarray
    score: np.ndarray

    def take(self, rows: np.ndarray) -> "Rows":
        """The views in ``rows`` (indices or a mask)."""
        return Rows(user=self.user[rows], item=self.item[rows], score=self.score[rows])


@dataclass(frozen=True, kw_only=True)
class Content:
    """Item features: ``traits`` [I, D] (tags, rows of unit length, then duration buckets) and ``authors`` [I, A]."""

    traits: sparse.csr_matrix
    authors: sparse.csr_matrix

    @classmethod
    def of(cls, items: pa.Table) -> "Content":
        """Features of ITEM rows; items without tags or author have empty rows there."""
        frame = items.select(["tags", "author_id"]).to_pandas()
        tags = _one_hot([list(t) if t is not None else [] for t in frame["tags"]])
        authors = _one_hot([[a] if a is not None else [] for a in frame["author_id"]])
        buckets = np.eye(BUCKETS)[bucket_of(items["duration_ms"].to_numpy())]
        return cls(traits=sparse.hstack([tags, sparse.csr_matrix(buckets)]).tocsr(), authors=authors)


@dataclass(frozen=True, kw_only=True)
class Taste:
    """A fitted affinity: biases [U] and [I], tastes [U, D] with their posterior deviation, three weights."""

    user_bias: np.ndarray
    item_bias: np.ndarray
    tastes: np.ndarray
    deviation: np.ndarray
    traits: sparse.csr_matrix
    weights: np.ndarray

    def features(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """The three parts of the affinity, [n, 3], of pairs ``user`` [n], ``item`` [n]."""
        # The sparse side chooses the columns: at most a handful of traits per item.
        chosen = self.traits[item]
        row = np.repeat(np.arange(len(item)), np.diff(chosen.indptr))
        dot = np.bincount(row, chosen.data * self.tastes[user[row], chosen.indices], len(item))
        return np.stack([self.user_bias[user], self.item_bias[item], dot], axis=1)

    def sampled(self, users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One draw [n, D] from the posterior tastes of ``users`` [n].

        Posterior means alone would make people far more alike than they are.
        """
        return self.tastes[users] + self.deviation[users] * rng.normal(size=(len(users), self.tastes.shape[1]))


def play_score(play_ms: np.ndarray, duration_ms: np.ndarray, bucket: np.ndarray) -> np.ndarray:
    """Normal score [n] of play/duration within the duration bucket; equal ratios are spread at random."""
    ratio = play_ms / duration_ms
    luck = np.random.default_rng(0).random(len(ratio))
    score = np.zeros(len(ratio))
    for b in range(BUCKETS):
        own = np.flatnonzero(bucket == b)
        rank = np.empty(len(own))
        rank[np.lexsort((luck[own], ratio[own]))] = np.arange(len(own))
        score[own] = ndtri((rank + 0.5) / max(len(own), 1))
    return score


def fit_taste(rows: Rows, users: int, content: Content, seed: int) -> tuple[Taste, np.ndarray]:
    """Taste fitted on all rows, and the out-of-fold affinities [n] of the same rows."""
    fold = np.random.default_rng(seed).integers(0, FOLDS, len(rows.score))
    unit = np.ones(3)
    parts = np.zeros((len(rows.score), 3))
    for k in range(FOLDS):
        held = fold == k
        if held.any() and not held.all():
            part = _fit_parts(rows.take(~held), users, content, unit)
            parts[held] = part.features(rows.user[held], rows.item[held])
    # Non-negative: a part that does not help out of fold must not be turned upside down.
    weights = LinearRegression(positive=True).fit(parts, rows.score).coef_
    return _fit_parts(rows, users, content, weights), parts @ weights


def _fit_parts(rows: Rows, users: int, content: Content, weights: np.ndarray) -> Taste:
    items = content.traits.shape[0]
    seen = np.bincount(rows.item, minlength=items)
    mean = np.bincount(rows.item, rows.score, items) / np.maximum(seen, 1)
    known = sparse.hstack([content.traits, content.authors]).tocsr()
    prior = Ridge(alpha=20.0).fit(known, mean, sample_weight=seen).predict(known)
    item_bias = (mean * seen + prior * _ITEM_SHRINKAGE) / (seen + _ITEM_SHRINKAGE)
    rest = rows.score - item_bias[rows.item]
    views = np.bincount(rows.user, minlength=users)
    variance = _trait_variance(rows, rest, users, content.traits)
    user_total = np.bincount(rows.user, rest, users)
    # Tastes see deviations from the user's own mean; after a shrunken bias they would relearn what it left.
    rest = rest - (user_total / np.maximum(views, 1))[rows.user]
    total, count = _per_user(rows, rest, users, content.traits), _per_user(rows, None, users, content.traits.power(2))
    shrinkage = rest.var() / variance
    return Taste(
        user_bias=user_total / (views + _USER_SHRINKAGE),
        item_bias=item_bias,
        tastes=total / (count + shrinkage),
        deviation=np.sqrt(variance * shrinkage / (count + shrinkage)),
        traits=content.traits,
        weights=weights,
    )


def _trait_variance(rows: Rows, rest: np.ndarray, users: int, traits: sparse.csr_matrix) -> np.ndarray:
    """Prior variance [D] of tastes, one for tags and one for duration buckets, by the method of moments.

    Mean product of what biases leave of two views of one user: pairs sharing a trait minus pairs that do not.
    """
    tags = traits.shape[1] - BUCKETS
    everyone = sparse.csr_matrix(np.ones((traits.shape[0], 1)))
    all_products, all_pairs = _pair_sums(rows, rest, users, everyone)
    variance = np.empty(traits.shape[1])
    for columns in (slice(0, tags), slice(tags, None)):
        products, pairs = _pair_sums(rows, rest, users, traits[:, columns])
        apart = (all_products - products) / max(all_pairs - pairs, 1e-9)
        variance[columns] = max(products / max(pairs, 1e-9) - apart, 1e-4)
    return variance


def _pair_sums(rows: Rows, rest: np.ndarray, users: int, traits: sparse.csr_matrix) -> tuple[float, float]:
    """Products summed over ordered pairs of a user's views, weighted by shared traits; and the sum of the weights."""
    squares = traits.power(2)
    products = (_per_user(rows, rest, users, traits) ** 2).sum() - _per_user(rows, rest**2, users, squares).sum()
    pairs = (_per_user(rows, None, users, traits) ** 2).sum() - _per_user(rows, None, users, squares).sum()
    return float(products), float(pairs)


def _per_user(rows: Rows, values: np.ndarray | None, users: int, traits: sparse.csr_matrix) -> np.ndarray:
    """Sum over each user's views of ``values`` (default 1) times the item's traits, [U, D]."""
    values = np.ones(len(rows.user)) if values is None else values
    views = sparse.csr_matrix((values, (rows.user, rows.item)), shape=(users, traits.shape[0]))
    return np.asarray((views @ traits).todense())


def _one_hot(words: list[list[str]]) -> sparse.csr_matrix:
    """Rows of unit length with one entry a word."""
    codes, names = pd.factorize(np.array([w for own in words for w in own], object))
    lengths = np.array([len(own) for own in words])
    row = np.repeat(np.arange(len(words)), lengths)
    data = np.repeat(np.maximum(lengths, 1) ** -0.5, lengths)
    return sparse.csr_matrix((data, (row, codes)), shape=(len(words), max(len(names), 1)))
