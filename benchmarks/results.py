"""Writes docs/results.md and its pictures from what the quality benchmarks kept; nothing is measured here.

``python -m benchmarks.results --runs .onerec/quality --rl quality_rl.json --output docs``. Reads the runs of
``benchmarks.quality`` (every folder below ``--runs``) and the last line of ``benchmarks.quality_rl``; intervals are
computed anew from the places that the runs kept. Left out: every other benchmark, whose results stand in
benchmarks/README.md.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.harness import hardware, spread
from benchmarks.quality_models import RIVAL
from benchmarks.quality_report import MEASURES, ORDERS, gain, gaps
from benchmarks.svg import Bar, bars
from monitoring.experiment import bootstrap_mean

PAGE = "results.md"
RECIPE = "v2"
SEEDLESS = ("popularity", "itemknn")
"""Nothing in them is random."""
MEANING = {
    "popularity": "the commonest items",
    "itemknn": "items taken by the same users",
    RIVAL: "SASRec, full softmax, dropout chosen by validation",
    "sasrec-dates": "the same with the time to the request",
    "tiger": "residual K-means codes of content, encoder-decoder",
    "v2": "the recipe",
    "v1": "the recipe with V1's encoder-decoder",
    "session": "a list of the next five, encoder-decoder",
    "v2-no-dates": "the recipe without times",
    "v2-no-memory": "without the memory of prefixes and the item head",
    "v2-no-item-head": "without the item head",
    "v2-no-context-layer": "without the layer over the context",
    "v2-no-newest": "BOS does not start from the newest behaviour",
    "v2-lazy": "only what V2 has, with the memory",
    "v2-published": "V2 as published",
}
SHOWN = ("recall@5", "recall@10", "ndcg@10", "recall@50")
PUBLISHED: dict[str, list[tuple[str, float, float]]] = {
    "amazon-beauty": [
        ("SASRec, one negative (as in TIGER's paper)", 0.0605, 0.0318),
        ("TIGER", 0.0648, 0.0384),
        ("LETTER", 0.0672, 0.0364),
        ("HSTU", 0.0708, 0.0412),
        ("ActionPiece", 0.0775, 0.0424),
        ("OneRec-Think, 1.7B", 0.0791, 0.0471),
        ("OneRec-Foundation, 8B", 0.0924, 0.0545),
    ]
}
"""Recall@10 and NDCG@10 that papers report in the published order: other code, other tuning, no intervals."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The runs of one model in one order, by seed."""

    kind: str
    order: str
    runs: list[dict[str, Any]]

    @property
    def gains(self) -> dict[str, np.ndarray]:
        """Per measure float64 [tests], each test's gain averaged over the seeds."""
        return {name: np.mean([gain(run["places"], name) for run in self.runs], 0) for name in MEASURES}


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """A data set's folder of kept runs."""

    name: str
    facts: dict[str, Any]
    """What ``benchmarks.quality`` said of the data; empty when it has not reported yet."""
    groups: list[Group]
    kinds: dict[str, np.ndarray]
    """By order int8 [tests]; see ``quality_data.kinds``."""

    def of(self, kind: str, order: str) -> Group | None:
        """The runs of a model, None when there are none."""
        return next((g for g in self.groups if (g.kind, g.order) == (kind, order)), None)


def read(folder: Path) -> Study:
    """A folder of ``benchmarks.quality``'s runs; raises ValueError when it has none."""
    runs = [
        json.loads(path.read_text()) | {"places": np.load(path.with_name("places.npy"))}
        for path in sorted(folder.glob("*/run.json"))
    ]
    if not runs:
        raise ValueError(
            f"{folder} holds no kept runs (*/run.json); run benchmarks.quality with --output {folder.parent}"
        )
    rank = {kind: place for place, kind in enumerate(MEANING)}
    pairs = sorted(
        {(run["kind"], run["order"]) for run in runs}, key=lambda pair: (ORDERS.index(pair[1]), rank[pair[0]])
    )
    groups = [
        Group(kind=kind, order=order, runs=sorted(_where(runs, kind, order), key=lambda run: int(run["seed"])))
        for kind, order in pairs
    ]
    facts = folder / "data.json"
    return Study(
        name=folder.name,
        facts=json.loads(facts.read_text()) if facts.exists() else {},
        groups=groups,
        kinds={path.stem.removeprefix("kinds-"): np.load(path) for path in folder.glob("kinds-*.npy")},
    )


def _where(runs: Sequence[dict[str, Any]], kind: str, order: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["kind"] == kind and run["order"] == order]


