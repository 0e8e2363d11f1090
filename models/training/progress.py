"""What people see of a training: metrics.jsonl, and a progress bar on a terminal or plain lines elsewhere."""

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.training.checkpoint import LOG

LINE_SECONDS = 10
POLL_SECONDS = 0.5


class Display:
    """Shows records on stderr."""

    def __init__(self) -> None:
        self._shown = time.perf_counter() - LINE_SECONDS
        self._bar: Progress | None = None

    def show(self, record: Mapping[str, float]) -> None:
        """The newest record; needs ``step``, ``steps``, ``loss`` and ``examples_per_s``."""
        line = f"loss {record['loss']:.4f}  {record['examples_per_s']:,.0f} exposures/s"
        if sys.stderr.isatty():
            self._advance(record, line)
        elif record["step"] == record["steps"] or time.perf_counter() - self._shown >= LINE_SECONDS:
            self._shown = time.perf_counter()
            # Not print(): Ray Train replaces it in workers and repeats every line.
            sys.stderr.write(f"step {record['step']}/{record['steps']}  {line}\n")
            sys.stderr.flush()

    def _advance(self, record: Mapping[str, float], line: str) -> None:
        if self._bar is None:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[line]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=record["steps"], line=line)
            self._bar.start()
        self._bar.update(self._task, completed=record["step"], line=line)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


class Log:
    """Appends records to ``output``/metrics.jsonl and shows them; records after ``step`` are dropped at the start."""

    def __init__(self, output: Path, steps: int, step: int, *, write: bool) -> None:
        self._path, self._steps, self._write = output / LOG, steps, write
        self._display = Display()
        if write:
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self._path.write_text("".join(line + "\n" for line in kept))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()

    def write(self, record: Mapping[str, float]) -> None:
        """Appends one record."""
        if not self._write:
            return
        record = {"steps": self._steps, **record}
        with self._path.open("a") as file:
            file.write(json.dumps({name: round(value, 6) for name, value in record.items()}) + "\n")
        self._display.show(record)


@contextmanager
def following(output: Path) -> Iterator[None]:
    """Shows what another process appends to ``output``/metrics.jsonl while the block runs."""
    path, stop, display = output / LOG, threading.Event(), Display()
    start = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        place, over = start, False
        while not over:
            over = stop.wait(POLL_SECONDS)
            if not path.exists():
                continue
            with path.open() as file:
                file.seek(place if place <= path.stat().st_size else 0)
                lines = file.readlines()
                place = file.tell()
            whole = [line for line in lines if line.endswith("}\n")]
            if whole:
                display.show(json.loads(whole[-1]))

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        display.close()
