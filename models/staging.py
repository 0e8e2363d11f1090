"""What every stage of a run shares: its inputs fetched, its outcome stored under the run's id, once.

``features.runs`` says when a stage is done; here its inputs come from object storage into a scratch folder, and bundles
from the verified cache of this home.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from features.runs import Run
from features.settings import settings
from features.storage import connect
from models import bundle
from models.bundle import Bundle


def staged(
    run_id: str,
    stage: str,
    inputs: dict[str, Any],
    needs: Sequence[str],
    work: Callable[[Path, Path], dict[str, Any]],
    resumes: bool = False,
) -> str:
    """Runs ``work(folder holding the stages of ``needs``, output folder)`` unless it is done with these inputs.

    ``resumes`` keeps the output folder when the work is killed: training goes on from its checkpoint there. Returns
    the outcome's content digest.
    """
    run = Run(connect(), run_id)

    def fetch_and_work(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix=f"onerec-{stage}-in-") as scratch:
            for need in needs:
                run.fetch(need, Path(scratch))
            return work(Path(scratch), folder)

    return run.stage(stage, inputs, fetch_and_work, keep=settings().home / "work" if resumes else None)


def bundle_folder(version: str) -> Path:
    """The published bundle's files, verified, in this home's cache."""
    return bundle.fetch(connect(), version, settings().home / "bundles")


def open_bundle(version: str) -> Bundle:
    """The published bundle in memory."""
    return Bundle.load(bundle_folder(version))
