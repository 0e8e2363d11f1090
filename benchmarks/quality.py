"""Recommendation quality on public data, judged against the strongest simple baseline.

``python -m benchmarks.quality --data DIR --model v2 --seeds 3``: leave-one-out on any data set the platform reads (a
time split with ``--since``), histories masked, all items ranked, in the published order and with events of one time
shuffled per user. SASRec with a full softmax is trained beside every seed of the model and compared user by user
(paired bootstrap). Runs are kept in ``--output``; a rerun does what is missing. Left out: popularity-sampled metrics.
"""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.harness import command, finish, hardware, spread, table
from benchmarks.leave_one_out import accuracy, places
from benchmarks.protocol import Split
from benchmarks.quality_models import MODELS, RIVAL, Question
from features.datasets import load
from models.tokenizer.interactions import times
from monitoring.experiment import bootstrap_mean

CUTOFFS = (5, 10, 50)
MEASURES = ("recall@10", "ndcg@10")
ORDERS = ("raw", "shuffled")
COLD, HEAD = 3, 0.1
"""A cold item stands at most so often in what is learned from; the head is the most frequent tenth."""
app = typer.Typer(add_completion=False)
console = Console(stderr=True)


Run = dict[str, Any]


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="A data set the platform reads, such as amazon-beauty")],
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}")] = "v2",
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    since: Annotated[str, typer.Option(help="YYYY-MM-DD: test on interactions from there; else leave-one-out")] = "",
    orders: Annotated[str, typer.Option(help="raw, shuffled or both with a comma")] = "raw,shuffled",
    output: Annotated[Path, typer.Option(help="Where runs are kept")] = Path(".onerec/quality"),
    quick: Annotated[bool, typer.Option(help="One seed, few epochs, published order only")] = False,
) -> None:
    """Prints the table and, as the last line, the JSON."""
    if model not in MODELS:
        raise typer.BadParameter(f"model is {model!r}; there are {', '.join(MODELS)}")
    names = [name for name in orders.split(",") if name]
    if not names or set(names) - set(ORDERS):
        raise typer.BadParameter(f"orders is {orders!r}; expected {' or '.join(ORDERS)} or both with a comma")
    date, dataset = _date(since), load(data)
    timed = bool(times(dataset.exposures).max(initial=0) > 0)
    if not timed:
        names = ["raw"]
        console.print("The data have no times: the order of the file is taken, and ties cannot be shuffled.")
    if quick:
        names, seeds = names[:1], 1
    folder = output / "-".join([data.resolve().name, *(["quick"] if quick else []), *([since] if since else [])])
    runs = []
    for order in names:
        for seed in range(seeds):
            question = Question(dataset=dataset, seed=seed, shuffled=order == "shuffled", since=date, quick=quick)
            runs += [_run(folder, question, kind) for kind in dict.fromkeys((RIVAL, model))]
    finish(_report(runs, model, names) | {"data": data.resolve().name, "quick": quick, "timestamps": timed})


def _date(text: str) -> int | None:
    if not text:
        return None
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError as error:
        raise typer.BadParameter(f"since is {text!r}; expected a date such as 2022-05-01") from error


def _run(folder: Path, question: Question, kind: str) -> Run:
    """Of one model, order and seed, from ``folder`` when it was made of the same recipe before."""
    order = "shuffled" if question.shuffled else "raw"
    path = folder / f"{kind}-{order}-{question.seed}"
    recipe = MODELS[kind].describe(question)
    if (path / "run.json").exists():
        kept: Run = json.loads((path / "run.json").read_text())
        if kept["recipe"] == recipe:
            return kept | {"places": np.load(path / "places.npy"), "kinds": np.load(path / "kinds.npy")}
    console.print(f"{kind}, {order} order, seed {question.seed}")
    path.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    fitted = MODELS[kind].fit(question, path, lambda text: console.print(f"  {text}"))
    seconds = time.perf_counter() - start
    split = question.split
    targets = split.histories.item[split.test]
    ranked = fitted.rank(split.test)
    found = places(ranked, targets)
    kinds = _kinds(split, targets, len(question.items))
    run = {
        "kind": kind,
        "order": order,
        "seed": question.seed,
        "recipe": recipe,
        "seconds": seconds,
        "parameters": fitted.parameters,
        "test": accuracy(ranked, targets, CUTOFFS),
        "validation": accuracy(fitted.rank(split.validation), split.histories.item[split.validation], CUTOFFS),
        "users": len(targets),
        **fitted.notes,
    }
    np.save(path / "places.npy", found)
    np.save(path / "kinds.npy", kinds)
    (path / "run.json").write_text(json.dumps(run, indent=1))
    return run | {"places": found, "kinds": kinds}


