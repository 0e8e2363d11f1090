"""What runs of ``benchmarks.quality`` say: means over seeds, by kind of item, and against the rival user by user.

Left out: tests of significance other than the paired bootstrap.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import spread, table
from benchmarks.quality_models import RIVAL
from monitoring.experiment import Interval, bootstrap_mean

CUTOFFS = (5, 10, 50)
MEASURES = ("recall@10", "ndcg@10")
ORDERS = ("raw", "shuffled")

Run = dict[str, Any]
"""What was kept of a model, order and seed, and ``places``: int [tests], where the item asked for was ranked."""


def gain(found: np.ndarray, measure: str) -> np.ndarray:
    """Per test, what counts for ``measure`` (recall@k or ndcg@k) at the place found."""
    name, k = measure.split("@")
    inside = found < int(k)
    return inside / np.log2(np.minimum(found, int(k)) + 2) if name == "ndcg" else inside.astype(float)


def report(runs: Sequence[Run], kinds: Mapping[str, np.ndarray], model: str) -> dict[str, Any]:
    """The record of ``model`` beside the rival, and the table; ``kinds`` by order (``quality_data.kinds``)."""
    mine = [run for run in runs if run["kind"] == model]
    rows = []
    record: dict[str, Any] = {"model": model}
    for order, own in kinds.items():
        suffix = "" if order == "raw" else f"_{order}"
        groups = {
            kind: [run for run in runs if run["order"] == order and run["kind"] == kind] for kind in (RIVAL, model)
        }
        for kind, group in groups.items():
            record |= _means(group, "" if kind == model else f"{kind}_", suffix)
            record |= _by_kind(group, own, kind, suffix)
            seconds = np.mean([run["seconds"] for run in group])
            rows.append((kind, order, *(f"{each['mean']:.4f}" for each in _spreads(group).values()), f"{seconds:.0f}"))
        record |= _gaps(groups[model], groups[RIVAL], suffix)
    table("Quality: all items ranked, histories masked", ("model", "order", *mine[0]["test"], "seconds"), rows)
    gaps = [f"vs_{RIVAL}_{name.replace('@', '')}{'' if o == 'raw' else f'_{o}'}" for o in kinds for name in MEASURES]
    return record | {
        "seconds": round(max(run["seconds"] for run in mine), 1),
        "parameters": mine[0]["parameters"],
        "seeds": len({run["seed"] for run in runs}),
        f"vs_{RIVAL}_low": min(record[f"{name}_low"] for name in gaps),
        f"vs_{RIVAL}_high": max(record[f"{name}_high"] for name in gaps),
    }


def _spreads(group: Sequence[Run]) -> dict[str, dict[str, float]]:
    return {name: spread(run["test"][name] for run in group) for name in group[0]["test"]}


def _means(group: Sequence[Run], prefix: str, suffix: str) -> dict[str, Any]:
    """Each measure's mean over seeds, and the seeds' own for the main ones."""
    means = {f"{prefix}{k.replace('@', '')}{suffix}": round(v["mean"], 5) for k, v in _spreads(group).items()}
    own = {f"{prefix}{k.replace('@', '')}{suffix}_seeds": [round(run["test"][k], 5) for run in group] for k in MEASURES}
    return means | own


def _by_kind(group: Sequence[Run], of: np.ndarray, name: str, suffix: str) -> dict[str, Any]:
    """Recall@10 of cold items, those never learned from among them, and head items; how many tests ask for one."""
    found: dict[str, Any] = {}
    for label, chosen in (("unseen", of == -2), ("cold", of < 0), ("head", of == 1)):
        hits = [float(gain(run["places"], "recall@10")[chosen].mean()) for run in group] if chosen.any() else [0.0]
        found |= {f"{name}_{label}_recall10{suffix}": round(float(np.mean(hits)), 5)}
        found |= {f"{label}_tests{suffix}": int(chosen.sum())}
    return found


def gaps(mine: Sequence[Run], rivals: Sequence[Run], measure: str) -> Interval:
    """Of ``mine`` over ``rivals`` of the same seeds: paired over tests, each test averaged over the seeds first."""
    each = [gain(a["places"], measure) - gain(b["places"], measure) for a, b in zip(mine, rivals, strict=True)]
    return bootstrap_mean(np.mean(each, 0))


def _gaps(mine: Sequence[Run], rivals: Sequence[Run], suffix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in MEASURES:
        interval, key = gaps(mine, rivals, name), f"vs_{RIVAL}_{name.replace('@', '')}{suffix}"
        found |= {key: interval.mean, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return {name: round(value, 5) for name, value in found.items()}
