"""`onerec recommend`, `bundles`, `promote`, `rollback`: ask the running server, and look after its bundles."""

import time
import uuid
from typing import Annotated, Any

import typer
from rich.table import Table

from pipelines.cli import HOME, Home, Json, app, emit, fail, out

bundles = typer.Typer(help="Published models.", no_args_is_help=True)
app.add_typer(bundles, name="bundles")


@app.command()
def recommend(
    user: Annotated[str, typer.Option(help="User id; an unknown one gets the cold-start answer.")],
    num_items: Annotated[int, typer.Option(help="How many items.", min=1, max=100)] = 10,
    beam_width: Annotated[int, typer.Option(help="Beams searched.", min=1, max=512)] = 64,
    model: Annotated[str, typer.Option(help="Model of the server.")] = "onerec",
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Asks the running server what it would show a user now: items, SIDs and scores."""
    from features import catalog
    from features.intake import exposures
    from features.settings import settings
    from features.storage import connect
    from pipelines import stack
    from pipelines.client import Client

    stack.activate(home)
    began = time.perf_counter()
    current = settings()
    with Client(current.server_url, current.collector_url, "") as client:
        request = f"cli-{uuid.uuid4().hex}"
        now = _data_clock(connect(), exposures) or int(time.time() * 1000)
        (served,) = client.recommend(model, [user], [now], [request], num_items=num_items, beam_width=beam_width)
    elapsed = time.perf_counter() - began
    items = {row["item_id"]: row for row in catalog.read_items(connect()).to_pylist()}
    rows = [_row(items.get(item, {}), served, i) for i, item in enumerate(served.item_ids)]
    if json_:
        answer = {"user": user, "model_version": served.model_version, "flags": served.flags, "seconds": elapsed}
        emit({**answer, "items": rows})
        return
    table = Table(title=f"user {user}, {served.model_version} {' '.join(served.flags)}, {1000 * elapsed:.0f} ms")
    for name in ("item", "title", "tags", "SID", "log p"):
        table.add_column(name)
    for row in rows:
        sid = "-".join(str(code) for code in row["sid"])
        table.add_row(row["item_id"], row["title"] or "", ", ".join(row["tags"]), sid, f"{row['score']:.2f}")
    out.print(table)


def _row(item: dict[str, Any], served: Any, i: int) -> dict[str, Any]:
    return {
        "item_id": served.item_ids[i],
        "title": item.get("title"),
        "tags": item.get("tags") or [],
        "sid": served.sids[i],
        "score": served.scores[i],
    }


def _data_clock(storage: Any, exposures: Any) -> int | None:
    """The hour after the newest stored exposure: logs live in their own time, not in the wall's."""
    from datetime import datetime, timedelta

    newest = max(
        (key.split("date=")[1][:18] for key in storage.keys(f"{exposures.ROOT}/") if "date=" in key), default=""
    )
    if not newest:
        return None
    hour = datetime.fromisoformat(f"{newest[:10]}T{newest.split('hour=')[1][:2]}:00:00+00:00")
    return int((hour + timedelta(hours=1)).timestamp() * 1000)


@bundles.command("list")
def list_bundles(home: Home = HOME, json_: Json = False) -> None:
    """Every published version, its parents, metrics and the aliases that point at it."""
    from features.storage import connect
    from models.bundle import list_versions, read_alias, read_manifest
    from pipelines import stack

    stack.activate(home)
    storage = connect()
    aliases: dict[str, list[str]] = {}
    for alias in ("production", "frozen", "candidate"):
        version = read_alias(storage, alias)
        if version:
            aliases.setdefault(version, []).append(alias)
    rows = []
    for version in list_versions(storage):
        manifest = read_manifest(storage, version)
        metrics = storage.get_json(f"models/onerec/{version}/metrics.json").get("candidate", {})
        rows.append({"version": version, "aliases": aliases.get(version, []), "metrics": metrics, **manifest})
    if json_:
        emit(rows)
        return
    table = Table("version", "aliases", "parents", "data until", "recall@50", "legality")
    for row in rows:
        metrics = row["metrics"]
        table.add_row(
            row["version"],
            ", ".join(row["aliases"]),
            ", ".join(row["parents"]),
            row["data_time"][:16],
            f"{metrics.get('recall@50', float('nan')):.4f}",
            f"{metrics.get('legality', float('nan')):.3f}",
        )
    out.print(table)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A published version (`onerec bundles list`).")], home: Home = HOME
) -> None:
    """Points the alias `production` at a version; the servers swap within a second."""
    from features.storage import connect
    from models.bundle import set_alias
    from pipelines import stack

    stack.activate(home)
    set_alias(connect(), "production", version)
    out.print(f"production is now {version}")


@app.command()
def rollback(home: Home = HOME) -> None:
    """Points `production` back at the parent of the version it points at."""
    from features.storage import connect
    from models.bundle import read_alias, read_manifest, set_alias
    from pipelines import stack

    stack.activate(home)
    storage = connect()
    version = read_alias(storage, "production")
    if version is None:
        fail("nothing is in production", "train first: `onerec train`")
    parents = read_manifest(storage, version)["parents"]
    if not parents:
        fail(f"{version} has no parent to go back to", "choose one with `onerec bundles list`, then `onerec promote`")
    set_alias(storage, "production", parents[-1])
    out.print(f"production is now {parents[-1]} (was {version})")
