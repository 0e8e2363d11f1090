"""How large a drift score is by chance: what the same exposures give when people's days change windows.

Scores are effect sizes, whose thresholds hold for many rows. Of few rows, which moreover come in bunches (what one
person does on one day), the largest score is noise: the Jensen-Shannon distance between the tags of 560 and 1 770
engagements of some 400 people passes 0.15 once in a hundred times though nothing happened. So every score is taken
again with the days of people dealt anew to the two windows, and what one deal in a thousand passes is the least that
can count as drift. Left out: what all people share on a day; that is what drift is.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon

DEALS = 1000
PASSED_BY = 0.001
"""Share of the deals whose score is above the level."""
MOST_BLOCKS = 20_000
"""Of more blocks so many are dealt: the level is then too high, and still far below every threshold."""
FEW_VALUES = 20
"""Evidently takes a number with up to so many different values for a category."""
EMPTY = 1e-4
"""What Evidently's PSI takes for the share of a category that a window lacks."""


def levels(
    methods: Mapping[str, str], reference: pd.DataFrame, current: pd.DataFrame, blocks: tuple[pd.Series, pd.Series]
) -> dict[str, float]:
    """The level of each column of ``methods`` (column -> psi or jensenshannon) between two windows.

    ``blocks`` names, for each row of the two, what is dealt whole; missing values count for nothing. Equal arguments
    give equal levels.
    """
    before, now = (pd.factorize(part)[0] for part in blocks)
    first = int(before.max(initial=-1)) + 1
    block = np.concatenate([before, now + first])
    number = int(block.max(initial=-1)) + 1
    dealt = np.random.default_rng(0).permutation(number)[:MOST_BLOCKS]
    size = max(round(len(dealt) * (number - first) / max(number, 1)), 1)
    found = {}
    for name, method in methods.items():
        counts = _counts(pd.concat([reference[name], current[name]]), block, number)[dealt]
        scores = [score(method, *windows) for windows in _deals(counts, size)]
        found[name] = float(np.quantile(scores, 1 - PASSED_BY)) if scores else 0.0
    return found


def score(method: str, reference: np.ndarray, current: np.ndarray) -> float:
    """Evidently's PSI or Jensen-Shannon distance of two windows' counts [K] by category."""
    p, q = (counts / counts.sum() for counts in (reference, current))
    if method == "jensenshannon":
        return float(jensenshannon(p, q))
    p, q = (np.where(share == 0, min(EMPTY, share[share > 0].min()), share) for share in (p, q))
    return float(((p - q) * np.log(p / q)).sum())


def _deals(counts: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Counts [K] of the two windows, ``size`` of the blocks' ``counts`` [B, K] in the current one; neither is empty."""
    rng, total = np.random.default_rng(1), counts.sum(0)
    for _ in range(DEALS):
        current = counts[rng.choice(len(counts), size, replace=False)].sum(0)
        if 0 < current.sum() < total.sum():
            yield total - current, current


def _counts(values: pd.Series, block: np.ndarray, number: int) -> np.ndarray:
    """Rows of each block [B, K] by the category, or the bin, that Evidently puts them in."""
    there = values.notna().to_numpy()
    known = values[there]
    if pd.api.types.is_numeric_dtype(known) and known.nunique() > FEW_VALUES:
        edges = np.histogram_bin_edges(known.to_numpy(), bins="sturges")
        codes = np.clip(np.searchsorted(edges, known.to_numpy(), side="right") - 1, 0, len(edges) - 2)
    else:
        codes = pd.factorize(known)[0]
    counts = np.zeros((number, int(codes.max(initial=0)) + 1))
    np.add.at(counts, (block[there], codes), 1)
    return counts
