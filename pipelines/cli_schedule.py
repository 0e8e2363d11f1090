"""`onerec schedule apply | list | remove | run`: what runs when, in a cluster or on this machine."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipelines.cli import HOME, Home, Json, app, check_folder, checked_parameters, emit, err, fail, out
from pipelines.cli_kubeflow import chosen_profile

if TYPE_CHECKING:
    from pipelines.schedules import Schedule

schedule = typer.Typer(help="What runs when: recurring runs of KFP, or this machine's own.", no_args_is_help=True)
app.add_typer(schedule, name="schedule")

Experiment = Annotated[str, typer.Option(help="The experiment of the recurring runs (in a cluster).")]


@schedule.command("apply")
def apply_(
    file: Annotated[Path, typer.Argument(help="The schedules, as YAML (docs/kubeflow.md).")],
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Makes the schedules what the file says: new ones start, changed ones are replaced, missing ones end."""
    from pipelines.compilation import compile_one
    from pipelines.kubeflow import Kubeflow
    from pipelines.schedules import BadSchedule, apply, keep, parse

    try:
        wanted = parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        fail(f"{file} cannot be read: {why}", "give a schedule file; nothing was changed", code=2)
    except BadSchedule as error:
        fail(str(error), "nothing was changed", code=2)
    wanted = replace(wanted, schedules=tuple(_checked(each) for each in wanted.schedules))
    chosen = chosen_profile(wanted.profile, **wanted.objects)
    if _in_cluster():
        done = apply(Kubeflow.connect(), wanted, lambda name, path: compile_one(name, path, chosen))
    else:
        check_folder(home, "--home")
        keep(home, wanted)
        done = [(each.name, "kept") for each in wanted.schedules]
    if json_:
        emit([{"name": name, "action": what} for name, what in done])
        return
    for name, what in done:
        out.print(f"{name}: {what}")
    if not _in_cluster():
        err.print("`onerec schedule run` runs them on this machine; ONEREC_KFP_ENDPOINT would name a cluster")


def _checked(wanted: "Schedule") -> "Schedule":
    """The schedule, its times with a zone; ends the command, with code 2, at parameters no run of it could use."""
    from pipelines.compilation import parameters

    if unknown := sorted(set(wanted.parameters) - set(parameters(wanted.pipeline))):
        said = f"schedule {wanted.name!r}: pipeline {wanted.pipeline} has no {', '.join(unknown)}"
        fail(said, f"it has {', '.join(parameters(wanted.pipeline))}; nothing was changed", code=2)
    return replace(wanted, parameters=checked_parameters(wanted.parameters, f"schedule {wanted.name!r}, "))


@schedule.command("list")
def list_(experiment: Experiment = "onerec", home: Home = HOME, json_: Json = False) -> None:
    """The schedules there are, and when each is next."""
    rows = _of_cluster(experiment) if _in_cluster() else _of_home(home)
    if json_:
        emit(rows)
        return
    if not rows:
        out.print("there are no schedules: `onerec schedule apply FILE` makes some (docs/kubeflow.md)")
        return
    table = Table("name", "cron (UTC)", "enabled", "next", "id")
    for row in rows:
        table.add_row(row["name"], row["cron"], "yes" if row["enabled"] else "no", row["next"], row["id"])
    out.print(table)


@schedule.command("remove")
def remove_(
    name: Annotated[str, typer.Argument(help="A schedule (`onerec schedule list`).")],
    experiment: Experiment = "onerec",
    home: Home = HOME,
) -> None:
    """Removes one schedule; its past runs stay."""
    from pipelines.kubeflow import Kubeflow
    from pipelines.schedules import keep, kept, remove

    if _in_cluster():
        found = remove(Kubeflow.connect(), experiment, name)
    else:
        stored = kept(home)
        left = tuple(each for each in stored.schedules if each.name != name)
        found = len(stored.schedules) - len(left)
        if found:
            keep(home, replace(stored, schedules=left))
    if not found:
        fail(f"there is no schedule {name!r}", "`onerec schedule list` shows what there is")
    out.print(f"removed {name}")


@schedule.command("run")
def run_(home: Home = HOME) -> None:
    """Runs this machine's schedules until interrupted, one pipeline at a time."""
    from pipelines import stack
    from pipelines.scheduler import watch

    stack.activate(home)
    watch(home, lambda text: err.print(f"{datetime.now(UTC):%H:%M:%S} {text}", soft_wrap=True, markup=False))


def _in_cluster() -> bool:
    from features.settings import settings

    return bool(settings().kfp_endpoint)


def _of_cluster(experiment: str) -> list[dict[str, Any]]:
    from pipelines.kubeflow import Kubeflow
    from pipelines.schedules import name_of, next_of

    found = [run for run in Kubeflow.connect().recurring(experiment) if name_of(run)]
    return [
        {
            "name": name_of(run),
            "cron": run.trigger.cron_schedule.cron,
            "enabled": run.status == "ENABLED",
            "next": next_of(run.trigger.cron_schedule.cron) if run.status == "ENABLED" else "",
            "id": run.recurring_run_id,
        }
        for run in sorted(found, key=lambda run: (run.display_name, str(run.created_at)))
    ]


def _of_home(home: Path) -> list[dict[str, Any]]:
    from pipelines.schedules import kept, next_of

    return [
        {"name": each.name, "cron": each.cron, "enabled": True, "next": next_of(each.cron), "id": ""}
        for each in kept(home).schedules
    ]
