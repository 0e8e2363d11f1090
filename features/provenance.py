"""Which code made something: the release's version and a digest of the platform's own sources.

A digest says more than a commit: it is the same in an image, in a checkout and in a changed checkout's changed form.
"""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("features", "monitoring", "models", "components", "pipelines")
ROOT = Path(__file__).resolve().parent.parent


@cache
def code_version() -> dict[str, str]:
    """``release`` and ``sources``, sha256 over the Python files of the platform's packages; read once a process."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    try:
        release = version("onerec-platform")
    except PackageNotFoundError:  # a checkout that was not installed
        release = "unknown"
    return {"release": release, "sources": digest.hexdigest()}
