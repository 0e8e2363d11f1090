"""Recommendation quality on public data, judged against the strongest simple baseline.

``python -m benchmarks.quality --data DIR --model v2 --seeds 3``: leave-one-out on any data set the platform reads (a
time split with ``--since``), histories masked, all items ranked, in the published order and with events of one time
shuffled per user. SASRec with a full softmax is trained beside every seed of the model and compared user by user
(paired bootstrap). Runs are kept in ``--output``; a rerun does what is missing. What the data lack is said and counted;
data that cannot be tested on are refused with the reason. Left out: popularity-sampled metrics.
"""

import json
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.harness import command, finish, hardware
from benchmarks.leave_one_out import accuracy, places
from benchmarks.quality_data import describe, kinds, sentences, targets, timed
from benchmarks.quality_models import MODELS, RIVAL, Question
from benchmarks.quality_report import CUTOFFS, ORDERS, Run, report
from features.datasets import Dataset, load, read_map

app = typer.Typer(add_completion=False)
console = Console(stderr=True)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="A data set the platform reads, such as amazon-beauty")],
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}")] = "v2",
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    since: Annotated[str, typer.Option(help="YYYY-MM-DD: test on interactions from there; else leave-one-out")] = "",
    orders: Annotated[str, typer.Option(help="raw, shuffled or both with a comma")] = "raw,shuffled",
    output: Annotated[Path, typer.Option(file_okay=False, help="Where runs are kept")] = Path(".onerec/quality"),
    quick: Annotated[bool, typer.Option(help="One seed, few epochs, one order, a sample of the users")] = False,
    map_: Annotated[str, typer.Option("--map", help="Columns of another layout, as onerec ingest --map takes")] = "",
) -> None:
    """Prints the table and, as the last line, the JSON."""
    if model not in MODELS:
        raise typer.BadParameter(f"model is {model!r}; there are {', '.join(MODELS)}")
    names = list(dict.fromkeys(name for name in orders.split(",") if name))
    if not names or set(names) - set(ORDERS):
        raise typer.BadParameter(f"orders is {orders!r}; expected {' or '.join(ORDERS)} or both with a comma")
    dataset = _load(data, map_)
    question = Question(dataset=dataset, seed=0, shuffled=False, since=date_of(since), quick=quick)
    facts = _facts(question)
    if not facts["timestamps"]:
        names = ["raw"]
    if quick:
        names, seeds = names[:1], 1
        console.print(
            "Quick: one seed, few epochs, a sample of the users to learn from and to test on; says that it runs, not "
            "how good it is."
        )
    facts |= {"data": data.resolve().name, "since": since, "quick": quick, "hardware": hardware(), "seeds": seeds}
    folder = _folder(output, facts)
    runs = []
    for order in names:
        for seed in range(seeds):
            asked = replace(question, seed=seed, shuffled=order == "shuffled")
            runs += [run(folder, asked, kind) for kind in dict.fromkeys((RIVAL, model))]
        np.save(folder / f"kinds-{order}.npy", kinds(asked))
    record = report(runs, {order: np.load(folder / f"kinds-{order}.npy") for order in names}, model)
    finish({"command": command()} | record | facts)


def date_of(text: str) -> int | None:
    """UTC ms of a day given as YYYY-MM-DD, None for an empty text; raises BadParameter."""
    if not text:
        return None
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError as error:
        raise typer.BadParameter(f"since is {text!r}; expected a date such as 2022-05-01") from error


def _load(data: Path, columns: str) -> Dataset:
    try:
        return load(data, read_map(columns) if columns else None)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _facts(question: Question) -> dict[str, Any]:
    """What the data lack, said at once; raises BadParameter where nothing can be tested."""
    if question.since is not None and not timed(question.dataset):
        raise typer.BadParameter("the data have no times, so there is nothing since a date; leave --since out")
    try:
        facts = describe(question)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for sentence in sentences(facts):
        console.print(sentence)
    return facts


def _folder(output: Path, facts: dict[str, Any]) -> Path:
    """Where runs on these data are kept, begun with ``facts``; beside those on other data that were called the same."""
    name = "-".join(
        [facts["data"], *(["quick"] if facts["quick"] else []), *([facts["since"]] if facts["since"] else [])]
    )
    folder, same = output / name, set(facts) - {"hardware", "seeds"}
    if (folder / "data.json").exists():
        known = json.loads((folder / "data.json").read_text())
        if any(known.get(fact, facts[fact]) != facts[fact] for fact in same):
            folder = output / f"{name}-{facts['digest']}"
            console.print(f"{output / name} holds runs on other data; these are kept in {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(facts, indent=1))
    return folder


def run(folder: Path, question: Question, kind: str) -> Run:
    """Of one model, order and seed, from ``folder`` when it was made of the same recipe before."""
    order = "shuffled" if question.shuffled else "raw"
    path = folder / f"{kind}-{order}-{question.seed}"
    recipe = MODELS[kind].describe(question)
    if (path / "run.json").exists():
        kept: Run = json.loads((path / "run.json").read_text())
        if kept["recipe"] == recipe:
            return kept | {"places": np.load(path / "places.npy")}
    console.print(f"{kind}, {order} order, seed {question.seed}")
    _begin(path, recipe)
    start = time.perf_counter()
    fitted = MODELS[kind].fit(question, path, lambda text: console.print(f"  {text}"))
    seconds = time.perf_counter() - start
    split = question.split
    wanted, ranked = targets(split), fitted.rank(split.test)
    found = places(ranked, wanted)
    record = {
        "kind": kind,
        "order": order,
        "seed": question.seed,
        "recipe": recipe,
        "seconds": seconds,
        "parameters": fitted.parameters,
        "test": accuracy(ranked, wanted, CUTOFFS),
        "validation": accuracy(fitted.rank(split.validation), split.histories.item[split.validation], CUTOFFS),
        "users": len(wanted),
        "hardware": hardware(),
        **fitted.notes,
    }
    np.save(path / "places.npy", found)
    (path / "run.json").write_text(json.dumps(record, indent=1))
    return record | {"places": found}


def _begin(path: Path, recipe: dict[str, Any]) -> None:
    """An empty folder, or what an interrupted run of the same recipe left in it."""
    known = path / "recipe.json"
    if path.exists() and not (known.exists() and json.loads(known.read_text()) == recipe):
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(recipe))


if __name__ == "__main__":
    app()