def section(study: Study, output: Path) -> list[str]:
    """Markdown of a data set; its pictures go below ``output``."""
    lines = [f"## {study.name}", *_about(study)]
    for order in ORDERS:
        groups = [group for group in study.groups if group.order == order]
        if not groups:
            continue
        lines += [f"### {'Published order' if order == 'raw' else 'Events of one time shuffled per user'}", ""]
        lines += _accuracy(groups) + _differences(groups) + _kinds(groups, study.kinds.get(order))
        lines += _pictures(study.name, order, groups, output)
    if study.name in PUBLISHED:
        lines += ["What papers report in the published order (other code and tuning, no intervals):", ""]
        lines += _table(("", "R@10", "N@10"), [(name, _n(r), _n(n)) for name, r, n in PUBLISHED[study.name]])
    return lines


def _about(study: Study) -> list[str]:
    f = study.facts
    if not f:
        return [""]
    seeds = max(len(group.runs) for group in study.groups)
    date = f" from {f['since']}" if f["since"] else ""
    facts = (
        f"{f['protocol']}{date}: {f['users']:,} tests",
        f"{f['items']:,} items, {f['items_without_title']:,} of them without a title",
        f"{f['interactions']:,} positive interactions",
        f"{f['users_too_short']:,} users with fewer than 3 left out",
        f"{f['unseen_tests']:,} tests ask for an item never learned from",
        f"times: {'yes' if f['timestamps'] else 'none'}",
    )
    line = f"python -m benchmarks.quality --data path/to/{f['data']} --model {RECIPE} --seeds {seeds}"
    return ["", "; ".join(facts) + ".", "", *_code(line + (f" --since {f['since']}" if f["since"] else ""))]


def _accuracy(groups: Sequence[Group]) -> list[str]:
    best = {name: max(_mean(group, "test", name) for group in groups) for name in SHOWN}
    rows = []
    for group in groups:
        own = [_mean(group, "test", name) for name in SHOWN]
        cells = [f"**{_n(v)}**" if v == best[name] else _n(v) for name, v in zip(SHOWN, own, strict=True)]
        validation = "{} / {}".format(*(_n(_mean(group, "validation", name)) for name in MEASURES))
        first = group.runs[0]
        sizes = f"{first['parameters'] / 1e6:.2f} M" if group.kind not in SEEDLESS else ""
        seconds = max(float(run["seconds"]) for run in group.runs)
        rows.append(
            (
                f"{group.kind}: {MEANING[group.kind]}",
                len(group.runs),
                *cells,
                _sd(group),
                validation,
                sizes,
                f"{seconds:,.0f}",
            )
        )
    head = (
        "model",
        "seeds",
        *(name.replace("recall", "R").replace("ndcg", "N") for name in SHOWN),
        "sd R@10 / N@10",
        "validation R@10 / N@10",
        "parameters",
        "seconds",
    )
    return _table(head, rows)


def _sd(group: Group) -> str:
    if len(group.runs) < 2:
        return ""
    return " / ".join(_n(spread(run["test"][name] for run in group.runs)["std"]) for name in MEASURES)


def _mean(group: Group, where: str, name: str) -> float:
    return float(np.mean([run[where][name] for run in group.runs]))


def _differences(groups: Sequence[Group]) -> list[str]:
    """Every model over the rival, and the recipe over every model."""
    by_kind = {group.kind: group for group in groups}
    rows = []
    for kind in by_kind:
        pairs = [(kind, RIVAL)] if kind in (RECIPE, RIVAL) else [(kind, RIVAL), (RECIPE, kind)]
        rows += [_difference(by_kind[a], by_kind[b]) for a, b in pairs if a != b and {a, b} <= set(by_kind)]
    if not rows:
        return []
    head = ("", "seeds", "R@10", "N@10")
    return ["Paired by user, 95 % bootstrap intervals, on the seeds that both have:", "", *_table(head, rows)]


def _difference(mine: Group, theirs: Group) -> tuple[Any, ...]:
    """A row of the table; one run of a model that has no seeds stands against every seed of the other."""
    if mine.kind in SEEDLESS or theirs.kind in SEEDLESS:
        count = max(len(mine.runs), len(theirs.runs))
        ours, others = (each.runs * (count if len(each.runs) == 1 else 1) for each in (mine, theirs))
    else:
        shared = {run["seed"] for run in mine.runs} & {run["seed"] for run in theirs.runs}
        ours, others = ([run for run in each.runs if run["seed"] in shared] for each in (mine, theirs))
    found = [gaps(ours, others, name) for name in MEASURES]
    cells = (f"{each.mean:+.4f} [{each.low:+.4f}, {each.high:+.4f}]" for each in found)
    return (f"{mine.kind} - {theirs.kind}", len(ours), *cells)


