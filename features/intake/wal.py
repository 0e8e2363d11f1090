"""A segmented write-ahead log with group commit: what was acknowledged survives a crash of the process or machine.

One thread owns the file. It takes every waiting record, writes them with one ``write`` and one ``fdatasync``, and only
then resolves their futures, so that many callers share the cost of one disk flush. A record is (length, CRC-32,
payload); replay stops at the first record that does not check, which a crash in mid-write leaves behind and nobody
was told about. Segments are sealed by size, age or on request and belong to their readers from then on.
Left out: replication and compression.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<II")
_SUFFIX = ".wal"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_Done = Future[None] | asyncio.Future[None]


class WalFull(RuntimeError):
    """The log holds as many unread bytes as it may; try again later."""


class WalFailed(RuntimeError):
    """The record could not be made durable; it is not accepted. ``disk_full`` tells whether room would help."""

    def __init__(self, message: str, *, disk_full: bool = False) -> None:
        super().__init__(message)
        self.disk_full = disk_full


@dataclass(frozen=True, kw_only=True)
class WalLimits:
    """When a segment is sealed and when the log refuses more."""

    segment_bytes: int = 8 * 1024 * 1024
    segment_seconds: float = 2.0
    waiting_bytes: int = 64 * 1024 * 1024
    """Records in memory that wait for the disk."""

    def __post_init__(self) -> None:
        for name in ("segment_bytes", "segment_seconds", "waiting_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class Segment:
    """A sealed part of the log; nobody appends to it any more."""

    path: Path
    number: int
    size: int
    """Bytes."""
    since: float
    """Seconds since the epoch of its first record; for a segment found at start, of its last."""

    def records(self) -> list[bytes]:
        """The payloads up to the end or the first torn record."""
        return scan(self.path.read_bytes())[0]

    def remove(self) -> None:
        """Deletes the file."""
        self.path.unlink(missing_ok=True)


def scan(data: bytes) -> tuple[list[bytes], int]:
    """The payloads of whole records at the beginning of ``data``, and how many bytes they take with headers."""
    payloads, at = [], 0
    while at + _HEADER.size <= len(data):
        length, crc = _HEADER.unpack_from(data, at)
        payload = data[at + _HEADER.size : at + _HEADER.size + length]
        if length == 0 or len(payload) < length or zlib.crc32(payload) != crc:
            break
        payloads.append(payload)
        at += _HEADER.size + length
    return payloads, at


def header(payload: bytes) -> bytes:
    """What stands before a record in the file: its length and CRC-32."""
    return _HEADER.pack(len(payload), zlib.crc32(payload))


class WriteAheadLog:
    """The log in one folder, held by one process at a time; ``sealed`` is called with every finished segment.

    Segments of earlier runs are handed over at once, before anything is written. The receiver removes a segment when
    nobody needs it any more. Raises RuntimeError when another process holds the folder.
    """

    def __init__(
        self,
        folder: Path,
        sealed: Callable[[Segment], None],
        limits: WalLimits | None = None,
        committed: Callable[[int, float], None] = lambda records, seconds: None,
    ) -> None:
        """``committed`` hears of every flush: how many records shared it and the seconds it took."""
        self.folder = folder
        self._committed = committed
        self.limits = limits or WalLimits()
        self.failure: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(folder)
        self._wake = threading.Condition()
        self._waiting: deque[tuple[bytes, _Done]] = deque()
        self._waiting_bytes = 0
        self._seals: list[Future[None]] = []
        self._closing = False
        self._sealed = sealed
        self._number = 0
        self._file = -1
        self._size = 0
        self._opened = 0.0
        for segment in _earlier(folder):
            self._number = segment.number
            sealed(segment)
        self._thread = threading.Thread(target=self._run, name="wal", daemon=True)
        self._thread.start()

    def append(self, payload: bytes) -> "Future[None]":
        """Queues a record; the future resolves once it is on disk, or raises WalFailed. Raises WalFull."""
        done = _future()
        self._queue(payload, done)
        return done

    async def commit(self, payload: bytes) -> None:
        """The same for a coroutine: returns once the record is on disk. A whole group costs one wake-up of the loop."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue(payload, done)
        await done

    def _queue(self, payload: bytes, done: _Done) -> None:
        if not payload:
            raise ValueError("an empty record cannot be logged")
        with self._wake:
            if self._closing:
                raise WalFailed("the log is closed")
            if self._waiting_bytes + len(payload) > self.limits.waiting_bytes:
                raise WalFull(f"{self._waiting_bytes} bytes wait for the disk; at most {self.limits.waiting_bytes} may")
            self._waiting.append((payload, done))
            self._waiting_bytes += len(payload)
            self._wake.notify()

    def seal(self) -> "Future[None]":
        """Seals the open segment after every record queued so far; the future resolves when that is done."""
        done = _future()
        with self._wake:
            if self._closing:
                raise WalFailed("the log is closed")
            self._seals.append(done)
            self._wake.notify()
        return done

    def waiting(self) -> int:
        """How many records wait for the disk."""
        return len(self._waiting)

    def open_bytes(self) -> int:
        """Bytes that are not in a sealed segment yet: written ones and waiting ones."""
        return self._size + self._waiting_bytes

    def open_seconds(self) -> float:
        """Age of the oldest record in the open segment, 0 when it has none."""
        return time.time() - self._opened if self._size else 0.0

    def thread_alive(self) -> bool:
        """Whether the thread that writes still runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Writes what is queued, seals, and gives the folder free."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._lock_file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not (self._waiting or self._seals or self._closing):
                    self._wake.wait(self._until_old())
                group, self._waiting = list(self._waiting), deque()
                self._waiting_bytes = 0
                seals, self._seals = self._seals, []
                closing = self._closing
            self._commit(group)
            if seals or closing or self._size >= self.limits.segment_bytes or self._until_old() == 0:
                self._seal()
            for done in seals:
                done.set_result(None)
            if closing and not group:
                return

    def _until_old(self) -> float | None:
        return max(0.0, self._opened + self.limits.segment_seconds - time.time()) if self._size else None

    def _commit(self, group: list[tuple[bytes, _Done]]) -> None:
        """Makes the records durable, then tells their callers."""
        if not group:
            return
        begun = time.perf_counter()
        try:
            self._write(b"".join(part for payload, _ in group for part in (header(payload), payload)))
        except OSError as error:
            self._abandon(error)
            full = error.errno in _NO_ROOM
            failure = WalFailed(f"the log at {self.folder} cannot be written: {error}", disk_full=full)
            _tell([done for _, done in group], failure)
            return
        self.failure = None
        self._committed(len(group), time.perf_counter() - begun)
        _tell([done for _, done in group], None)

    def _write(self, data: bytes) -> None:
        if self._file < 0:
            self._open()
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        os.fdatasync(self._file)
        self._size += len(data)

    def _open(self) -> None:
        self._number += 1
        self._file = os.open(self._path(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._size, self._opened = 0, time.time()
        _sync_folder(self.folder)

    def _abandon(self, error: OSError) -> None:
        """After a failed flush nobody knows what is on disk: cuts at the last durable byte and starts a new file."""
        log.error("the write-ahead log at %s failed: %s", self.folder, error)
        self.failure = str(error)
        if self._file < 0:
            return
        try:
            os.ftruncate(self._file, self._size)
        except OSError as second:
            log.error("segment %s keeps records that were not acknowledged: %s", self._path(), second)
        self._seal()

    def _seal(self) -> None:
        if self._file < 0:
            return
        os.close(self._file)
        segment = Segment(self._path(), self._number, self._size, self._opened)
        self._file, self._size = -1, 0
        if segment.size:
            self._sealed(segment)
        else:
            segment.remove()

    def _path(self) -> Path:
        return self.folder / f"{self._number:012d}{_SUFFIX}"


def _tell(waiting: Sequence[_Done], failure: WalFailed | None) -> None:
    """Resolves the futures; those of a loop in one call on it."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for done in waiting:
        if isinstance(done, Future):
            _resolve([done], failure)
        else:
            loops.setdefault(done.get_loop(), []).append(done)
    for loop, futures in loops.items():
        with contextlib.suppress(RuntimeError):  # a loop that was closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, futures, failure)


def _resolve(futures: Sequence[_Done], failure: WalFailed | None) -> None:
    for done in futures:
        if done.cancelled():
            continue
        if failure is None:
            done.set_result(None)
        else:
            done.set_exception(failure)


def _future() -> "Future[None]":
    """A future that a caller who gives up cannot cancel: the record is on its way to the disk."""
    done = Future[None]()
    done.set_running_or_notify_cancel()
    return done


def _lock(folder: Path) -> BinaryIO:
    handle = (folder / "lock").open("wb")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise RuntimeError(f"another process writes the log at {folder}; stop it, or name another folder") from None
    return handle


def _earlier(folder: Path) -> list[Segment]:
    """The segments an earlier run left; a torn end is copied aside, in case it was more than an unfinished write."""
    segments = []
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        data = path.read_bytes()
        _, whole = scan(data)
        if whole < len(data):
            log.warning("%s: %d bytes after the last whole record are set aside", path, len(data) - whole)
            path.with_suffix(".torn").write_bytes(data[whole:])
        if whole == 0:
            path.unlink()
            continue
        segments.append(Segment(path, int(path.stem), len(data), path.stat().st_mtime))
    return segments


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
