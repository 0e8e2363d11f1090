"""`onerec explain`: one user's recommendations as a page: pathways, the beam as a tree, and why items are not shown.

Reads the bundle and the features as a model server does and asks the same recommender (fp32, like the local stack's
server); the running server, when there is one, is asked too and the page says whether it agrees.
"""

import re
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from pipelines.cli import HOME, Home, Json, app, check_folder, check_output, check_user, emit, err, fail, out
from pipelines.cli_models import data_ms, newest_ms


@app.command()
def explain(
    user: Annotated[str, typer.Option(help="User id; an unknown one gets the cold-start answer.")],
    num_items: Annotated[int, typer.Option(help="How many items.", min=1, max=100)] = 10,
    beam_width: Annotated[int, typer.Option(help="Beams searched.", min=1, max=512)] = 64,
    exclude: Annotated[list[str] | None, typer.Option(help="Item not to show; may be repeated.")] = None,
    version: Annotated[str, typer.Option(help="A published version instead of the one in production.")] = "",
    output: Annotated[Path | None, typer.Option(help="File of the page; default: HOME/explain/USER.html.")] = None,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Shows on one HTML page what a user would see and why: pathways, beams, scores, filters."""
    from models.serving.explain import Question
    from models.serving.explain import explain as explanation_of
    from monitoring.explanation import render
    from pipelines import stack

    check_user(user)
    if output:
        check_output(output)
    else:
        check_folder(home, "--home")
    stack.activate(home, ["s3"])
    bundle = _bundle(home, version)
    time_ms = max(newest_ms(), data_ms(bundle.version))
    features, problem = _features(home, user, time_ms)
    question = Question(
        user_id=user, time_ms=time_ms, num_items=num_items, beam_width=beam_width, exclude=tuple(exclude or ())
    )
    explanation = explanation_of(bundle, features, question)
    explanation["server"] = "" if version else _compared(explanation, question)
    path = output or home / "explain" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', user)}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(explanation), encoding="utf-8")
    if problem:
        err.print(f"[yellow]warning:[/] {escape(problem)}; the page shows the answer for newcomers", soft_wrap=True)
    if json_:
        emit({**explanation, "page": path})
        return
    shown = [item["item_id"] for item in explanation["items"] if item["status"] == "shown"]
    filtered = [item for item in explanation["items"] if item["status"] in ("seen", "excluded", "taken down")]
    out.print(
        f"{escape(user)}, {bundle.version}: {len(shown)} items shown, {len(filtered)} of the beam filtered; "
        f"{escape(explanation['server'])}",
        soft_wrap=True,
    )
    out.print(f"the page is {escape(str(path))}", soft_wrap=True)


def _bundle(home: Path, version: str) -> Any:
    """The bundle with its deltas, verified; ends the command when there is none."""
    from features.storage import ObjectMissing, connect
    from models.bundle import Bundle, BundleCorrupt, fetch, read_alias
    from models.deltas import DeltaReader

    storage = connect()
    chosen = version or read_alias(storage, "production")
    if not chosen:
        fail("nothing is in production", "train first: `onerec train`")
    try:
        bundle = Bundle.load(fetch(storage, chosen, home / "bundles"))
    except (ObjectMissing, BundleCorrupt) as error:
        fail(str(error.args[0]), "`onerec bundles list` shows what there is")
    deltas = DeltaReader(storage)
    moved = deltas.apply(bundle, deltas.keys(chosen))
    for reason in moved.problems:
        err.print(f"[yellow]warning:[/] {escape(reason)}", soft_wrap=True)
    return moved.bundle


def _features(home: Path, user: str, time_ms: int) -> tuple[Any, str]:
    """The user's features, or None and why not."""
    from features.online import FeaturesUnavailable, OnlineFeatures

    try:
        (found,) = OnlineFeatures.connect().read([user], time_ms)
    except FeaturesUnavailable as error:
        return None, str(error)
    return found, ""


def _compared(explanation: dict[str, Any], question: Any) -> str:
    """Whether the running server gives the same items."""
    from features.settings import settings
    from pipelines.client import Client, ServiceFailed

    current = settings()
    if question.exclude:
        return "The server was not asked (items are excluded)."
    try:
        with Client(current.server_url, current.collector_url, "") as client:
            (served,) = client.recommend(
                "onerec",
                [question.user_id],
                [question.time_ms],
                [f"explain-{uuid.uuid4().hex}"],
                num_items=question.num_items,
                beam_width=question.beam_width,
            )
    except ServiceFailed as error:
        return f"The model server gave nothing to compare with: {error}; {error.hint}."
    shown = sorted((item for item in explanation["items"] if item["status"] == "shown"), key=lambda item: item["place"])
    if served.model_version != explanation["model_version"]:
        return f"The server serves {served.model_version} at the moment."
    same = served.item_ids == [item["item_id"] for item in shown]
    flags = f" (flags: {', '.join(served.flags)})" if served.flags else ""
    return f"The running server answers {'the same' if same else 'other'} items{flags}."
