"""Residual K-means: the SID of an item is its code at each level (OneRec technical report, arXiv 2506.13695, 2.1.2).

``R1 = x; C_l = kmeans(R_l); s_l = code of R_l; R_{l+1} = R_l - C_l[s_l]``, with the balanced variant of K-means
of arXiv 2502.18965. Ours, where the papers are silent: *sweeps* after all levels are fitted, which re-assign and re-fit
each level against what the others leave of x (the papers freeze a level before they see the next), with SIDs kept
apart; and ``unique``, which shares out the last level's codes inside each prefix at least total distance: SIDs differ
while codes last.
Left out: RQ-VAE and learned rotations.
"""

import hashlib
from functools import cached_property

import numpy as np

from models.tokenizer.balance import balanced_nearest, capacity_of
from models.tokenizer.kmeans import TOLERANCE, kmeans, means
from models.tokenizer.nearest import nearest
from models.tokenizer.separate import free_last_codes, separate

FINE = 0.02
"""Bid increment of the assignments that are kept."""
SWEEPS = 4
"""Sweeps over the levels in ``fit``: the first two win most of what there is to win."""
SETTLING = 2
"""Sweeps with frozen codebooks in ``assign``."""


class ResidualQuantizer:
    """Frozen codebooks float32 [levels, codes, dim]; made by ``fit`` or from stored codebooks.

    ``slack`` is the room of balanced clusters: at most ceil(n / codes x (1 + slack)) rows each, 0 the exact ceil.
    """

    def __init__(self, codebooks: np.ndarray, slack: float = 0.05) -> None:
        if codebooks.ndim != 3 or not np.isfinite(codebooks).all():
            raise ValueError(f"codebooks have shape {codebooks.shape}; expected finite [levels, codes, dim]")
        if not 0 <= slack < 1:
            raise ValueError(f"slack is {slack}; expected a share of the even load, from 0 (exact) to below 1")
        self.codebooks = codebooks.astype(np.float32)
        self.slack = slack

    @classmethod
    def fit(
        cls,
        x: np.ndarray,
        *,
        levels: int = 3,
        codes: int = 64,
        balanced: bool = True,
        slack: float = 0.05,
        sweeps: int = SWEEPS,
        seed: int = 0,
    ) -> "ResidualQuantizer":
        """Codebooks of rows ``x`` [n, dim]; equal seeds give equal codebooks. Plain (not balanced) ones are not swept.

        Raises ValueError when there are fewer rows than codes, when all rows are equal or any is not finite.
        """
        residual = np.array(x, np.float32)
        codebooks, sids = [], []
        for level in range(levels):
            if level and _constant(residual):  # the levels before already hold every distinct row exactly
                codebooks.append(np.repeat(residual[:1], codes, axis=0))
                sids.append(np.zeros(len(residual), np.int32))
            else:
                centroids, assignment = kmeans(residual, codes, balanced=balanced, slack=slack, seed=seed + level)
                codebooks.append(centroids)
                sids.append(assignment)
            residual -= codebooks[-1][sids[-1]]
        quantizer = cls(np.stack(codebooks), slack)
        if balanced:
            quantizer._sweep(residual, np.stack(sids, axis=1), sweeps, learn=True, apart=True)
        return quantizer

    @property
    def levels(self) -> int:
        """How many codes a SID has."""
        return len(self.codebooks)

    @property
    def codes(self) -> int:
        """How many codes a level has."""
        return self.codebooks.shape[1]

    @cached_property
    def version(self) -> str:
        """Twelve hexadecimal digits that name these codebooks: SIDs made by others mean something else."""
        digest = hashlib.sha256(str(self.codebooks.shape).encode())
        digest.update(np.ascontiguousarray(self.codebooks, "<f4").tobytes())
        return digest.hexdigest()[:12]

    def assign(self, x: np.ndarray, *, balanced: bool = True, unique: bool = False) -> np.ndarray:
        """SIDs int32 [n, levels] of a whole catalogue, seen together: balanced per level, distinct if ``unique``."""
        residual = self._rows(x)
        sids = np.empty((len(residual), self.levels), np.int32)
        capacity = capacity_of(len(residual), self.codes, self.slack)
        for level, centroids in enumerate(self.codebooks):
            if balanced:
                sids[:, level] = balanced_nearest(residual, centroids, capacity, tolerance=FINE)
            else:
                sids[:, level] = nearest(residual, centroids)
            residual -= centroids[sids[:, level]]
        if balanced:
            self._sweep(residual, sids, SETTLING, apart=unique)
        if not unique:
            return sids
        residual += self.codebooks[-1][sids[:, -1]]
        return separate(sids, residual, self.codebooks[-1], capacity if balanced else None)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """SIDs int32 [n, levels] of rows on their own: the nearest code at every level."""
        return self.assign(x, balanced=False)

    def encode_beside(self, x: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """SIDs int32 [n, levels] of new rows, the last code the nearest free one beside the SIDs ``taken`` [m, levels].

        A prefix whose codes are all taken keeps its nearest last code, so the SID is shared.
        """
        sids = self.encode(x)
        if taken.ndim != 2 or taken.shape[1] != self.levels:
            raise ValueError(f"the SIDs taken have shape {taken.shape}; these codebooks make {self.levels} levels")
        return free_last_codes(sids, x - self.reconstruct(sids[:, :-1]), self.codebooks[-1], taken)

    def reconstruct(self, sids: np.ndarray) -> np.ndarray:
        """The sum of the codes of SIDs or SID prefixes [n, up to levels]: float32 [n, dim]."""
        total = np.zeros((len(sids), self.codebooks.shape[2]), np.float32)
        for level in range(sids.shape[1]):
            total += self.codebooks[level][sids[:, level]]
        return total

    def _rows(self, x: np.ndarray) -> np.ndarray:
        """A float32 copy of ``x``; raises ValueError when these codebooks cannot encode it."""
        x = np.array(x, np.float32)
        if x.ndim != 2 or x.shape[1] != self.codebooks.shape[2]:
            raise ValueError(
                f"rows have shape {x.shape}; codebook {self.version} encodes [n, {self.codebooks.shape[2]}]: "
                "use the embedder it was fitted with"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} rows hold NaN or infinity")
        return x

    def _sweep(
        self, residual: np.ndarray, sids: np.ndarray, sweeps: int, *, learn: bool = False, apart: bool = False
    ) -> None:
        """Re-assigns level after level, last to first and back, against what the others leave of x; all in place.

        ``residual`` [n, dim] is x less all its codes. With ``learn`` centroids follow their rows; ``apart`` separates
        SIDs whenever the last level is assigned, which costs nothing once the other levels answer to it.
        """
        capacity = capacity_of(len(residual), self.codes, self.slack)
        for sweep in range(sweeps if self.levels > 1 else 0):
            for level in sorted(range(self.levels), reverse=sweep % 2 == 0):
                centroids = self.codebooks[level]
                residual += centroids[sids[:, level]]
                tolerance = TOLERANCE if learn else FINE
                sids[:, level] = balanced_nearest(residual, centroids, capacity, tolerance=tolerance)
                if apart and level == self.levels - 1:
                    sids[:] = separate(sids, residual, centroids, capacity)
                if learn:
                    self.codebooks[level] = centroids = means(residual, sids[:, level], centroids)
                residual -= centroids[sids[:, level]]


def _constant(x: np.ndarray) -> bool:
    return bool(np.abs(x - x[0]).max() < 1e-6)
