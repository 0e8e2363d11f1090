"""`onerec up | status | logs | doctor | down`: the local services from the command line."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipelines import doctor as checks
from pipelines import processes, stack
from pipelines.cli import HOME, Home, Json, app, emit, err, fail, out
from pipelines.services import SERVICES

PANEL = "Local services"
_COLOURS = {
    "healthy": "green",
    "unhealthy": "yellow",
    "dead": "red",
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
    as_json: Json = False,
) -> None:
    """Start the local services and wait until each is healthy. Harmless when they run: starts only what is dead."""
    ports = _ports(port or [])
    with err.status("starting the local services") as spinner:

        def progress(service: str, what: str) -> None:
            if what == "starting":
                spinner.update(f"starting the local services ({service} ...)")
            else:
                err.print(f"  [bold]{service:<10}[/] {what}" if service else f"  {what}")

        names = _names(only)
        names = [*(names or stack.usual()), "predictor"] if split else names
        started = stack.up(home, names, ports=ports, progress=progress)
    if as_json:
        emit({"home": home.resolve(), "started": started, "services": [asdict(row) for row in stack.status(home)]})
        return
    _print_status(stack.status(home), stack.models(home))


@app.command(rich_help_panel=PANEL)
def status(home: Home = HOME, as_json: Json = False) -> None:
    """Show whether each service is healthy, and which models answer. Exit code 1 unless all services are healthy."""
    rows, models = stack.status(home), stack.models(home)
    ok = bool(rows) and all(row.state == "healthy" for row in rows)
    if as_json:
        emit(
            {
                "home": home.resolve(),
                "ok": ok,
                "services": [asdict(row) for row in rows],
                "models": {k: asdict(v) for k, v in models.items()},
            }
        )
    elif not rows:
        fail(f"nothing was started in {home}", "start the local services with `onerec up`")
    else:
        _print_status(rows, models)
    if not ok:
        raise typer.Exit(1)


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
def doctor(home: Home = HOME, as_json: Json = False) -> None:
    """Look for what is missing or misconfigured, and say how to mend it. Exit code 1 when something must be mended."""
    found = checks.examine(home)
    if as_json:
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
def down(home: Home = HOME, only: Only = "", as_json: Json = False) -> None:
    """Stop the local services and everything they spawned. The data in the home folder stays."""
    names = _names(only)
    with err.status("stopping the local services"):
        stopped = stack.down(home, names)
    if as_json:
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


def _print_status(rows: list[stack.Health], models: dict[str, stack.ServedModel]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("service", "state", "address"):
        table.add_column(column)
    for column in ("pid", "uptime", "memory"):
        table.add_column(column, justify="right")
    for row in rows:
        memory = f"{row.memory_bytes / 2**20:.0f} MB" if row.memory_bytes else "-"
        state = f"[{_COLOURS[row.state]}]{row.state}[/]"
        table.add_row(row.service, state, row.address, str(row.pid), _duration(row.uptime_s), memory)
    out.print(table)
    for name, model in models.items():
        state = f"[green]ready[/], {model.version}" if model.ready else "[yellow]not ready[/]"
        out.print(f"model {name}: {state} (alias {model.alias})", soft_wrap=True)
        if model.reason:
            out.print(f"  [yellow]{escape(model.reason)}[/]", soft_wrap=True)
    for row in rows:
        if row.state != "healthy":
            out.print(f"{row.service} is {row.state}: see `onerec logs {row.service}`; `onerec up` starts what is dead")


def _duration(seconds: float) -> str:
    if seconds <= 0:
        return "-"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{seconds:.0f} s" if minutes < 1 else f"{minutes} min" if hours < 1 else f"{hours} h {minutes % 60} min"
