"""The bundles a server has on its disk: what is in service, and the last few for a quick way back.

Several models, and several processes, may share the folder; each model notes what it serves in ``<name>.serving``, and
a version that anybody serves is not removed. Left out: a limit in bytes.
"""

import logging
import os
import re
import shutil
import time
from pathlib import Path

from models.bundle import VERSION

GRACE_S = 600.0
"""A version fetched or used this recently may be in somebody's hands who has not said so yet."""

log = logging.getLogger(__name__)


def prune(cache: Path, name: str, version: str, keep: int, *, grace_s: float = GRACE_S) -> list[str]:
    """Notes that ``name`` serves ``version`` and removes all but the ``keep`` latest used of those nobody serves."""
    os.utime(cache / version)
    (cache / f"{name}.serving").write_text(version)
    served = {path.read_text() for path in cache.glob("*.serving")}
    idle = [path for path in cache.iterdir() if re.fullmatch(VERSION, path.name)]
    used = sorted(((_used(path), path) for path in idle if path.name not in served), reverse=True)
    removed = [path for at, path in used[keep:] if time.time() - at >= grace_s]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    if removed:
        log.info("removed %d old bundles from %s", len(removed), cache)
    return [path.name for path in removed]


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another model of this folder has just removed it
        return 0.0
