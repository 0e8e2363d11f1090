"""Served events that wait on disk while the collector is away: JSON lines in segments, bounded in bytes.

Events are appended, fsynced, to ``spool.jsonl``; a segment that is full, or that is to be sent, is renamed to
``sending-*.jsonl`` and never written again. Several processes may share the folder (two of them may then send the same
segment: exposure ids make that harmless). What a crash left torn is the reader's to count.
"""

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

SEGMENT_BYTES = 4_000_000
"""A segment is sent as a whole, so this bounds the memory and the time of one sending."""

Event = dict[str, Any]


class SpoolFull(OSError):
    """The spool holds as many bytes as it may."""


class Spool:
    """Events on disk, at most ``limit_bytes`` of them."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._limit = limit_bytes
        self._current = folder / "spool.jsonl"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def append(self, events: Sequence[Event]) -> None:
        """Adds all of the events, fsynced, or none; raises SpoolFull, or OSError when the disk does not take them."""
        lines = b"".join(orjson.dumps(event) + b"\n" for event in events)
        with self._locked():
            held = self.bytes()
            if held + len(lines) > self._limit:
                raise SpoolFull(f"{self._folder} holds {held:,} of at most {self._limit:,} bytes")
            with self._current.open("a+b", buffering=0) as file:
                _write(file, lines)
            if self._current.stat().st_size >= SEGMENT_BYTES:
                self._close()

    def segments(self) -> list[Path]:
        """What is to be sent, oldest first; later events go to a new segment."""
        with self._locked():
            if self._current.exists():
                self._close()
        return self._closed()

    def bytes(self) -> int:
        """How much is on disk."""
        return sum(size for path in self._folder.glob("*.jsonl") for size in _sizes(path))

    def count(self) -> int:
        """How many events are on disk."""
        return sum(_lines(path) for path in self._folder.glob("*.jsonl"))

    def _close(self) -> None:
        number = max((int(path.name.split("-")[1]) for path in self._closed()), default=0) + 1
        self._current.rename(self._folder / f"sending-{number:08d}-{uuid.uuid4().hex[:8]}.jsonl")

    def _closed(self) -> list[Path]:
        return sorted(self._folder.glob("sending-*-*.jsonl"))


def _write(file: FileIO, lines: bytes) -> None:
    """All of ``lines`` at the end, or none; after a line that a crash tore, which would else spoil the next one."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        lines = lines if file.read(1) == b"\n" else b"\n" + lines
    try:
        if file.write(lines) < len(lines):
            raise OSError(errno.ENOSPC, "there is no room for all of the events")
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise


def read(segment: Path) -> tuple[list[Event], int]:
    """The events of a segment, and how many of its lines a crash tore; nothing when another process has sent it."""
    events, torn = [], 0
    try:
        lines = segment.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    for line in lines:
        try:
            events.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            torn += 1
    return events, torn


def _sizes(path: Path) -> list[int]:
    """The file's size; nothing when it went away meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return [path.stat().st_size]
    return []


def _lines(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return sum(1 for _ in file)
    return 0
