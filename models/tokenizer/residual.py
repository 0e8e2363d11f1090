"""Residual K-means: the SID of an item is its code at each level (OneRec technical report, arXiv 2506.13695, 2.1.2).

``R1 = x; C_l = kmeans(R_l); s_l = code of R_l; R_{l+1} = R_l - C_l[s_l]``, with the balanced variant of K-means
of arXiv 2502.18965. The papers describe no rule for collisions; ``unique`` adds one of ours: inside each prefix
the items share out the last level's codes at least total distance, so that SIDs differ while codes last. Left
out: RQ-VAE and learned rotations.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from models.tokenizer.kmeans import balanced_assign, distances, kmeans


class ResidualQuantizer:
    """Frozen codebooks float32 [levels, codes, dim]; made by ``fit`` or from stored codebooks."""

    def __init__(self, codebooks: np.ndarray) -> None:
        if codebooks.ndim != 3 or not np.isfinite(codebooks).all():
            raise ValueError(f"codebooks have shape {codebooks.shape}; expected finite [levels, codes, dim]")
        self.codebooks = codebooks.astype(np.float32)

    @classmethod
    def fit(
        cls, x: np.ndarray, *, levels: int = 3, codes: int = 64, balanced: bool = True, seed: int = 0
    ) -> "ResidualQuantizer":
        """Codebooks of rows ``x`` [n, dim]; equal seeds give equal codebooks.

        Raises ValueError when there are fewer rows than codes, when all rows are equal or any is not finite.
        """
        residual = np.asarray(x, np.float32)
        codebooks = []
        for level in range(levels):
            if level and _constant(residual):  # the levels before already hold every distinct row exactly
                codebooks.append(np.repeat(residual[:1], codes, axis=0))
                continue
            centroids, _ = kmeans(residual, codes, balanced=balanced, seed=seed + level)
            codebooks.append(centroids)
            residual = residual - centroids[_codes(residual, centroids, balanced)]
        return cls(np.stack(codebooks))

    @property
    def levels(self) -> int:
        """How many codes a SID has."""
        return len(self.codebooks)

    @property
    def codes(self) -> int:
        """How many codes a level has."""
        return self.codebooks.shape[1]

    def assign(self, x: np.ndarray, *, balanced: bool = True, unique: bool = False) -> np.ndarray:
        """SIDs int32 [n, levels] of a whole catalogue, seen together: balanced per level, distinct if ``unique``."""
        sids, residual = np.empty((len(x), self.levels), np.int32), np.asarray(x, np.float32)
        for level, centroids in enumerate(self.codebooks):
            sids[:, level] = _codes(residual, centroids, balanced)
            if unique and level == self.levels - 1:
                sids = _separate(sids, distances(residual, centroids))
            residual = residual - centroids[sids[:, level]]
        return sids

    def encode(self, x: np.ndarray) -> np.ndarray:
        """SIDs int32 [n, levels] of rows on their own: the nearest code at every level."""
        return self.assign(x, balanced=False)

    def encode_beside(self, x: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """SIDs int32 [n, levels] of new rows, the last code the nearest free one beside the SIDs ``taken`` [m, levels].

        A prefix whose codes are all taken keeps its nearest last code, so the SID is shared.
        """
        sids = self.encode(x)
        cost = distances(x - self.reconstruct(sids[:, :-1]), self.codebooks[-1])
        used: dict[tuple[int, ...], set[int]] = {}
        for *prefix, last in taken.tolist():
            used.setdefault(tuple(prefix), set()).add(last)
        for row, prefix in enumerate(map(tuple, sids[:, :-1].tolist())):
            full = used.setdefault(prefix, set())
            last = next((code for code in np.argsort(cost[row], kind="stable").tolist() if code not in full), None)
            if last is not None:
                sids[row, -1] = last
                full.add(last)
        return sids

    def reconstruct(self, sids: np.ndarray) -> np.ndarray:
        """The sum of the codes of SIDs or SID prefixes [n, up to levels]: float32 [n, dim]."""
        parts = (self.codebooks[level][sids[:, level]] for level in range(sids.shape[1]))
        return sum(parts, start=np.zeros((len(sids), self.codebooks.shape[2]), np.float32))


def _codes(residual: np.ndarray, centroids: np.ndarray, balanced: bool) -> np.ndarray:
    cost = distances(residual, centroids)
    if not balanced:
        return cost.argmin(1).astype(np.int32)
    return balanced_assign(cost, -(-len(cost) // len(centroids)), tolerance=0.02)


def _separate(sids: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """``sids`` with the last codes of each prefix re-assigned at least ``cost`` [n, codes], as evenly as possible."""
    sids = sids.copy()
    codes = cost.shape[1]
    _, group, sizes = np.unique(sids[:, :-1], axis=0, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(sizes)[:-1])
    for rows in members:
        if len(np.unique(sids[rows, -1])) == len(rows):
            continue
        places = -(-len(rows) // codes)
        # A code's second place costs more than any first one: all codes are used before one is shared.
        surcharge = np.repeat(np.arange(places), codes) * (len(rows) * cost[rows].max() + 1)
        _, columns = linear_sum_assignment(np.tile(cost[rows], places) + surcharge)
        sids[rows, -1] = columns % codes
    return sids


def _constant(x: np.ndarray) -> bool:
    return bool(np.abs(x - x[0]).max() < 1e-6)
