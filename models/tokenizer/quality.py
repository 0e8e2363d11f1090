"""Measures of a SID table (OneRec technical report, arXiv 2506.13695, Table 11, and those every paper leaves out).

Reconstruction error, codebook utilisation and token entropy in nats per level are the paper's; perplexity,
Gini, dead codes, SID uniqueness and the semantic-neighbour hit rate tell whether the table is usable. Always
judge recommendations by item: a collapsed tokenizer makes SID hits cheap. ``codebook_report`` is all of it, as the
JSON that ``models.tokenizer.card`` draws.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from models.tokenizer.interactions import item_rows, positive, times, user_numbers
from models.tokenizer.vocabulary import Catalogue

EXAMPLE_CODES = 12
"""First-level codes that the report shows items of: the fullest, the emptiest and some between."""
EXAMPLE_ITEMS = 8


def codebook_report(
    x: np.ndarray,
    sids: np.ndarray,
    codebooks: np.ndarray,
    *,
    catalogue: Catalogue | None = None,
    pairs: np.ndarray | None = None,
) -> dict[str, Any]:
    """Every measure of SIDs [n, levels] of rows ``x`` [n, dim] under codebooks [levels, codes, dim], ready for JSON.

    ``catalogue`` (its rows are those of ``x``) adds examples to read, ``pairs`` (rows, see ``neighbour_pairs``; best of
    a time after the fit) the neighbour hit rate. Raises ValueError without rows or when shapes do not belong together.
    """
    levels, codes, dim = codebooks.shape
    if not len(x) or x.shape != (len(sids), dim) or sids.shape[1] != levels:
        raise ValueError(
            f"rows {x.shape}, SIDs {sids.shape} and codebooks {codebooks.shape} do not belong together; expected "
            "[n, dim], [n, levels] and [levels, codes, dim] with n >= 1"
        )
    variance = float(((x - x.mean(0)) ** 2).sum(1).mean())
    rest, errors = np.array(x, np.float32), []
    for level in range(levels):
        rest -= codebooks[level][sids[:, level]]
        errors.append(float((rest.astype(np.float64) ** 2).sum(1).mean()))
    _, twin = np.unique(x, axis=0, return_inverse=True)
    shared = np.unique(np.column_stack([twin.reshape(-1), sids]), axis=0)
    report: dict[str, Any] = {
        "items": len(x),
        "levels": levels,
        "codes": codes,
        "duplicate_embeddings": int(len(x) - (twin.max() + 1)),
        "inseparable_items": int(len(x) - len(shared)),
        "mse": errors[-1],
        "mse_share_of_variance": [error / max(variance, 1e-12) for error in errors],
        **code_usage(sids, codes),
    }
    if pairs is not None:
        report["neighbour_hit_rate"] = neighbour_hit_rate(sids, pairs)
    if catalogue is not None:
        report["examples"] = examples(catalogue)
    return report


def examples(catalogue: Catalogue, count: int = EXAMPLE_CODES) -> list[dict[str, Any]]:
    """What some first-level codes hold, from the fullest code to the emptiest used one: titles and commonest tags.

    Items are the most popular of the code; for a person to judge whether a code means something.
    """
    loads = np.bincount(catalogue.sids[:, 0], minlength=catalogue.codes)
    order = np.argsort(-loads, kind="stable")[: int((loads > 0).sum())]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).astype(int))] if len(order) else []
    tags = catalogue.items.column("tags") if catalogue.items is not None else None
    result = []
    for code in chosen:
        rows = np.flatnonzero(catalogue.sids[:, 0] == code)
        rows = rows[np.argsort(-catalogue.popularity[rows], kind="stable")]
        names = [] if tags is None else [tag for each in tags.take(rows).to_pylist() for tag in each or ()]
        result.append(
            {
                "code": int(code),
                "items": len(rows),
                "titles": [catalogue.titles[row] for row in rows[:EXAMPLE_ITEMS]],
                "tags": [[tag, count] for tag, count in Counter(names).most_common(5)],
            }
        )
    return result


def code_usage(sids: np.ndarray, codes: int) -> dict[str, Any]:
    """Per-level utilisation, entropy (nats), perplexity, Gini, dead codes and loads, and how SIDs [n, levels] collide.

    ``items_of_a_sid[i]`` counts the SIDs that name i + 1 items.
    """
    counts = np.stack([np.bincount(column, minlength=codes) for column in sids.T])
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1)
    _, groups = np.unique(sids, axis=0, return_counts=True)
    return {
        "utilisation": ((counts > 0).sum(1) / codes).tolist(),
        "dead_codes": (counts == 0).sum(1).tolist(),
        "entropy_nats": entropy.tolist(),
        "entropy_max_nats": float(np.log(codes)),
        "perplexity": np.exp(entropy).tolist(),
        "gini": [_gini(row) for row in counts],
        "largest_cluster": counts.max(1).tolist(),
        "loads": np.sort(counts, axis=1)[:, ::-1].tolist(),
        "unique_sid_share": float((groups == 1).sum() / len(sids)),
        "distinct_sids": len(groups),
        "largest_collision": int(groups.max()),
        "items_of_a_sid": np.bincount(groups)[1:].tolist(),
    }


def neighbour_hit_rate(sids: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
    """Share of item pairs [m, 2] (rows) whose SIDs agree in the first 1, 2, ... codes, and the same by chance.

    Chance pairs the same left and right items independently (different ones, as in the pairs), so popular codes
    get no credit.
    """
    if not len(pairs):
        return {}
    twice = _meeting(pairs[:, 0], pairs[:, 1])
    rates: dict[str, float] = {"pairs": float(len(pairs))}
    for length in range(1, sids.shape[1]):
        _, prefix = np.unique(sids[:, :length], axis=0, return_inverse=True)
        left, right = prefix[pairs[:, 0]], prefix[pairs[:, 1]]
        rates[f"prefix{length}"] = float((left == right).mean())
        rates[f"prefix{length}_chance"] = (_meeting(left, right) - twice) / (1 - twice)
    return rates


def neighbour_pairs(exposures: pa.Table, item_ids: Sequence[str]) -> np.ndarray:
    """Rows int64 [m, 2] of different items that a user engaged with one after the other (positives only)."""
    kept = positive(exposures)
    rows = item_rows(exposures, item_ids)[kept]
    users = user_numbers(exposures)[kept]
    order = np.lexsort((times(exposures)[kept], users))
    users, rows = users[order], rows[order]
    pairs = np.stack([rows[:-1], rows[1:]], axis=1)
    return pairs[(users[:-1] == users[1:]) & (pairs >= 0).all(1) & (pairs[:, 0] != pairs[:, 1])]


def _meeting(left: np.ndarray, right: np.ndarray) -> float:
    """Chance that a random one of ``left`` equals a random one of ``right``."""
    size = int(max(left.max(), right.max())) + 1
    return float((np.bincount(left, minlength=size) / len(left)) @ (np.bincount(right, minlength=size) / len(right)))


def _gini(counts: np.ndarray) -> float:
    """0 when all codes are used alike, towards 1 when one code has everything."""
    ordered = np.sort(counts.astype(np.float64))
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))
