"""`onerec train`, `retrain`, `runs`: pipelines run on this machine, and what became of every run."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.cli import (
    HOME,
    Home,
    Json,
    app,
    check_canary,
    check_folder,
    check_order,
    check_policy,
    check_recipe,
    check_run_id,
    checked_time,
    emit,
    fail,
    out,
)

if TYPE_CHECKING:
    from features.runs import Run


@app.command()
def train(
    start: Annotated[str | None, typer.Option(help="Begin of the window, ISO 8601; default: all there is.")] = None,
    end: Annotated[str | None, typer.Option(help="End of the window; default: all there is.")] = None,
    preset: Annotated[str, typer.Option(help="Size of the model: tiny or small.")] = "tiny",
    overrides: Annotated[str, typer.Option(help="Recipe fields as JSON.")] = "{}",
    run_id: Annotated[str | None, typer.Option(help="Give the id of a failed run to resume it.")] = None,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Runs the training pipeline on this machine: logs to a published model, from scratch."""
    chosen = _id(run_id, "train")
    since, until = checked_time(start, "--start"), checked_time(end, "--end")
    check_order({"--start": since, "--end": until})
    check_recipe(preset, overrides)
    check_folder(home, "--home")
    _activated(home)
    first, last = _window()
    arguments = {"start": since or first, "end": until or last, "preset": preset, "overrides": overrides}
    _run("training", {"run_id": chosen, **arguments}, home, json_)


@app.command()
def retrain(
    end: Annotated[str | None, typer.Option(help="End of the newest window, ISO 8601; default: all there is.")] = None,
    new_days: Annotated[int, typer.Option(help="How many of the last days are new.", min=1, max=366)] = 1,
    context_days: Annotated[int, typer.Option(help="How far contexts reach back.", min=2, max=3660)] = 21,
    policy: Annotated[str, typer.Option(help="nightly, on_drift, or JSON (docs/monitoring.md).")] = "nightly",
    canary: Annotated[
        str, typer.Option(help="Try the new model on a share of the users first: 0.2, or a JSON object.")
    ] = "",
    preset: Annotated[str, typer.Option(help="Size of the model in production.")] = "tiny",
    overrides: Annotated[str, typer.Option(help="Recipe fields as JSON.")] = "{}",
    run_id: Annotated[str | None, typer.Option(help="Give the id of a failed run to resume it.")] = None,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Runs the retraining pipeline: drift of the newest days, then on from the model in production if asked for."""
    from features.storage import connect
    from models.bundle import read_alias

    chosen = _id(run_id, "retrain")
    given = checked_time(end, "--end")
    check_policy(policy)
    check_canary(canary)
    check_recipe(preset, overrides)
    if context_days <= new_days:
        said = f"--context-days {context_days} do not reach back beyond the {new_days} of --new-days"
        fail(said, f"give more, such as --context-days {new_days + 20}", code=2)
    check_folder(home, "--home")
    _activated(home)
    if read_alias(connect(), "production") is None:
        fail("nothing is in production to go on from", "train first: `onerec train`")
    until = datetime.fromisoformat(given or _window()[1])
    current = until - timedelta(days=new_days)
    arguments = {
        "start": (until - timedelta(days=context_days)).isoformat(),
        "reference_start": (current - timedelta(days=2 * new_days)).isoformat(),
        "current_start": current.isoformat(),
        "end": until.isoformat(),
        "base": "production",
        "policy": policy,
        "canary": canary,
        "preset": preset,
        "overrides": overrides,
    }
    _run("retraining", {"run_id": chosen, **arguments}, home, json_)


@app.command()
def runs(
    last: Annotated[int, typer.Option(help="How many of the newest; 0: all.", min=0)] = 20,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """What became of every pipeline run: drift, trigger, blessing, version, and why nothing was published."""
    from features.runs import Run
    from features.storage import connect
    from pipelines import stack

    stack.activate(home, ["s3"])
    storage = connect()
    rows = [_described(Run(storage, run_id)) for run_id in storage.folders("runs/")]
    rows = sorted(rows, key=lambda row: (row["recorded_at"] or "9", row["run_id"]))[-last:]  # the open ones are newest
    if json_:
        emit(rows)
        return
    table = Table()
    for name in ("run", "ended", "what came of it"):
        table.add_column(name, overflow="fold")  # ids are there to be copied: nothing is cut
    for row in rows:
        kind = f"{row['pipeline']}, {row['state'].lower()}" if row["state"] else "open"
        minutes = f"{row['cost']['seconds'] / 60:.1f} min" if "seconds" in row["cost"] else ""
        ended = f"{row['recorded_at'][:16].replace('T', ' ')}\n{minutes}"
        table.add_row(f"{escape(row['run_id'])}\n{kind}", ended, escape("\n".join(_told(row))))
    out.print(table if rows else "no pipeline has run yet: `onerec train`")


def _told(row: dict[str, Any]) -> Iterator[str]:
    """What a run saw, did and left, a line each."""
    if row["drift"]:
        yield f"drift verdict: {row['drift']}"
    if row["retrained"]:
        judged = "blessed" if row["blessed"] else "refused" if row["reasons"] else "not judged"
        yield f"trained, {judged}"
    if row["version"]:
        yield row["version"] + (f", canary: {row['canary']}" if row["canary"] else "")
    if row["why"]:
        yield row["why"]


def _described(run: "Run") -> dict[str, Any]:
    from pipelines.result import describe_run

    return {key: value for key, value in describe_run(run, curves=False).items() if key != "curves"}


def _activated(home: Path) -> None:
    from pipelines import stack

    stack.activate(home)


def _window() -> tuple[str, str]:
    """ISO bounds of everything stored, whole hours."""
    from features.intake import exposures
    from features.storage import connect

    found = exposures.stored_hours(connect())
    if found is None:
        fail("no exposures are stored", "ingest a log first: `onerec ingest PATH`")
    return found[0].isoformat(), found[1].isoformat()


def _id(given: str | None, kind: str) -> str:
    """``given``, or a new one; ends the command when it cannot be one."""
    if given is None:
        return f"{kind}-{datetime.now(UTC):%Y%m%d%H%M%S}"
    check_run_id(given)
    return given


def _run(pipeline: str, arguments: dict[str, str], home: Path, json_: bool) -> None:
    from features.runs import Run
    from features.storage import connect
    from monitoring.outcome import record_run
    from pipelines.local import PipelineFailed
    from pipelines.local import run as run_pipeline
    from pipelines.progress import Progress

    run_id = arguments["run_id"]
    log = home / "logs" / f"{run_id}.log"
    try:
        with Progress().step(f"{pipeline} {run_id}") as step:
            run_pipeline(pipeline, arguments, log, step.note)
    except PipelineFailed as error:
        fail(
            str(error),
            f"nothing was published; once mended, the same command with --run-id {run_id} goes on from there",
        )
    except KeyboardInterrupt:  # its exit handler had no say, and the next run would wait for it
        record_run(run_id, pipeline=pipeline, state="CANCELLED", error="interrupted")
        raise
    described = _described(Run(connect(), run_id))
    if json_:
        emit(described)
        return
    if described["canary"]:
        out.print(f"{described['version']} is tried on a share of the users: `onerec canary show`")
    elif described["version"]:
        out.print(f"published {described['version']} to production")
    else:
        out.print(f"nothing was published: {described['why'] or described['drift']}; log: {log}")
