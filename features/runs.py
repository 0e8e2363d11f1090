"""A pipeline run's artefacts in object storage: idempotent, resumable stages under ``runs/<run_id>/<stage>/``.

A stage does its work in a scratch folder and uploads it; ``done.json`` is written last. Asked again with the
same inputs it returns at once, so that a retried pipeline repeats nothing; other inputs under the same run id
redo it. The returned digest names the content and is what the next stage takes as its input.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from features.storage import ObjectMissing, Storage

UNHASHED = ("metrics.json", "metrics.jsonl", "events.out.tfevents")
"""Names, up to what TensorBoard appends, of files that hold timings: reported, but not part of a stage's content."""


@dataclass(frozen=True)
class Run:
    """One pipeline run; ``run_id`` is stable across retries."""

    storage: Storage
    run_id: str

    def prefix(self, stage: str) -> str:
        """Where the stage's files lie in the bucket."""
        return f"runs/{self.run_id}/{stage}"

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded (``digest``, ``inputs``, ``summary``, ``finished_at``, ``cost``), or None."""
        try:
            record: dict[str, Any] = self.storage.get_json(f"{self.prefix(stage)}/done.json")
        except ObjectMissing:
            return None
        return record

    def summary(self, stage: str) -> dict[str, Any]:
        """The finished stage's summary; raises ObjectMissing when it did not finish."""
        record = self.done(stage)
        if record is None:
            raise ObjectMissing(f"stage {stage!r} of run {self.run_id!r} has not finished")
        summary: dict[str, Any] = record["summary"]
        return summary

    def fetch(self, stage: str, folder: Path) -> Path:
        """Downloads a finished stage into ``folder/<stage>``."""
        if self.done(stage) is None:
            raise ObjectMissing(f"stage {stage!r} of run {self.run_id!r} has not finished")
        return self.storage.get_folder(self.prefix(stage), folder / stage)

    def stage(
        self, stage: str, inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]], keep: Path | None = None
    ) -> str:
        """Runs ``work(folder) -> summary`` unless done with these inputs; returns the content digest.

        With ``keep`` the folder lies below it and survives a kill, so that ``work`` can resume from what it left there.
        """
        inputs = json.loads(json.dumps(inputs, default=str))
        record = self.done(stage)
        if record is not None and record["inputs"] == inputs:
            return str(record["digest"])
        began, used = time.monotonic(), _processor_seconds()
        with _scratch(keep, f"{self.run_id}-{stage}-{_short(inputs)}") as folder:
            summary = work(folder)
            digest = folder_digest(folder)
            self._replace(stage, folder)
        cost = {"seconds": time.monotonic() - began, "cpu_seconds": _processor_seconds() - used}
        finished = {"finished_at": datetime.now(UTC).isoformat(), "cost": cost}
        self.storage.put_json(
            f"{self.prefix(stage)}/done.json", {"digest": digest, "inputs": inputs, "summary": summary, **finished}
        )
        return digest

    def _replace(self, stage: str, folder: Path) -> None:
        self.storage.remove(f"{self.prefix(stage)}/done.json")
        for key in self.storage.keys(f"{self.prefix(stage)}/"):
            self.storage.remove(key)
        self.storage.put_folder(self.prefix(stage), folder)


@contextmanager
def _scratch(keep: Path | None, name: str) -> Iterator[Path]:
    """A folder to work in: temporary, or ``keep/name``, which is removed only when the work is done."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="onerec-stage-") as scratch:
            yield Path(scratch)
        return
    folder = keep / name
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def _processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _short(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]


def _timed(path: Path) -> bool:
    return path.name in UNHASHED or path.name.startswith(UNHASHED[-1])


def folder_digest(folder: Path) -> str:
    """sha256 over names and contents below ``folder``, without the files that hold timings."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not _timed(p)):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
