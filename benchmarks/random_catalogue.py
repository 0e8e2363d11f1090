"""A catalogue of random semantic IDs and the lengths of a context, for benchmarks that measure time and not quality."""

import numpy as np

CODES, LEVELS = 8192, 3
LENGTHS = (20, 256, 236)
"""Behaviours of each pathway: 512 in all."""


def random_sids(items: int, seed: int = 0) -> np.ndarray:
    """``items`` distinct SIDs with uneven codes, as clustering makes them: a code's weight falls with its rank."""
    rng = np.random.default_rng(seed)
    weight = (np.arange(CODES) + 50.0) ** -0.7
    weight /= weight.sum()
    found = np.empty((0, LEVELS), np.int64)
    while len(found) < items:
        codes = rng.choice(CODES, (2 * items, LEVELS), p=weight)
        codes[:, 1:] = (codes[:, 1:] + 7919 * codes[:, :-1]) % CODES  # every prefix has favourites of its own
        found = np.unique(np.concatenate([found, codes]), axis=0)
    return rng.permutation(found)[:items]
