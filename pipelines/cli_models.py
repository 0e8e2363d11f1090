"""`onerec recommend`, `promote`, `rollback`: ask the running server, and choose what it serves."""

import re
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.cli import HOME, Home, Json, Select, app, check_select, check_user, emit, err, fail, out

FLAGS = {
    "cold_user": "nothing is known of this user; the answer is the one for newcomers",
    "degraded": "some features of this user have expired",
    "features_unavailable": "the feature store does not answer, so the answer is the one for newcomers: `onerec up`",
}
"""What the server's flags mean."""


@app.command()
def recommend(
    user: Annotated[str, typer.Option(help="User id; an unknown one gets the cold-start answer.")],
    num_items: Annotated[int, typer.Option(help="How many items.", min=1, max=100)] = 10,
    beam_width: Annotated[int, typer.Option(help="Beams searched.", min=1, max=512)] = 64,
    select: Select = "model",
    model: Annotated[str, typer.Option(help="Model of the server.")] = "onerec",
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Asks the running server what it would show a user now: items, SIDs and scores."""
    from features.settings import settings
    from features.storage import StorageUnavailable
    from pipelines import stack
    from pipelines.client import Client

    check_user(user)
    check_select(select)
    stack.activate(home, ["server"])
    current = settings()
    with Client(current.server_url, current.collector_url, "") as client:
        version = _ready(client.status(), model)
        try:
            now, missing = max(newest_ms(), data_ms(version)), ""
        except StorageUnavailable as error:
            now, missing = data_ms(version), str(error)
        request = f"cli-{uuid.uuid4().hex}"
        began = time.perf_counter()
        asked = {"num_items": num_items, "beam_width": beam_width, "select": select}
        (served,) = client.recommend(model, [user], [now], [request], **asked)
        elapsed = time.perf_counter() - began
    items = _items(home, served.model_version)
    rows = [_row(items.get(item, {}), served, i) for i, item in enumerate(served.item_ids)]
    if missing:
        err.print(f"[yellow]warning:[/] {escape(missing)}; the answer comes from the model in memory", soft_wrap=True)
    if json_:
        answer = {"user": user, "model_version": served.model_version, "flags": served.flags, "seconds": elapsed}
        emit({**answer, "items": rows})
        return
    out.print(_table(user, served.model_version, rows, elapsed))
    for flag in served.flags:
        out.print(f"[yellow]{flag}[/]: {FLAGS.get(flag, 'see docs/serving.md')}", soft_wrap=True)


def _ready(status: dict[str, Any], model: str) -> str:
    """The version that ``model`` serves; ends the command with the server's reason when it serves none."""
    if not status:
        fail("the model server does not answer", "`onerec status` and `onerec logs server` show why")
    known = status["models"]
    if model not in known:
        fail(f"the server has no model {model!r}", f"give --model one of {', '.join(known)}", code=2)
    if not known[model]["ready"]:
        hint = "choose a version: `onerec bundles list`, `onerec promote VERSION`; when there is none: `onerec train`"
        fail(f"model {model} is not ready: {known[model]['reason']}", hint)
    return str(known[model]["version"])


def _row(item: dict[str, Any], served: Any, i: int) -> dict[str, Any]:
    return {
        "item_id": served.item_ids[i],
        "title": item.get("title"),
        "tags": item.get("tags") or [],
        "sid": served.sids[i],
        "score": served.scores[i],
    }


def _table(user: str, version: str, rows: list[dict[str, Any]], seconds: float) -> Table:
    table = Table(title=f"user {escape(user)}, {version}, answered in {1000 * seconds:.0f} ms")
    for name in ("item", "title", "tags", "SID", "log p"):
        table.add_column(name)
    for row in rows:
        sid = "-".join(str(code) for code in row["sid"])
        title, tags = escape(row["title"] or ""), escape(", ".join(row["tags"]))
        table.add_row(escape(row["item_id"]), title, tags, sid, f"{row['score']:.2f}")
    return table


def _items(home: Path, version: str) -> dict[str, dict[str, Any]]:
    """What ``version`` knows of its items, from the server's verified copy, or from object storage; else nothing."""
    import pyarrow.parquet as pq

    from features.storage import ObjectMissing, StorageUnavailable, connect

    columns = ["item_id", "title", "tags"]
    path = home / "bundles" / version / "items.parquet"
    try:
        stored = path.exists()
        key = f"models/onerec/{version}/items.parquet"
        table = pq.read_table(path, columns=columns) if stored else connect().get_table(key, columns)
    except (ObjectMissing, StorageUnavailable, OSError):
        return {}
    return {row["item_id"]: row for row in table.to_pylist()}


def data_ms(version: str) -> int:
    """Where the data of a version ends, which its name begins with: 20260101T000000-ab12cd34."""
    return int(datetime.strptime(version[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC).timestamp() * 1000)


def newest_ms() -> int:
    """The hour after the newest stored exposure, 0 without any: logs live in their own time, not in the wall's."""
    from features.intake.exposures import ROOT
    from features.storage import connect

    found = (re.search(r"date=([\d-]+)/hour=(\d+)", key) for key in connect().keys(f"{ROOT}/"))
    newest = max((f"{hour[1]}T{hour[2]}" for hour in found if hour), default="")
    if not newest:
        return 0
    return int((datetime.fromisoformat(f"{newest}:00:00+00:00") + timedelta(hours=1)).timestamp() * 1000)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A published version (`onerec bundles list`).")], home: Home = HOME
) -> None:
    """Points the alias `production` at a version, whose files are verified first; the servers swap within a second."""
    from pipelines import stack

    stack.activate(home, ["s3"])
    promote_version(version)
    out.print(f"production is now {version}")


@app.command()
def rollback(home: Home = HOME) -> None:
    """Points `production` back at the parent of the version it points at."""
    from features.storage import connect
    from models.bundle import read_alias, read_manifest
    from pipelines import stack

    stack.activate(home, ["s3"])
    storage = connect()
    version = read_alias(storage, "production")
    if version is None:
        fail("nothing is in production", "train first: `onerec train`")
    parents = read_manifest(storage, version)["parents"]
    if not parents:
        fail(f"{version} has no parent to go back to", "choose one with `onerec bundles list`, then `onerec promote`")
    promote_version(parents[-1])
    out.print(f"production is now {parents[-1]} (was {version})")


def promote_version(version: str) -> None:
    """Moves the alias, unless the bundle is incomplete or corrupt: then everything stays as it is."""
    from features.storage import ObjectMissing, connect
    from models.bundle import BundleCorrupt, fetch, set_alias
    from models.deltas import catch_up

    storage = connect()
    try:
        with tempfile.TemporaryDirectory(prefix="onerec-verify-") as scratch:
            fetch(storage, version, Path(scratch))
            catch_up(storage, version, Path(scratch))  # items that came after it was trained
    except (ObjectMissing, BundleCorrupt) as error:
        fail(str(error.args[0]), "production was not changed; `onerec bundles list` shows what can be promoted")
    set_alias(storage, "production", version)
