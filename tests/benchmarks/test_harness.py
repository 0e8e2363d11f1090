"""What benchmarks keep is used again for the same inputs only, and only when it was finished."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import kept, place

OF: dict[str, Any] = {"model": {"layers": 4}, "steps": 200}


def test_a_record_is_made_once_for_its_inputs(tmp_path: Path) -> None:
    calls = []

    def work(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return {"loss": 3.0}

    first = kept(tmp_path, "naive, one", OF, work)
    assert first == {"loss": 3.0, "of": OF}
    assert kept(tmp_path, "naive, one", {"steps": 200, "model": {"layers": 4}}, work) == first
    assert calls == [place(tmp_path, "naive, one", OF)]
    assert kept(tmp_path, "naive, one", {**OF, "steps": 30}, work)["of"]["steps"] == 30
    assert len(set(calls)) == 2


def test_work_that_failed_leaves_no_record_and_finds_what_it_left(tmp_path: Path) -> None:
    def killed(folder: Path) -> dict[str, Any]:
        (folder / "checkpoint").write_text("step 100")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, "run", OF, killed)
    record = kept(tmp_path, "run", OF, lambda folder: {"found": (folder / "checkpoint").read_text()})
    assert record["found"] == "step 100"
