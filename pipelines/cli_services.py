"""`onerec up | status | logs | doctor | down`: the local services from the command line."""

import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pipelines import doctor as checks
from pipelines import processes, stack
from pipelines.cli import HOME, Home, Json, app, check_folder, emit, err, fail, out
from pipelines.services import SERVICES

if TYPE_CHECKING:
    from monitoring.state import Runs
    from pipelines.dashboard import Loop

PANEL = "Local services"
_COLOURS = {
    "ok": "green",
    "warning": "yellow",
    "failed": "red",
}

Only = Annotated[
    str,
    typer.Option(
        "--only", metavar="NAMES", help=f"Only these, with what they need, e.g. s3,valkey. All: {', '.join(SERVICES)}."
    ),
]


@app.command(rich_help_panel=PANEL)
def up(
    home: Home = HOME,
    only: Only = "",
    split: Annotated[
        bool, typer.Option("--split", help="Run the model server as two processes: transformer and predictor.")
    ] = False,
    port: Annotated[
        list[str] | None,
        typer.Option("--port", metavar="SERVICE=PORT", help="Fix a service's port instead of a free one; repeatable."),
    ] = None,
    json_: Json = False,
) -> None:
    """Start the local services and wait until each is healthy. Harmless when they run: starts only what is dead."""
    ports = _ports(port or [])
    check_folder(home, "--home")
    with err.status("starting the local services") as spinner:

        def progress(service: str, what: str) -> None:
            if what == "starting":
                spinner.update(f"starting the local services ({service} ...)")
            else:
                err.print(f"  [bold]{service:<10}[/] {what}" if service else f"  {what}")

        names = _names(only)
        names = [*(names or stack.usual()), "predictor"] if split else names
        started = stack.up(home, names, ports=ports, progress=progress)
    if json_:
        emit({"home": home.resolve(), "started": started, "services": [asdict(row) for row in stack.status(home)]})
        return
    from pipelines import dashboard

    out.print(dashboard.render(*_Look(home)()), soft_wrap=True)


@app.command(rich_help_panel=PANEL)
def status(
    home: Home = HOME,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep the page up to date, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks with --watch.", min=0.5)] = 5.0,
    json_: Json = False,
) -> None:
    """Show services, models and where the loop stands: runs, drift, gate, intake. Exit code 1 unless all is healthy."""
    from pipelines import dashboard

    look = _Look(home)
    if watch and json_:
        fail("--watch and --json do not go together", "give one of them; --json prints one look and ends", code=2)
    if watch:
        _watch(look, interval)
        return
    rows, models, loop = look()
    ok = bool(rows) and all(row.state == "healthy" for row in rows)
    if json_:
        emit(
            {
                "home": home.resolve(),
                "ok": ok,
                "services": [asdict(row) for row in rows],
                "models": {k: asdict(v) for k, v in models.items()},
                "loop": loop.told(),
            }
        )
    elif not rows:
        fail(f"nothing was started in {home}", "start the local services with `onerec up`")
    else:
        out.print(dashboard.render(rows, models, loop), soft_wrap=True)
    if not ok:
        raise typer.Exit(1)


class _Look:
    """One look at everything; remembers between two looks which runs have ended."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._runs: Runs | None = None

    def __call__(self) -> "tuple[list[stack.Health], dict[str, stack.ServedModel], Loop]":
        from features.storage import connect
        from monitoring.state import Runs
        from pipelines.dashboard import Loop, read_loop

        rows, models = stack.status(self._home), stack.models(self._home)
        if not any(row.service == "s3" and row.state == "healthy" for row in rows):
            return rows, models, Loop(missing="unknown while the object store does not run")
        stack.activate(self._home, ["s3"])
        storage = connect()
        self._runs = self._runs or Runs(storage)
        return rows, models, read_loop(storage, self._runs)


def _watch(look: _Look, interval: float) -> None:
    from pipelines import dashboard

    with Live(console=out, screen=out.is_terminal, auto_refresh=False) as live:
        while True:
            page = dashboard.render(*look())
            live.update(Group(f"[bold]onerec[/] {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", page), refresh=True)
            time.sleep(interval)


@app.command(rich_help_panel=PANEL)
def logs(
    service: Annotated[str, typer.Argument(help=f"One of {', '.join(SERVICES)}.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing what is added, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50,
    home: Home = HOME,
) -> None:
    """Print the end of a service's log; it is kept after the service ended."""
    if service not in SERVICES:
        fail(f"unknown service {service!r}", f"the services are {', '.join(SERVICES)}", code=2)
    path = home / "logs" / f"{service}.log"
    if not path.exists():
        fail(f"{service} has no log in {home}: it was never started there", "start it with `onerec up`")
    for line in processes.tail(path, lines):
        print(line)
    if follow:
        _follow(path)


@app.command(rich_help_panel=PANEL)
def doctor(home: Home = HOME, json_: Json = False) -> None:
    """Look for what is missing or misconfigured, and say how to mend it. Exit code 1 when something must be mended."""
    found = checks.examine(home)
    if json_:
        emit([asdict(check) for check in found])
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("check", "", "found", "mend"):
            table.add_column(column, overflow="fold")
        for check in found:
            verdict = f"[{_COLOURS[check.verdict]}]{check.verdict}[/]"
            table.add_row(check.name, verdict, escape(check.found), escape(check.mend))
        out.print(table)
    if any(check.verdict == "failed" for check in found):
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def down(home: Home = HOME, only: Only = "", json_: Json = False) -> None:
    """Stop the local services and everything they spawned. The data in the home folder stays."""
    names = _names(only)
    with err.status("stopping the local services"):
        stopped = stack.down(home, names)
    if json_:
        emit({"home": home.resolve(), "stopped": stopped})
    else:
        out.print(f"stopped {', '.join(stopped)}" if stopped else f"nothing runs in {home}")


def _names(only: str) -> list[str]:
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SERVICES]:
        raise typer.BadParameter(
            f"--only names unknown services: {', '.join(unknown)}; there are {', '.join(SERVICES)}"
        )
    return names


def _ports(pairs: list[str]) -> dict[str, int]:
    ports = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name not in SERVICES or not number.isdecimal() or not 0 < int(number) < 65536:
            raise typer.BadParameter(f"--port {pair!r} is not SERVICE=PORT with SERVICE one of {', '.join(SERVICES)}")
        ports[name] = int(number)
    return ports


def _follow(path: Path) -> None:
    with path.open(errors="replace") as file:
        file.seek(0, 2)
        try:
            while True:
                if line := file.readline():
                    print(line, end="", flush=True)
                elif path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    return _follow(path)  # the service was started again
                else:
                    time.sleep(0.2)
        except KeyboardInterrupt:
            return None
