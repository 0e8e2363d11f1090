"""`onerec loop`: the whole loop on this machine."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipelines.cli import (
    HOME,
    Home,
    Json,
    Select,
    app,
    check_canary,
    check_folder,
    check_log,
    check_policy,
    check_recipe,
    check_select,
    emit,
    fail,
    out,
)

if TYPE_CHECKING:
    from pipelines.result import LoopConfig


@app.command()
def loop(
    days: Annotated[int, typer.Option(help="Simulated days.", min=1)] = 4,
    data: Annotated[Path | None, typer.Option(help="Folder of real logs; default: the simulator.")] = None,
    users: Annotated[int, typer.Option(help="People who use the app.", min=6)] = 900,
    drift_day: Annotated[int, typer.Option(help="Day on which tastes change.", min=0)] = 1,
    scenario: Annotated[str, typer.Option(help="What happens in the simulator: bots, outage, new-items, ...")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the world and of all training.", min=0)] = 0,
    policy: Annotated[str, typer.Option(help="When to retrain: nightly, on_drift or JSON.")] = "nightly",
    canary: Annotated[
        str, typer.Option(help="Try each new model on a share of the users first: 0.5, or a JSON object.")
    ] = "",
    select: Select = "stay",
    overrides: Annotated[str, typer.Option(help='Recipe fields as JSON, such as {"pretrain.epochs": 2}.')] = "{}",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the services running at the end.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier loop left in HOME first.")] = False,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Plays days of users on real servers: serve, watch, collect, detect drift, retrain, gate, swap, compare.

    Ends with a summary and a self-contained HTML report in HOME/loop/.
    """
    check_policy(policy)
    check_canary(canary)
    if data is not None:
        check_log(data, played=True)
    check_recipe("tiny", overrides)
    check_select(select)
    if scenario:
        drift_day = _check_scenario(scenario, data, drift_day)
    check_folder(home, "--home")

    from pipelines.result import LoopConfig

    config = LoopConfig(
        days=days,
        data=data,
        users=users,
        drift_day=drift_day,
        scenario=scenario,
        seed=seed,
        policy=policy,
        canary=canary,
        select=select,
        overrides=overrides,
        command=" ".join(["onerec", *sys.argv[1:]]),
    )
    output = home / "loop"
    result = _play(config, home, output, fresh=fresh, keep=keep)
    if json_:
        emit({"report": output / "report.html", **{k: result[k] for k in ("totals", "comparisons")}})
        return
    _summary(result)
    out.print(f"\nreport: [bold]{(output / 'report.html').resolve()}[/] (opens without a network)", soft_wrap=True)


def _play(config: "LoopConfig", home: Path, output: Path, *, fresh: bool, keep: bool) -> dict[str, Any]:
    """The loop's result, on the local services, which end with it unless they are to be kept."""
    from pipelines import stack
    from pipelines.loop import run_loop

    if fresh:
        stack.wipe(home)
    if keep:
        stack.up(home)
        stack.activate(home)
        return run_loop(config, output)
    with stack.running(home):
        return run_loop(config, output)


def _check_scenario(name: str, data: Path | None, drift_day: int) -> int:
    """The day on which the scenario changes its people, else ``drift_day``; ends the command, code 2, without one."""
    from features.world import scenarios
    from features.world.simulator import SimulatorConfig

    if data is not None:
        fail("a scenario is for the simulator, not for the users of --data", "give one of the two", code=2)
    try:
        config = SimulatorConfig.scenario(name)
    except ValueError as error:
        fail(str(error), f"such as --scenario {scenarios.names()[0]}", code=2)
    days = [day for day in (config.drift_day, config.duration_drift_day) if day is not None]
    return days[0] if days else drift_day


def _summary(result: dict[str, Any]) -> None:
    from monitoring.report import LABELS

    table = Table(title=f"minutes watched a user a day ({result['world']}, drift on day {result['drift_day']})")
    table.add_column("arm")
    for day in result["daily"]:
        table.add_column(f"day {day['day']}", justify="right")
    table.add_column("likes / 1000", justify="right")
    table.add_column("cold share", justify="right")
    table.add_column("LT7", justify="right")
    for arm in result["arms"]:
        daily = [day["arms"][arm] for day in result["daily"]]
        views = max(sum(day["views"] for day in daily), 1)
        table.add_row(
            LABELS[arm],
            *(f"{day['stay']['mean']:.2f}" for day in daily),
            f"{1000 * sum(day['like'] for day in daily) / views:.1f}",
            f"{daily[-1]['cold_start_share']:.3f}",
            f"{daily[-1]['lt7']:.2f}",
        )
    out.print(table)
    rivals = (
        ("onerec_over_frozen", "frozen"),
        ("onerec_over_frozen_adjusted", "frozen, adjusted for day 0"),
        ("onerec_over_cascade", "cascade"),
    )
    for name, label in rivals:
        c = result["comparisons"][name]
        out.print(
            f"retrained OneRec over {label}, days {result['compared_days']}: {c['mean']:+.3f} minutes, "
            f"95 % [{c['low']:+.3f}, {c['high']:+.3f}], {c['pairs']} matched pairs"
        )
    for each in result["canaries"]:
        out.print(f"canary {each['version']} against {each['stable']}: {each['status']}; {each['reason']}")
    totals = result["totals"]
    out.print(f"drift verdicts: {json.dumps(totals['drift_verdicts'])}")
    out.print(
        f"{totals['impressions_acked']:,} impressions acknowledged, {totals['exposures_stored']:,} exposures stored, "
        f"{totals['illegal_items_served']} illegal items, {totals['served_versions']} versions served"
    )