def _kinds(split: Split, targets: np.ndarray, items: int) -> np.ndarray:
    """int8 per test: -1 a cold item, 1 one of the head, 0 between."""
    often = split.occurrences(items)
    border = np.quantile(often, 1 - HEAD)
    return np.where(often[targets] <= COLD, -1, np.where(often[targets] >= border, 1, 0)).astype(np.int8)


def _gain(found: np.ndarray, measure: str) -> np.ndarray:
    """Per test, what counts for ``measure`` (recall@k or ndcg@k) at the place found."""
    name, k = measure.split("@")
    inside = found < int(k)
    return inside / np.log2(np.minimum(found, int(k)) + 2) if name == "ndcg" else inside.astype(float)


def _report(runs: Sequence[Run], model: str, orders: Sequence[str]) -> dict[str, Any]:
    mine = [run for run in runs if run["kind"] == model]
    rows = []
    record: dict[str, Any] = {"command": command(), "hardware": hardware(), "model": model}
    for order in orders:
        suffix = "" if order == "raw" else f"_{order}"
        groups = {
            kind: [run for run in runs if run["order"] == order and run["kind"] == kind] for kind in (RIVAL, model)
        }
        for kind, group in groups.items():
            record |= _means(group, "" if kind == model else f"{kind}_", suffix)
            record |= _by_kind(group, kind, suffix)
            seconds = np.mean([run["seconds"] for run in group])
            rows.append((kind, order, *(f"{each['mean']:.4f}" for each in _spreads(group).values()), f"{seconds:.0f}"))
        record |= _gaps(groups[model], groups[RIVAL], suffix)
    table("Quality: all items ranked, histories masked", ("model", "order", *mine[0]["test"], "seconds"), rows)
    gaps = [f"vs_{RIVAL}_{name.replace('@', '')}{'' if o == 'raw' else f'_{o}'}" for o in orders for name in MEASURES]
    return record | {
        "seconds": round(max(run["seconds"] for run in mine), 1),
        "parameters": mine[0]["parameters"],
        "users": mine[0]["users"],
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


def _by_kind(group: Sequence[Run], name: str, suffix: str) -> dict[str, Any]:
    """Recall@10 of cold and head items, and how many tests have such a target."""
    found: dict[str, Any] = {}
    for label, kind in (("cold", -1), ("head", 1)):
        chosen = group[0]["kinds"] == kind
        hits = [float(_gain(run["places"], "recall@10")[chosen].mean()) for run in group] if chosen.any() else [0.0]
        found |= {f"{name}_{label}_recall10{suffix}": round(float(np.mean(hits)), 5)}
        found |= {f"{label}_tests{suffix}": int(chosen.sum())}
    return found


def _gaps(mine: Sequence[Run], rivals: Sequence[Run], suffix: str) -> dict[str, float]:
    """Paired over tests, each test's gain averaged over the seeds first."""
    found: dict[str, float] = {}
    for name in MEASURES:
        gaps = [_gain(a["places"], name) - _gain(b["places"], name) for a, b in zip(mine, rivals, strict=True)]
        interval = bootstrap_mean(np.mean(gaps, 0))
        key = f"vs_{RIVAL}_{name.replace('@', '')}{suffix}"
        found |= {key: interval.mean, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return {name: round(value, 5) for name, value in found.items()}


if __name__ == "__main__":
    app()
