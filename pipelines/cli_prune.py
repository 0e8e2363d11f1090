"""`onerec prune`: what the platform no longer needs of the stored events and exposures.

On a cluster the same is run nightly as ``python -m features.intake.retention``, in the image that has no pipelines.
"""

from typing import Annotated

import typer

from pipelines.cli import HOME, Home, Json, app, emit, fail, out


@app.command()
def prune(
    days: Annotated[float | None, typer.Option(help="Keep so many days; default: ONEREC_RETENTION_DAYS.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, delete nothing.")] = False,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Merges small segments, deletes superseded and expired ones; those of unfinished runs stay."""
    from features.intake.retention import RetentionConfig
    from features.intake.retention import prune as prune_storage
    from features.settings import settings
    from features.storage import connect
    from pipelines import stack

    kept = settings().retention_days if days is None else days
    try:
        config = RetentionConfig(retention_days=kept)
    except ValueError as error:
        fail(str(error), "nothing was deleted", code=2)
    stack.activate(home, ["s3"])
    done = prune_storage(connect(), config, dry_run=dry_run)
    if json_:
        emit(done)
        return
    doomed = done["superseded"] + done["expired"] - done["kept_for_runs"]
    out.print(
        f"{done['merged']} hours {'to merge' if dry_run else 'merged'}; "
        f"{doomed} segments ({done['bytes'] / 1e6:.1f} MB) {'would be ' if dry_run else ''}deleted: "
        f"{done['superseded']} superseded, {done['expired']} from before {done['oldest']}; "
        f"{done['kept_for_runs']} kept for unfinished runs"
    )
