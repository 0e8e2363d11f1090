"""Pipelines compiled once for all tests that only read them (KFP takes seconds for each), and a platform's home."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_services import left

from pipelines.compilation import compile_one
from pipelines.profiles import LOCAL, PROFILES

Compiled = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The compiled file of a pipeline for a profile, "local" among them; not to be written to."""
    folder, known = tmp_path_factory.mktemp("compiled"), dict[tuple[str, str], Path]()

    def of(name: str, profile: str) -> Path:
        if (name, profile) not in known:
            on = {"local": LOCAL, **PROFILES}[profile]
            known[name, profile] = compile_one(name, folder / f"{name}-{profile}.yaml", on)
        return known[name, profile]

    return of


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder for a local platform; what still runs of it at the end is killed."""
    folder = (tmp_path / "home").resolve()
    yield folder
    for process in left(folder):
        process.kill()
