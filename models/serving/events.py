"""Served events on their way to the collector: bounded, off the request path, spooled to disk when it is away.

A generated slot with its log-probabilities is training data (OneRec-V2, arXiv 2508.20900, 3.1.2 needs the
probability at exposure), so KServe's InferenceLogger, which drops on failure, will not do. Delivery is at least once
with idempotent ids: a batch leaves the queue when the collector acknowledged it (202) or when it is on disk;
what neither took is counted in ``onerec_served_lost_total``.
"""

import contextlib
import fcntl
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import Counter, Gauge

MAX_BATCH = 1000
MAX_BACKOFF_S = 15.0

QUEUE = Gauge("onerec_served_queue", "Served events not yet acknowledged by the collector, in memory")
SPOOLED = Gauge("onerec_served_spooled", "Served events waiting on disk for the collector")
SENT = Counter("onerec_served_sent_total", "Served events acknowledged by the collector")
LOST = Counter("onerec_served_lost_total", "Served events that neither the collector nor the spool took", ["reason"])

log = logging.getLogger(__name__)

Event = dict[str, Any]


class Refused(RuntimeError):
    """The collector will never take this batch."""


class Unreachable(RuntimeError):
    """The collector did not take the batch; it may later."""


class Spool:
    """Events on disk as JSON lines; several processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def append(self, events: Sequence[Event]) -> None:
        """Adds the events, fsynced; raises OSError."""
        lines = "".join(json.dumps(event) + "\n" for event in events)
        with self._locked(), (self._folder / "spool.jsonl").open("a") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def files(self) -> list[Path]:
        """What is to be sent again; later events go to a new file."""
        with self._locked():
            current = self._folder / "spool.jsonl"
            if current.exists():
                current.rename(self._folder / f"sending-{uuid.uuid4().hex}.jsonl")
        return sorted(self._folder.glob("sending-*.jsonl"))

    def count(self) -> int:
        """How many events are on disk."""
        return sum(len(path.read_bytes().splitlines()) for path in self._folder.glob("*.jsonl"))


class ServedLog:
    """Takes served events without blocking and delivers them from a thread of its own."""

    def __init__(self, url: str, token: str, spool: Path, *, capacity: int = 200_000) -> None:
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=httpx.Timeout(5.0, connect=1.0)
        )
        self._spool = Spool(spool)
        self._queue: queue.Queue[Event] = queue.Queue(capacity)
        self._queued, self._lock = 0, threading.Lock()
        self._spooled = self._spool.count()
        self._backoff_s, self._retry_at = 0.0, 0.0
        self._closing = threading.Event()
        SPOOLED.set(self._spooled)
        self._thread = threading.Thread(target=self._work, name="served-log", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Events in memory that the collector has not acknowledged."""
        return self._queued

    @property
    def spooled(self) -> int:
        """Events on disk that the collector has not acknowledged."""
        return self._spooled

    def add(self, events: Sequence[Event]) -> None:
        """Queues the events; those that find no room are counted as lost."""
        for event in events:
            self._count(1)
            try:
                self._queue.put_nowait(event)
            except queue.Full:
                self._count(-1)
                LOST.labels("queue full").inc()

    def _count(self, change: int) -> None:
        # Counted apart from the queue: a batch in the thread's hands is in neither place, but not yet delivered.
        with self._lock:
            self._queued += change
            QUEUE.set(self._queued)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits until the collector has acknowledged everything, spooled events too; False when time ran out."""
        deadline = time.monotonic() + timeout_s
        while self.queued or self.spooled:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Sends what is queued, spools what the collector does not take, and ends the thread."""
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _work(self) -> None:
        while True:
            batch = self._take()
            if batch:
                self._deliver(batch)
            elif self._closing.is_set():
                return
            if self._spooled and not self._waiting_to_retry():
                self._resend()

    def _take(self) -> list[Event]:
        """Up to MAX_BATCH events; an empty list when none came within a moment."""
        batch: list[Event] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._queue.get(timeout=0.001 if self._closing.is_set() else 0.05))
            while len(batch) < MAX_BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _deliver(self, batch: list[Event]) -> None:
        try:
            if self._waiting_to_retry():
                self._keep(batch)
            else:
                self._send(batch)
        except Unreachable as error:
            self._back_off(error)
            self._keep(batch)
        finally:
            self._count(-len(batch))

    def _send(self, events: Sequence[Event]) -> None:
        """Posts a batch, in halves when it is refused, so that one bad event loses only itself; raises Unreachable."""
        try:
            self._post(events)
        except Refused as error:
            if len(events) > 1:
                self._send(events[: len(events) // 2])
                self._send(events[len(events) // 2 :])
                return
            LOST.labels("refused").inc()
            log.error("lost a served event: %s", error)

    def _post(self, events: Sequence[Event]) -> None:
        try:
            response = self._client.post("/v1/events", json={"events": list(events)})
        except httpx.HTTPError as error:
            raise Unreachable(f"{self._client.base_url} does not answer ({type(error).__name__})") from error
        if response.status_code == 202:
            SENT.inc(len(events))
            self._backoff_s, self._retry_at = 0.0, 0.0
            return
        answer = f"{self._client.base_url} answered {response.status_code}: {response.text[:300]}"
        if response.status_code in (400, 413, 422):
            raise Refused(answer)
        raise Unreachable(answer)

    def _waiting_to_retry(self) -> bool:
        return time.monotonic() < self._retry_at

    def _back_off(self, error: Unreachable) -> None:
        if not self._backoff_s:
            log.warning("served events go to disk until the collector takes them: %s", error)
        self._backoff_s = min(max(2 * self._backoff_s, 0.25), MAX_BACKOFF_S)
        self._retry_at = time.monotonic() + self._backoff_s

    def _keep(self, batch: list[Event]) -> None:
        try:
            self._spool.append(batch)
        except OSError as error:
            LOST.labels("spool").inc(len(batch))
            log.error("lost %d served events: the spool cannot be written (%s)", len(batch), error)
        else:
            self._spooled += len(batch)
            SPOOLED.set(self._spooled)

    def _resend(self) -> None:
        try:
            for path in self._spool.files():
                self._resend_file(path)
        except Unreachable as error:
            self._back_off(error)
            return
        self._spooled = self._spool.count()
        SPOOLED.set(self._spooled)
        if not self._spooled:
            log.info("the collector has taken every spooled served event")

    def _resend_file(self, path: Path) -> None:
        # A crash here sends some lines twice; exposure ids make that harmless.
        events = _parse(path.read_text().splitlines())
        for start in range(0, len(events), MAX_BATCH):
            self._send(events[start : start + MAX_BATCH])
        path.unlink(missing_ok=True)


def _parse(lines: Sequence[str]) -> list[Event]:
    """The events of a spool file; a line torn by a crash is counted as lost."""
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            LOST.labels("torn line").inc()
            log.error("lost a served event: a spooled line was torn: %.80s", line)
    return events
