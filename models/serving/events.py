"""Served events on their way to the collector: bounded, off the request path, spooled to disk when it is away.

A generated slot with its log-probabilities is training data (OneRec-V2, arXiv 2508.20900, 3.1.2 needs the
probability at exposure), so KServe's InferenceLogger, which drops on failure, will not do. Delivery is at least once
with idempotent ids: a batch leaves the queue when the collector acknowledged it (202) or when it is on disk
(``models.serving.spool``). Queue and spool have limits; what neither took is counted in ``onerec_served_lost_total``.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import orjson
from prometheus_client import Counter, Gauge

from models.serving.spool import Event, Spool, SpoolFull, read

MAX_BATCH = 1000
MAX_BACKOFF_S = 15.0
CAPACITY = 200_000
"""Events in memory, about 200 MB."""
SPOOL_BYTES = 2_000_000_000
"""Some 8 million events: hours of a busy server."""

QUEUE = Gauge("onerec_served_queue", "Served events not yet acknowledged by the collector, in memory")
SPOOLED = Gauge("onerec_served_spooled", "Served events waiting on disk for the collector")
SENT = Counter("onerec_served_sent_total", "Served events acknowledged by the collector")
LOST = Counter("onerec_served_lost_total", "Served events that neither the collector nor the spool took", ["reason"])

log = logging.getLogger(__name__)


class Refused(RuntimeError):
    """The collector will never take this batch."""


class Unreachable(RuntimeError):
    """The collector did not take the batch; it may later."""


class ServedLog:
    """Takes served events without blocking and delivers them from a thread of its own."""

    def __init__(
        self, url: str, token: str, spool: Path, *, capacity: int = CAPACITY, spool_bytes: int = SPOOL_BYTES
    ) -> None:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(5.0, connect=1.0))
        self._spool = Spool(spool, spool_bytes)
        self._capacity = capacity
        self._queue: queue.SimpleQueue[Sequence[Event]] = queue.SimpleQueue()
        self._queued, self._lock = 0, threading.Lock()
        self._spooled = self._spool.count()
        self._backoff_s, self._retry_at = 0.0, 0.0
        self._losing = ""
        self._closing = threading.Event()
        QUEUE.set_function(lambda: self._queued)
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
        """Queues the events of one answer; those that find no room are counted as lost."""
        with self._lock:
            taken = events[: max(self._capacity - self._queued, 0)]
            self._queued += len(taken)
        if taken:
            self._queue.put(taken)
        if len(taken) < len(events):
            self._lose(len(events) - len(taken), "queue full", f"{self._capacity} wait in memory")

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits until the collector has acknowledged everything, spooled events too; False when time ran out."""
        deadline = time.monotonic() + timeout_s
        while self.queued or self.spooled:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Sends what is queued, spools what the collector does not take at once, and ends the thread."""
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _work(self) -> None:
        while True:
            closing = self._closing.is_set()  # read first: a wait that ran out may have missed what came at its end
            batch = self._take()
            if batch:
                self._deliver(batch)
            elif closing:
                return
            if self._spooled and not self._waiting_to_retry():
                self._resend()

    def _take(self) -> list[Event]:
        """Some MAX_BATCH events; an empty list when none came within a moment."""
        batch: list[Event] = []
        with contextlib.suppress(queue.Empty):
            batch.extend(self._queue.get(timeout=0.001 if self._closing.is_set() else 0.05))
            while len(batch) < MAX_BATCH:
                batch.extend(self._queue.get_nowait())
        return batch

    def _deliver(self, batch: list[Event]) -> None:
        for events in _chunks(batch):
            try:
                self._send_or_keep(events)
            except Exception as error:  # the thread must outlive any single event
                self._lose(len(events), "error", f"{type(error).__name__}: {error}")
            finally:
                with self._lock:
                    self._queued -= len(events)

    def _send_or_keep(self, events: Sequence[Event]) -> None:
        if self._waiting_to_retry():
            self._keep(events)
            return
        try:
            self._send(events)
        except Unreachable as error:
            self._back_off(error)
            self._keep(events)

    def _send(self, events: Sequence[Event]) -> None:
        """Posts a batch, in halves when it is refused, so that one bad event loses only itself; raises Unreachable."""
        try:
            self._post(events)
        except Refused as error:
            if len(events) > 1:
                self._send(events[: len(events) // 2])
                self._send(events[len(events) // 2 :])
                return
            self._lose(1, "refused", str(error))

    def _post(self, events: Sequence[Event]) -> None:
        try:
            response = self._client.post("/v1/events", content=orjson.dumps({"events": list(events)}))
        except httpx.HTTPError as error:
            raise Unreachable(f"{self._client.base_url} does not answer ({type(error).__name__})") from error
        if response.status_code == 202:
            SENT.inc(len(events))
            self._backoff_s, self._retry_at, self._losing = 0.0, 0.0, ""
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
        # A server that stops tries once and no more: the disk keeps the rest for the next start.
        self._retry_at = float("inf") if self._closing.is_set() else time.monotonic() + self._backoff_s

    def _keep(self, events: Sequence[Event]) -> None:
        try:
            self._spool.append(events)
        except SpoolFull as error:
            self._lose(len(events), "spool full", str(error))
        except OSError as error:
            self._lose(len(events), "spool", f"the spool cannot be written ({error})")
        else:
            self._spooled += len(events)
            SPOOLED.set(self._spooled)

    def _lose(self, events: int, reason: str, detail: str) -> None:
        """Counts lost events; a log line when they begin to be lost, not one for each."""
        LOST.labels(reason).inc(events)
        if self._losing != reason:
            log.error("losing served events, %s: %s", reason, detail)
        self._losing = reason

    def _resend(self) -> None:
        """Sends the oldest segment of the spool: one at a time, so that new events do not wait behind all of it."""
        try:
            segments = self._spool.segments()
            sent = self._resend_segment(segments[0]) if segments else 0
        except Unreachable as error:
            self._back_off(error)
            return
        except OSError as error:
            self._back_off(Unreachable(f"the spool cannot be read ({error})"))
            return
        # Counted anew only where other processes sharing the folder have made the sum wrong.
        left = max(self._spooled - sent, 0) if len(segments) > 1 else 0
        self._spooled = left or self._spool.count()
        SPOOLED.set(self._spooled)
        if not self._spooled:
            log.info("the collector has taken every spooled served event")

    def _resend_segment(self, segment: Path) -> int:
        """How many lines it had; raises Unreachable."""
        # A crash here sends some lines twice; exposure ids make that harmless.
        events, torn = read(segment)
        if torn:
            self._lose(torn, "torn line", f"{torn} lines of {segment.name} were torn by a crash")
        for part in _chunks(events):
            self._send(part)
        segment.unlink(missing_ok=True)
        return len(events) + torn


def _chunks(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    return (events[start : start + MAX_BATCH] for start in range(0, len(events), MAX_BATCH))
