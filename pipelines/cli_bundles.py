"""`onerec bundles list | show | diff`: the published versions, what was decided about one, what changed between two."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.cli import HOME, Home, Json, app, emit, fail, out

bundles = typer.Typer(help="Published models.", no_args_is_help=True)
app.add_typer(bundles, name="bundles")

ALIASES = ("production", "candidate", "frozen")


@bundles.command("list")
def list_bundles(home: Home = HOME, json_: Json = False) -> None:
    """Every published version, its parents, metrics and the aliases that point at it."""
    from features.storage import connect
    from models.bundle import list_versions, read_alias, read_manifest
    from pipelines import stack

    stack.activate(home, ["s3"])
    storage = connect()
    aliases: dict[str, list[str]] = {}
    for alias in ALIASES:
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
    table = Table()
    for column in ("version", "aliases", "parents", "data until", "recall@50", "legality"):
        width = 24 if column == "version" else None  # versions are there to be copied: whole, and nothing is cut
        table.add_column(column, overflow="fold", min_width=width)
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
    out.print(table if rows else "nothing is published; train first: `onerec train`")


@bundles.command()
def diff(
    old: Annotated[str, typer.Argument(help="A version or an alias.")],
    new: Annotated[str, typer.Argument(help="Another; default: what is in production.")] = "production",
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """What changed from one version to another: lineage, data window, recipe, files, catalogue, metrics."""
    from features.storage import ObjectMissing, connect
    from pipelines import stack
    from pipelines.bundles import differences, facts, resolve

    stack.activate(home, ["s3"])
    storage = connect()
    try:
        versions = [resolve(storage, name) for name in (old, new)]
        changes = differences(*(facts(storage, version) for version in versions))
    except ObjectMissing as error:
        fail(str(error.args[0]), "such as `onerec bundles diff frozen production`", code=2)
    if json_:
        rows = [{**vars(each), "relative": each.relative} for each in changes]
        emit({"old": versions[0], "new": versions[1], "changes": rows})
        return
    if not changes:
        out.print(f"{versions[0]} and {versions[1]} are alike in everything that is compared")
        return
    table = Table(title=f"{versions[0]} -> {versions[1]}")
    for column in ("", "", escape(versions[0]), escape(versions[1]), "change"):
        table.add_column(column, overflow="fold")
    section = ""
    for each in changes:
        shown = f"{each.relative:+.1%}" if each.relative is not None else ""
        heading = f"[bold]{each.section}[/]" if each.section != section else ""
        table.add_row(heading, escape(each.name), escape(_told(each.old)), escape(_told(each.new)), shown)
        section = each.section
    out.print(table)


@bundles.command()
def show(
    name: Annotated[str, typer.Argument(help="A version or an alias.")] = "production",
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """What was decided about a version and why: gate, canary, how its run ended, cost, lineage."""
    from features.storage import ObjectMissing, connect
    from monitoring.outcome import read_records
    from pipelines import stack
    from pipelines.bundles import resolve

    stack.activate(home, ["s3"])
    storage = connect()
    try:
        version = resolve(storage, name)
    except ObjectMissing as error:
        fail(str(error.args[0]), "`onerec bundles list` shows what there is", code=2)
    kept = read_records(storage, version)
    if json_:
        emit({"version": version, **kept})
        return
    out.print(f"[bold]{version}[/]" + ("" if kept else ": nothing is told of it"))
    for mark, sentence in _sentences(kept):
        out.print(f"  {mark} {escape(sentence)}", soft_wrap=True)


def _sentences(kept: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(mark, sentence) of every record: what failed first."""
    if decision := kept.get("decision"):
        yield "[bold]gate[/]", f"{'blessed' if decision['blessed'] else 'refused'} {decision['decided_at']}"
        yield from (("✗", sentence) for sentence in decision["failed"])
        yield from (("✓", sentence) for sentence in decision["passed"])
    if canary := kept.get("canary"):
        yield "[bold]canary[/]", f"{canary['status']} against {canary['stable']}: {canary['reason']}"
    if outcome := kept.get("outcome"):
        cost, lineage = outcome["cost"], outcome["lineage"]
        yield "[bold]run[/]", f"{outcome['run_id']} ({outcome['pipeline']}): {outcome['state'].lower()}"
        yield "[bold]cost[/]", f"{cost['seconds']:.0f} s, {cost['cpu_seconds']:.0f} s of processors"
        parents, code = ", ".join(lineage["parents"]) or "nothing", lineage["code"]
        made = f"{len(lineage['segments'])} segments, on from {parents}, code {code['release']} {code['sources'][:12]}"
        yield "[bold]made of[/]", made


def _told(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
