"""SIDs that differ: the last codes shared out inside each prefix (the papers describe no rule for collisions).

Items whose SIDs collide share a prefix, so only the last code has to move: inside each such prefix the last codes are
assigned anew at least total distance. What that overloads is relieved by the cheapest moves to codes that are free in
the prefix. Rows that are equal cannot be told apart by distance; they still get codes of their own while codes last.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from models.tokenizer.nearest import listed_distances


def separate(sids: np.ndarray, residual: np.ndarray, centroids: np.ndarray, capacity: int | None) -> np.ndarray:
    """``sids`` [n, levels] with distinct last codes in each prefix, evenly shared where it has more rows than codes.

    ``residual`` [n, dim] is what the codes before the last leave, ``centroids`` [codes, dim] the last level's. With a
    ``capacity`` no last code ends with more rows than that, if a free code can be found.
    """
    sids = sids.copy()
    _, group, sizes = np.unique(sids[:, :-1], axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    distinct = np.unique(np.stack([group, sids[:, -1]], axis=1), axis=0)
    colliding = np.flatnonzero(np.bincount(distinct[:, 0], minlength=len(sizes)) < sizes)
    if not len(colliding):
        return sids
    rows = np.flatnonzero(np.isin(group, colliding))
    rows = rows[np.argsort(group[rows], kind="stable")]
    for members in np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1):
        sids[members, -1] = _share_out(_costs(residual[members], centroids))
    if capacity is not None:
        _relieve(sids, group, residual, centroids, capacity)
    return sids


def free_last_codes(sids: np.ndarray, residual: np.ndarray, centroids: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """``sids`` [n, levels] of new rows, one after the other with the nearest last code not ``taken`` [m, levels].

    A prefix whose codes are all taken keeps its nearest last code.
    """
    sids = sids.copy()
    new = {tuple(prefix) for prefix in sids[:, :-1].tolist()}
    used: dict[tuple[int, ...], set[int]] = {}
    for *prefix, last in taken.tolist():
        if tuple(prefix) in new:
            used.setdefault(tuple(prefix), set()).add(last)
    for row, prefix in enumerate(map(tuple, sids[:, :-1].tolist())):
        full = used.setdefault(prefix, set())
        if int(sids[row, -1]) in full and len(full) < len(centroids):
            order = np.argsort(_costs(residual[row : row + 1], centroids)[0], kind="stable").tolist()
            sids[row, -1] = next(code for code in order if code not in full)
        full.add(int(sids[row, -1]))
    return sids


def _costs(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances float64 [r, codes] of a few rows."""
    everything = np.broadcast_to(np.arange(len(centroids)), (len(rows), len(centroids)))
    return listed_distances(rows, centroids, everything).astype(np.float64)


def _share_out(cost: np.ndarray) -> np.ndarray:
    """Codes int64 [r] at least total ``cost`` [r, codes], as evenly as possible."""
    codes = cost.shape[1]
    places = -(-len(cost) // codes)
    # A code's second place costs more than any first one: all codes are used before one is shared.
    surcharge = np.repeat(np.arange(places), codes) * (len(cost) * cost.max() + 1)
    _, columns = linear_sum_assignment(np.tile(cost, places) + surcharge)
    return np.asarray(columns % codes)


def _relieve(sids: np.ndarray, group: np.ndarray, residual: np.ndarray, centroids: np.ndarray, capacity: int) -> None:
    """Moves rows out of last codes that hold more than ``capacity``, cheapest move first; in place."""
    loads = np.bincount(sids[:, -1], minlength=len(centroids))
    for code in np.flatnonzero(loads > capacity):
        members = np.flatnonzero(sids[:, -1] == code)
        extra = _costs(residual[members], centroids)
        extra -= extra[:, [code]]
        for index, row in enumerate(members):  # codes that the row's prefix already uses would collide
            extra[index, sids[group == group[row], -1]] = np.inf
        while loads[code] > capacity:
            extra[:, loads >= capacity] = np.inf
            place, target = (int(index) for index in np.unravel_index(int(extra.argmin()), extra.shape))
            if not np.isfinite(extra[place, target]):
                break
            sids[members[place], -1] = target
            loads[code] -= 1
            loads[target] += 1
            # Rows of one prefix must not follow each other to the same code.
            extra[group[members] == group[members[place]], target] = np.inf
            extra[place] = np.inf