def _kinds(groups: Sequence[Group], kinds: np.ndarray | None) -> list[str]:
    if kinds is None:
        return []
    labels = {
        "never learned from": kinds == -2,
        "cold (at most 3 times)": kinds < 0,
        "between": kinds == 0,
        "head (the most frequent tenth)": kinds == 1,
    }
    rows = [
        (
            label,
            int(chosen.sum()),
            *(_n(float(group.gains["recall@10"][chosen].mean())) if chosen.any() else "" for group in groups),
        )
        for label, chosen in labels.items()
    ]
    return [
        "Recall@10 by how often the item was learned from:",
        "",
        *_table(("item", "tests", *(group.kind for group in groups)), rows),
    ]


def _pictures(name: str, order: str, groups: Sequence[Group], output: Path) -> list[str]:
    lines = []
    for measure in MEASURES:
        rows = []
        for group in groups:
            found = bootstrap_mean(group.gains[measure], samples=1000)
            rows.append(
                Bar(label=group.kind, value=found.mean, low=found.low, high=found.high, strong=group.kind == RECIPE)
            )
        title = f"{name}, {order}: {measure} with 95 % intervals over users"
        lines.append(_picture(output, f"{name}-{order}-{measure.replace('@', '')}", title, rows))
    return [*lines, ""]


def _picture(output: Path, name: str, title: str, rows: Sequence[Bar]) -> str:
    path = Path("results") / f"{name.lower()}.svg"
    (output / path).parent.mkdir(parents=True, exist_ok=True)
    (output / path).write_text(bars(title, rows))
    return f"![{title}]({path})"


def learning(record: dict[str, Any], output: Path) -> list[str]:
    """Markdown of ``benchmarks.quality_rl``'s record."""
    names = list(next(iter(record["arms"].values())))
    arms = [(arm, *(f"{means[name]['mean']:.4f}" for name in names)) for arm, means in record["arms"].items()]
    rows = [
        (pair, *(f"{gap[name]['mean']:+.4f} [{gap[name]['low']:+.4f}, {gap[name]['high']:+.4f}]" for name in names))
        for pair, gap in record["differences"].items()
    ]
    pictures = []
    for name in ("recall@10", "stay_s"):
        drawn = [
            Bar(
                label=pair,
                value=gap[name]["mean"],
                low=gap[name]["low"],
                high=gap[name]["high"],
                strong=gap[name]["low"] > 0,
            )
            for pair, gap in record["differences"].items()
        ]
        title = f"{record['data']}: {name}, differences with 95 % intervals over people"
        pictures.append(_picture(output, f"rl-{name.replace('@', '')}", title, drawn))
    return [
        "## Reinforcement learning on real feedback",
        "",
        f"{record['data']}: learned from before {record['since']}, judged by {record['people']:,} people since then; "
        f"{record['seeds']} seed(s). `recall@10` and `ndcg@10` count the videos they went on to watch long, `stay_s` "
        "and `expected_stay_s` are seconds with the ten by the user model fitted on the whole log.",
        "",
        *_code(
            f"python -m benchmarks.quality_rl --data path/to/{record['data']} --since {record['since']} "
            f"--seeds {record['seeds']}"
        ),
        *_table(("arm", *names), arms),
        *_table(("difference", *names), rows),
        *pictures,
        "",
        "Verdict, where an interval leaves 0 out:",
        "",
        *(f"* {pair}: {text}" for pair, text in record["verdict"].items()),
        "",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines), ""]


def _code(line: str) -> list[str]:
    return ["```", line, "```", ""]


def _n(value: float) -> str:
    return f"{value:.4f}"


def main(
    runs: Annotated[Path, typer.Option(help="--output of benchmarks.quality")],
    rl: Annotated[Path | None, typer.Option(help="A file whose last line is benchmarks.quality_rl's JSON")] = None,
    output: Annotated[Path, typer.Option(help="The folder of the page")] = Path("docs"),
) -> None:
    """Writes the page and prints its path."""
    folders = sorted({path.parent.parent for path in runs.glob("*/*/run.json")})
    if not folders:
        raise typer.BadParameter(f"{runs} holds no kept runs (*/*/run.json); give benchmarks.quality's --output")
    output.mkdir(parents=True, exist_ok=True)
    studies = [read(folder) for folder in folders if "-quick" not in folder.name]
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.results` from kept runs; do not edit. All items are ranked, histories are "
        "masked, a hit is the very item. Validation chose everything; where a test was looked at more than once, "
        "[the log](log.md) says so. Seconds are those of the slowest seed on a shared machine, tokenizer, training and "
        "ranking included.",
        "",
        f"Machine: {hardware()}.",
        "",
    ]
    for study in studies:
        lines += section(study, output)
    if rl is not None:
        lines += learning(json.loads(rl.read_text().strip().splitlines()[-1]), output)
    (output / PAGE).write_text("\n".join(lines).rstrip() + "\n")
    print(output / PAGE)


if __name__ == "__main__":
    typer.run(main)
