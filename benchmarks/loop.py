"""The closed loop as a benchmark: does nightly retraining beat a frozen model after the world has drifted?

``python -m benchmarks.loop [--quick] [--data DIR] [--seeds N]`` starts the platform in a folder of its own, plays
simulated days on real servers and prints minutes watched per user and day by arm, then one JSON object. The interval
is a paired bootstrap over matched users (``monitoring.experiment``).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from models.serving.selection import check_select
from pipelines import stack
from pipelines.loop import LoopConfig, run_loop
from pipelines.result import stay_of


def main(
    quick: Annotated[bool, typer.Option(help="four days, one seed")] = False,
    days: Annotated[int, typer.Option(help="simulated days")] = 7,
    users: Annotated[int, typer.Option(help="users in the world")] = 900,
    seeds: Annotated[int, typer.Option(help="how many worlds to play")] = 3,
    select: Annotated[str, typer.Option(help="what OneRec shows of its beam: model, reward or stay")] = "stay",
    data: Annotated[Path | None, typer.Option(help="a folder of real logs instead of the simulator")] = None,
    output: Annotated[Path | None, typer.Option(help="where reports go; default: a temporary folder")] = None,
) -> None:
    """Plays the loop and prints what each arm achieved."""
    try:
        check_select(select, "beam")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--select") from error
    if quick:
        days, users, seeds = 4, 900, 1
    folder = output or Path(tempfile.mkdtemp(prefix="onerec-bench-"))
    results = []
    for seed in range(seeds):
        command = f"python -m benchmarks.loop {' '.join(sys.argv[1:])}"
        config = LoopConfig(
            days=days, users=users, seed=seed, data=data, drift_day=1 if quick else 2, select=select, command=command
        )
        with stack.running(folder / f"home{seed}"):
            results.append(run_loop(config, folder / f"seed{seed}"))
    for result in results:
        _table(result)
    rows = [record(result) for result in results]
    print(json.dumps(rows[0] if len(rows) == 1 else {"seeds": rows}))


def record(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of one played loop, stay times in minutes a user a day after the drift."""
    totals, over_frozen = result["totals"], result["comparisons"]["onerec_over_frozen"]
    over_cascade = result["comparisons"]["onerec_over_cascade"]
    return {
        "stay_onerec": stay_of(result, "onerec"),
        "stay_frozen": stay_of(result, "frozen"),
        "stay_cascade": stay_of(result, "cascade"),
        "onerec_over_frozen": over_frozen["mean"],
        "onerec_over_frozen_low": over_frozen["low"],
        "onerec_over_frozen_high": over_frozen["high"],
        "onerec_over_frozen_adjusted": result["comparisons"]["onerec_over_frozen_adjusted"]["mean"],
        "onerec_over_frozen_adjusted_low": result["comparisons"]["onerec_over_frozen_adjusted"]["low"],
        "onerec_over_cascade": over_cascade["mean"],
        "onerec_over_cascade_low": over_cascade["low"],
        "days": result["days"],
        "seed": result["seed"],
        "select": result["select"],
        "drift_detected": totals["drift_detected"],
        "drift_verdicts": totals["drift_verdicts"],
        "retrained": totals["retrained"],
        "served_versions": totals["served_versions"],
        "impressions_acked": totals["impressions_acked"],
        "exposures_stored": totals["exposures_stored"],
        "illegal_items_served": totals["illegal_items_served"],
    }


def _table(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['world']}, seed {result['seed']}; {result['hardware']}; {result['command']}")
    table.add_column("arm")
    for day in result["daily"]:
        table.add_column(f"day {day['day']}", justify="right")
    for arm in result["arms"]:
        stays = [day["arms"][arm]["stay"] for day in result["daily"]]
        table.add_row(arm, *(f"{s['mean']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in stays))
    Console(stderr=True, width=max(100, 20 + 22 * len(result["daily"]))).print(table)


if __name__ == "__main__":
    typer.run(main)
