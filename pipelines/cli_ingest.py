"""`onerec ingest`: looks at a log, or reads it into the platform."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.cli import HOME, Home, Json, app, check_folder, check_log, emit, fail, out

if TYPE_CHECKING:  # what takes seconds to import waits until the path was looked at
    from features.datasets import Published
    from pipelines.progress import Step

STATISTIC = (
    "features counted over the whole period are refused: a counter that includes the days after an impression knows "
    "its outcome, so off-line figures rise and the model on-line gets worse"
)


@app.command()
def ingest(
    path: Annotated[
        Path, typer.Argument(help="Folder of KuaiRand, MovieLens or Amazon sequences; with --map any CSV or Parquet.")
    ],
    map_: Annotated[
        str,
        typer.Option("--map", help="Columns of another layout: user_id=uid,item_id=iid,event_time=ts, or a TOML file."),
    ] = "",
    check: Annotated[bool, typer.Option("--check", help="Only show what the log holds; nothing is stored.")] = False,
    statistic: Annotated[bool, typer.Option("--statistic", help="Refused: such features leak the future.")] = False,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Reads a log into the platform: catalogue, exposures and on-line features. Repeating it changes nothing.

    An interrupted ingest goes on where it was when the same command is given again.
    """
    if statistic:
        fail(STATISTIC, "leave --statistic out; counters as of each day can be computed from the log itself", code=2)
    check_log(path, map_)
    if not check:
        check_folder(home, "--home")

    from features.datasets import open_log, read_map
    from pipelines.progress import Progress

    log = open_log(path, read_map(map_) if map_ else None)
    with Progress().step(f"{'reading' if check else 'storing'} {path}") as step:
        found = _card(log, step) if check else _store(log, home, step)
    if json_:
        emit(found)
    elif check:
        _show_card(found)
    else:
        _show(log.name, {name: f"{count:,}" for name, count in found.items()})


def _card(log: "Published", step: "Step") -> dict[str, Any]:
    from features.datasets.card import quality_card

    with tempfile.TemporaryDirectory(prefix="onerec-log-") as scratch:
        return quality_card(log, Path(scratch), step.note)


def _store(log: "Published", home: Path, step: "Step") -> dict[str, Any]:
    from features.storage import connect
    from pipelines import stack
    from pipelines.ingest import ingest_log

    stack.activate(home, ("s3", "valkey"))
    return ingest_log(log, connect(), home, step)


def _show(title: str, rows: dict[str, str]) -> None:
    table = Table("", "", title=escape(title), title_style="bold", show_header=False)
    table.columns[1].justify = "right"
    for name, text in rows.items():
        table.add_row(name.replace("_", " "), escape(text))
    out.print(table)


def _show_card(card: dict[str, Any]) -> None:
    shown = {name: value for name, value in card.items() if name not in ("name", "warnings") and value not in ({}, [])}
    _show(card["name"], {name: _text(name, value, card["rows"]) for name, value in shown.items()})
    for warning in card["warnings"]:
        out.print(f"[bold yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    if not card["warnings"]:
        out.print("nothing odd was found")


def _text(name: str, value: Any, rows: int) -> str:
    if name == "flags":
        return "\n".join(f"{flag} {count / rows:.2%}" for flag, count in value.items() if count)
    if isinstance(value, dict):
        return "\n".join(f"{_text('', part, rows)} {key}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
