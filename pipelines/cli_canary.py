"""`onerec canary`: the canary that runs look at (`show`, `look`, `end`), and one by hand on KServe (the rest)."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli import HOME, Home, Json, app, checked_time, emit, fail, out

if TYPE_CHECKING:
    from models.cluster.inference import Canary

canary = typer.Typer(help="A candidate for a share of the users.", no_args_is_help=True)
app.add_typer(canary, name="canary")

Service = Annotated[str, typer.Option("--service", help="The InferenceService.")]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Its namespace.")]
Percent = Annotated[int, typer.Option("--percent", help="The canary's share of the requests.", min=0, max=100)]


@canary.command()
def show(home: Home = HOME, json_: Json = False) -> None:
    """The canary under way, and how the last ones ended."""
    from features.storage import connect
    from monitoring import trial
    from pipelines import stack

    stack.activate(home, ["s3"])
    storage = connect()
    running, over = trial.read(storage), trial.ended(storage)
    if json_:
        emit({"running": asdict(running) if running else None, "ended": [asdict(each) for each in over]})
        return
    for each in [*over[-5:], *([running] if running else [])]:
        out.print(f"{each.version} against {each.stable} since {each.started}: [bold]{each.status}[/]")
        for seen in each.looks:
            out.print(f"  look {seen['look']} at {seen['at']}: {seen['action']}", *seen["reasons"], sep="\n    ")
    if running is None:
        out.print("no canary is under way")


@canary.command()
def look(
    end: Annotated[str, typer.Option(help="Now, ISO 8601 in the log's time; default: the newest stored hour.")] = "",
    home: Home = HOME,
) -> None:
    """Takes the planned look if it is due, as every retraining run does first: promotes, rolls back or goes on."""
    from models.steering import follow_canary
    from pipelines import stack

    now = checked_time(end or None, "--end") or ""
    stack.activate(home, ["s3"])
    found = follow_canary(now)
    if found is None:
        out.print("no canary is under way")
        return
    out.print(f"{found.version}: {found.status} after look {found.looked} of {found.config.looks}; {found.reason}")


@canary.command()
def end(home: Home = HOME) -> None:
    """Ends the canary under way; production was never touched."""
    from features.settings import settings
    from features.storage import connect
    from models.steering import steer_of
    from monitoring import trial
    from pipelines import stack

    stack.activate(home, ["s3"])
    storage = connect()
    running = trial.read(storage)
    if running is None:
        fail("no canary is under way", "`onerec canary show` tells how the last ones ended")
    trial.finish(storage, running, trial.ROLLED_BACK, "ended by hand", steer_of(storage, settings()))
    out.print(f"{running.version} is no longer tried")


@canary.command()
def start(
    version: Annotated[str, typer.Argument(help="A published version (`onerec bundles list`).")],
    percent: Percent = 5,
    service: Service = "onerec",
    namespace: Namespace = "onerec",
) -> None:
    """Points the alias `candidate` at a version and serves it to a share of the requests."""
    from features.storage import connect
    from models.bundle import set_alias
    from models.cluster import inference

    def edit(found: dict[str, Any]) -> dict[str, Any]:
        return inference.start(found, percent, version)

    chosen = _canary(service, namespace)
    _refusing(lambda: chosen.check("start", edit))  # before the alias moves
    set_alias(connect(), "candidate", version)
    _change(chosen, "start", edit)
    out.print(f"{version} serves {percent} % of the requests to {service}")


@canary.command()
def advance(percent: Percent, service: Service = "onerec", namespace: Namespace = "onerec") -> None:
    """Gives the running canary another share."""
    from models.cluster import inference

    _change(_canary(service, namespace), "advance", lambda found: inference.advance(found, percent))
    out.print(f"the canary serves {percent} % of the requests to {service}")


@canary.command()
def promote(
    retarget: Annotated[
        bool, typer.Option("--retarget", help="Keep the canary's pods as the stable ones: for another image.")
    ] = False,
    service: Service = "onerec",
    namespace: Namespace = "onerec",
) -> None:
    """Makes the candidate production: the alias moves, the stable pods swap their model, the canary goes."""
    from features.storage import connect
    from models.bundle import read_alias
    from models.cluster import inference
    from pipelines.cli_models import promote_version

    chosen = _canary(service, namespace)
    if retarget:
        _change(chosen, "retarget", inference.retarget)
        out.print(f"the canary's pods are now the stable ones of {service}")
        return
    found = chosen.get()
    if inference.share(found) is None:
        fail("no canary is running", "start one first: `onerec canary start VERSION`")
    version, now = inference.version(found), read_alias(connect(), "candidate")
    if version != now:
        fail(f"the canary was started for {version}, `candidate` is now {now}", "roll back, then start again")
    promote_version(version)
    _change(chosen, "promote", lambda found: inference.drop(found, hold=False))
    out.print(f"production is now {version}")


@canary.command()
def rollback(service: Service = "onerec", namespace: Namespace = "onerec") -> None:
    """Takes the canary out; production was never touched."""
    from models.cluster import inference

    _change(_canary(service, namespace), "rollback", lambda found: inference.drop(found, hold=True))
    out.print(f"{service} serves production alone")


@canary.command()
def status(service: Service = "onerec", namespace: Namespace = "onerec", json_: Json = False) -> None:
    """The canary's share, and what KServe would object to."""
    from models.cluster import inference

    found = _canary(service, namespace).get()
    row = {"service": service, "mode": inference.mode(found), "percent": inference.share(found)}
    problems = inference.problems(found)
    if json_:
        emit({**row, "problems": problems})
        return
    told = "no canary" if row["percent"] is None else f"canary at {row['percent']} %"
    out.print(f"{service} ({row['mode']}): {told}")
    for problem in problems:
        out.print(f"[yellow]{problem}[/]")


def _canary(service: str, namespace: str) -> "Canary":
    from features.storage import connect
    from models.cluster.canary import on_kserve

    return on_kserve(connect(), f"{namespace}/{service}").canary


def _change(chosen: "Canary", action: str, edit: Any) -> None:
    _refusing(lambda: chosen.change(action, edit))


def _refusing(work: Callable[[], Any]) -> None:
    from models.cluster.inference import CanaryRefused

    try:
        work()
    except CanaryRefused as error:
        fail(str(error), "nothing was changed")
