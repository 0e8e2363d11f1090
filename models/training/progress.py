"""What people see of a training: metrics.jsonl, TensorBoard events, Ray's metrics, and a progress bar on a terminal or
plain lines elsewhere.

metrics.jsonl is the record; the others are views of it. Left out: experiment trackers as services.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from models.training.checkpoint import LOG

LINE_SECONDS = 10
POLL_SECONDS = 0.5
EVENTS = "tensorboard"
"""Folder of TensorBoard's event files, below the output."""
Sink = Callable[[dict[str, Any]], None]
_SINK: ContextVar[Sink | None] = ContextVar("sink", default=None)


class Display:
    """Shows records on stderr."""

    def __init__(self) -> None:
        self._shown = time.perf_counter() - LINE_SECONDS
        self._bar: Progress | None = None

    def show(self, record: Mapping[str, float]) -> None:
        """The newest record; needs ``step``, ``steps``, ``loss`` and one of ``tokens_per_s`` and ``pairs_per_s``."""
        name, unit = ("pairs_per_s", "pairs") if "pairs_per_s" in record else ("tokens_per_s", "target tokens")
        line = f"loss {record['loss']:.4f}  {record[name]:,.0f} {unit}/s"
        if record.get("mfu"):
            line += f"  MFU {record['mfu']:.1%}"
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


@contextmanager
def reporting(sink: Sink) -> Iterator[None]:
    """Gives the trainings inside the block a ``sink`` for the record at every checkpoint.

    Not for every record: Ray takes in one report of a worker in two seconds, and the worker waits for it.
    """
    token = _SINK.set(sink)
    try:
        yield
    finally:
        _SINK.reset(token)


class Log:
    """Appends records to ``output``/metrics.jsonl and shows them; records after ``step`` are dropped at the start.

    Only the worker with ``write`` writes.
    """

    def __init__(self, output: Path, steps: int, step: int, *, write: bool) -> None:
        self._path, self._steps, self._write = output / LOG, steps, write
        self._display = Display()
        if write:
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self._path.write_text("".join(line + "\n" for line in kept))
            self._events = SummaryWriter(str(output / EVENTS), purge_step=step + 1)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()
        if self._write:
            self._events.close()

    def write(self, record: Mapping[str, float]) -> None:
        """Appends one record."""
        if not self._write:
            return
        record = {"steps": self._steps, **record}
        for name in record.keys() - {"step", "steps"}:
            self._events.add_scalar(name, record[name], int(record["step"]))
        with self._path.open("a") as file:
            file.write(json.dumps({name: round(value, 6) for name, value in record.items()}) + "\n")
        self._display.show(record)


def report(record: Mapping[str, Any]) -> None:
    """Hands ``record`` to the sink around this training, if there is one (``reporting``); on every worker."""
    sink = _SINK.get()
    if sink is not None:
        sink(dict(record))


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
            # A worker that starts anew rewrites the file: what follows the old place may begin inside a line.
            whole = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
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
