"""When to fit new codebooks, and how their SIDs relate to the old ones.

Codebooks are frozen between bundles while the catalogue and what is watched move on. ``usage_drift`` measures how
far: the distribution over codes of two sets of items or exposures, level by level. ``refit`` takes new codebooks and
renumbers their codes so that as many items as possible keep their old code (an optimal matching on how many items two
codes share, distance deciding between equals), which changes no distance and no error, and says for every item what its
old SID became. Both are ours; the papers know no moving catalogue. Left out: starting the model from the old weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.optimize import linear_sum_assignment

from models.tokenizer.kmeans import distances
from models.tokenizer.residual import ResidualQuantizer
from models.tokenizer.vocabulary import Catalogue

_FLOOR = 1e-4  # share given to codes that one side does not use, so that the PSI stays finite


def usage_drift(before: np.ndarray, after: np.ndarray, codes: int) -> dict[str, list[float]]:
    """Per level, how far the codes of SIDs ``after`` [m, levels] moved from those ``before`` [n, levels].

    ``js`` is the Jensen-Shannon distance (base 2, 0..1), ``psi`` the population stability index (above 0.2 is usually
    called a shift) and ``js_noise`` the distance two samples of these sizes are expected to have without any drift.
    Raises ValueError when a side is empty or the levels differ.
    """
    if not len(before) or not len(after) or before.shape[1] != after.shape[1]:
        raise ValueError(
            f"SIDs of shapes {before.shape} and {after.shape}; expected rows on both sides and equal levels"
        )
    result: dict[str, list[float]] = {"js": [], "psi": [], "js_noise": []}
    for old, new in zip(before.T, after.T, strict=True):
        p, q = (np.bincount(column, minlength=codes) / len(column) for column in (old, new))
        result["js"].append(_jensen_shannon(p, q))
        p, q = (np.maximum(share, _FLOOR) for share in (p, q))
        result["psi"].append(float(((q - p) * np.log(q / p)).sum()))
        # For small differences JS divergence is chi^2 / 8 in nats, and E chi^2 = (used codes - 1)(1/n + 1/m).
        used = len(np.union1d(old, new))
        result["js_noise"].append(float(np.sqrt((used - 1) * (1 / len(before) + 1 / len(after)) / 8 / np.log(2))))
    return result


def appended_drift(before: Catalogue, after: Catalogue) -> dict[str, Any]:
    """``usage_drift`` of the items that ``after`` has beyond ``before``, for a quality report; {} when there are none.

    Codes that new items crowd (or shun) are the sign that codebooks have grown old.
    """
    new = after.sids[len(before) :]
    return {"usage_drift": usage_drift(before.sids, new, before.codes)} if len(new) and len(before) else {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Refit:
    """New codebooks under the old ones' names, the new SIDs of all items, and what became of the old ones."""

    quantizer: ResidualQuantizer
    sids: np.ndarray
    """int32 [n, levels]: the items' new SIDs."""
    mapping: pa.Table
    """item_id, old_sid, new_sid: one row an item that both catalogues know."""
    kept: dict[str, Any]
    """``codes``: share of these items that keep their code, per level; ``sids``: that keep all of it; ``moved``: how
    far matched centroids of the first level moved, as a share of the mean distance between them, None in another space.
    Empty when codebooks of another shape replace the old ones: then no name is kept."""


def refit(fitted: ResidualQuantizer, catalogue: Catalogue, old: ResidualQuantizer, before: Catalogue) -> Refit:
    """Renames the codes of ``fitted``, which gave ``catalogue`` its SIDs, to agree with ``before``, SIDs from ``old``.

    Raises ValueError when the catalogues have no item in common.
    """
    rows = before.rows(catalogue.item_ids)
    both = rows >= 0
    if not both.any():
        raise ValueError(
            f"the catalogues of {len(catalogue)} and {len(before)} items have none in common; expected a catalogue "
            "that goes on from the other"
        )
    alike = (fitted.levels, fitted.codes) == (old.levels, old.codes)
    new_sids, old_sids = catalogue.sids[both], before.sids[rows[both]]
    names = matching(fitted, new_sids, old, old_sids) if alike else []
    quantizer, sids = renamed(fitted, catalogue.sids, names)
    ids = [item for item, known in zip(catalogue.item_ids, both, strict=True) if known]
    mapping = pa.table({"item_id": ids, "old_sid": old_sids.tolist(), "new_sid": sids[both].tolist()})
    if not alike:
        return Refit(quantizer=quantizer, sids=sids, mapping=mapping, kept={})
    gap = (
        np.sqrt(((quantizer.codebooks[0] - old.codebooks[0]) ** 2).sum(1)).mean() if _same_space(old, fitted) else None
    )
    typical = np.sqrt(distances(quantizer.codebooks[0], quantizer.codebooks[0])).mean()
    kept = {
        "codes": (sids[both] == old_sids).mean(0).tolist(),
        "sids": float((sids[both] == old_sids).all(1).mean()),
        "moved": None if gap is None else float(gap / max(typical, 1e-12)),
    }
    return Refit(quantizer=quantizer, sids=sids, mapping=mapping, kept=kept)


def matching(
    new: ResidualQuantizer, new_sids: np.ndarray, old: ResidualQuantizer, old_sids: np.ndarray
) -> list[np.ndarray]:
    """Of each level, for each new code the old code whose items it shares most; each old code once."""
    names = []
    for level in range(new.levels):
        shared = np.zeros((new.codes, old.codes))
        np.add.at(shared, (new_sids[:, level], old_sids[:, level]), 1)
        if _same_space(old, new):
            gaps = distances(new.codebooks[level], old.codebooks[level])
            shared = shared - 0.5 * gaps / max(float(gaps.max()), 1e-12)  # below one item: only ever breaks ties
        names.append(linear_sum_assignment(-shared)[1])
    return names


def renamed(
    quantizer: ResidualQuantizer, sids: np.ndarray, names: list[np.ndarray]
) -> tuple[ResidualQuantizer, np.ndarray]:
    """``quantizer`` and its SIDs with code ``c`` of a level called ``names[level][c]``; no distance changes."""
    codebooks, sids = quantizer.codebooks.copy(), sids.copy()
    for level, name in enumerate(names):
        codebooks[level][name] = quantizer.codebooks[level]
        sids[:, level] = name[sids[:, level]]
    return ResidualQuantizer(codebooks, quantizer.slack), sids


def _same_space(old: ResidualQuantizer, new: ResidualQuantizer) -> bool:
    return old.codebooks.shape[2] == new.codebooks.shape[2]


def _jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    middle = (p + q) / 2
    terms = [share * np.log2(np.where(share > 0, share / np.maximum(middle, 1e-300), 1)) for share in (p, q)]
    return float(np.sqrt(max(sum(float(term.sum()) for term in terms) / 2, 0.0)))
