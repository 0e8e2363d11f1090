"""The overlays of manifests/, built by the real kustomize: the binary of that name, or the one inside kubectl."""

import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from cluster_rules.objects import Object, parse

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())


@cache
def built(folder: Path) -> str:
    """What ``kustomize build`` prints for ``folder``."""
    for program in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(program[0]):
            done = subprocess.run([*program, str(folder)], capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
            return done.stdout
    return pytest.skip("neither kustomize nor kubectl is installed")


@pytest.fixture
def build() -> Callable[[str], list[Object]]:
    """Builds an overlay by name."""
    return lambda name: parse(built(MANIFESTS / "overlays" / name))


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """The objects of each overlay."""
    return parse(built(MANIFESTS / "overlays" / request.param))


@pytest.fixture
def production() -> list[Object]:
    """The objects of the GPU cluster's overlay."""
    return parse(built(MANIFESTS / "overlays" / "production"))
