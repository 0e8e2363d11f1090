from pathlib import Path

import pytest

from features.runs import Run, folder_digest
from features.storage import ObjectMissing, Storage


def writes(text: str, calls: list[str]) -> object:
    def work(folder: Path) -> dict[str, object]:
        calls.append(text)
        (folder / "a.txt").write_text(text)
        (folder / "metrics.json").write_text(str(len(calls)))
        (folder / f"events.out.tfevents.{len(calls)}").write_text(str(len(calls)))
        return {"text": text}

    return work


def test_a_stage_runs_once_per_inputs_and_digests_its_content(s3: Storage) -> None:
    calls: list[str] = []
    run = Run(s3, "r1")
    first = run.stage("data", {"x": 1}, writes("one", calls))
    assert run.stage("data", {"x": 1}, writes("one", calls)) == first
    assert calls == ["one"]
    assert run.stage("data", {"x": 2}, writes("one", calls)) == first, "timings are not content"
    assert run.stage("data", {"x": 3}, writes("two", calls)) != first
    assert run.summary("data") == {"text": "two"}


def test_a_failed_stage_is_not_done_and_is_redone(s3: Storage, tmp_path: Path) -> None:
    run = Run(s3, "r2")

    def fails(folder: Path) -> dict[str, object]:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run.stage("data", {}, fails)
    with pytest.raises(ObjectMissing):
        run.fetch("data", tmp_path)
    run.stage("data", {}, writes("whole", []))
    assert (run.fetch("data", tmp_path) / "a.txt").read_text() == "whole"


def test_redoing_a_stage_leaves_nothing_of_the_old_one(s3: Storage) -> None:
    run = Run(s3, "r3")

    def many(folder: Path) -> dict[str, object]:
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text(name)
        return {}

    run.stage("data", {"v": 1}, many)
    run.stage("data", {"v": 2}, writes("one", []))
    assert not s3.exists("runs/r3/data/b.txt")


def test_the_digest_ignores_where_the_folder_lies(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f").write_text("same")
    assert folder_digest(tmp_path / "x") == folder_digest(tmp_path / "y")
