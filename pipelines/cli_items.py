"""`onerec items`: new items and take-downs between two trainings, followed by the running servers within seconds."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.cli import HOME, Home, Json, app, emit, err, fail, out

WAIT_S = 60.0
"""How long to wait for the servers to follow."""

items = typer.Typer(help="Items between two trainings: add, take down, list.", no_args_is_help=True)
app.add_typer(items, name="items")

Reason = Annotated[str, typer.Option(help="Kept with the decision, shown by `onerec items list`.")]
Ids = Annotated[list[str], typer.Argument(help="Item ids.", metavar="ITEM...")]
Wait = Annotated[bool, typer.Option(help="Wait until the running server follows, and say how long it took.")]


@items.command()
def add(
    file: Annotated[Path, typer.Argument(help="Parquet, CSV or JSON lines with item_id, duration_ms, title, tags...")],
    wait: Wait = True,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Adds items to the catalogue and gives them semantic IDs in every version that is served."""
    from features import catalog
    from features.itemfile import read_items_file
    from features.storage import connect
    from models.deltas import catch_up_served
    from pipelines import stack

    try:
        table = read_items_file(file)
    except ValueError as error:
        fail(str(error), "nothing was added; mend the file, then repeat the command", code=2)
    stack.activate(home, ["s3"])
    storage = connect()
    began = time.monotonic()
    catalog.append_items(storage, table)
    new = catch_up_served(storage, home / "bundles")
    waited = _follow(began) if wait and any(new.values()) else {}
    if json_:
        emit({"items": table.num_rows, "new": new, "servable_after_s": waited})
        return
    out.print(f"{table.num_rows} items are in the catalogue")
    for version, count in new.items():
        out.print(f"{version}: {count} got a semantic ID" if count else f"{version} had them all")
    if not new:
        out.print("no version is served yet: they will be in the first one that is trained")
    _tell(waited, "servable")


@items.command()
def block(items: Ids, reason: Reason = "", wait: Wait = True, home: Home = HOME, json_: Json = False) -> None:
    """Takes items down: no version serves them from now on, those trained later included."""
    from features import deltas

    _decide(deltas.block, items, reason, wait, home, json_)


@items.command()
def unblock(items: Ids, reason: Reason = "", wait: Wait = True, home: Home = HOME, json_: Json = False) -> None:
    """Lets items be served again."""
    from features import deltas

    _decide(deltas.unblock, items, reason, wait, home, json_)


@items.command("list")
def list_items(home: Home = HOME, json_: Json = False) -> None:
    """What is taken down, and what was added to the versions that are served."""
    from features import deltas
    from features.storage import connect
    from models.bundle import list_versions
    from pipelines import stack

    stack.activate(home, ["s3"])
    storage = connect()
    blocked = sorted(deltas.blocked(storage).values(), key=lambda each: each.at)
    added = {}
    for version in list_versions(storage):
        tables = [deltas.read_delta(storage, key)[0] for key in deltas.delta_keys(storage, version)]
        added[version] = [item for table in tables for item in table.column("item_id").to_pylist()]
    if json_:
        emit({"blocked": [vars(each) for each in blocked], "added": added})
        return
    table = Table("taken down", "since", "reason")
    for each in blocked:
        table.add_row(escape(each.item_id), each.at[:19], escape(each.reason))
    out.print(table if blocked else "nothing is taken down")
    for version, ids in added.items():
        if ids:
            shown = ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")
            out.print(f"{version}: {len(ids)} items added since it was trained: {escape(shown)}", soft_wrap=True)


def _decide(write: Callable[..., str], ids: list[str], reason: str, wait: bool, home: Path, json_: bool) -> None:
    from features import catalog
    from features.storage import connect
    from pipelines import stack

    if not all(item.strip() for item in ids):
        fail("an item id is empty", "give ids such as `onerec items list` and `onerec recommend` show them", code=2)
    stack.activate(home, ["s3"])
    storage = connect()
    known = set(catalog.read_items(storage).column("item_id").to_pylist())
    unknown = sorted(set(ids) - known)
    began = time.monotonic()
    key = write(storage, ids, reason)
    waited = _follow(began) if wait else {}
    if json_:
        emit({"items": sorted(set(ids)), "unknown": unknown, "key": key, "followed_after_s": waited})
        return
    if unknown:
        shown = ", ".join(unknown[:5])
        said = f"{len(unknown)} of them are not in the catalogue ({escape(shown)}); noted all the same"
        err.print(f"[yellow]warning:[/] {said}", soft_wrap=True)
    count = len(set(ids))
    out.print(f"noted for {count} item{'s' * (count > 1)}, kept as {key}", soft_wrap=True)
    _tell(waited, "followed")


def _follow(began: float) -> dict[str, float]:
    """Seconds since ``began`` until each model of the running server had applied everything; empty without server."""
    from features.settings import settings
    from features.storage import connect
    from models.deltas import DeltaReader
    from pipelines.client import Client

    current, reader = settings(), DeltaReader(connect())
    followed: dict[str, float] = {}
    with Client(current.server_url, current.collector_url, "") as client:
        while True:
            if time.monotonic() > began + WAIT_S:
                fail(
                    f"the server did not follow within {WAIT_S:g} s", "see `onerec logs server`; what was written stays"
                )
            known: dict[str, Any] = client.status().get("models", {})
            models = {name: entry for name, entry in known.items() if entry.get("ready")}
            for name, entry in models.items():
                if entry["deltas"] >= len(reader.keys(entry["version"])):
                    followed.setdefault(name, round(time.monotonic() - began, 2))
            if set(followed) >= set(models):
                return followed
            time.sleep(0.1)


def _tell(waited: dict[str, float], word: str) -> None:
    for name, seconds in waited.items():
        out.print(f"model {name}: {word} after {seconds:.1f} s")
