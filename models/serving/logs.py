"""Logs as JSON lines on stderr, each with the id of the request it belongs to; written by a thread of its own.

A line is {"time", "level", "logger", "message"} plus ``request_id`` inside a request, ``error`` for a traceback, and
whatever ``extra={"fields": {...}}`` adds. The thread that logs only queues: a full pipe or a slow disk must not stop
the event loop, so lines beyond ``CAPACITY`` are dropped and counted in ``onerec_log_lines_lost_total``. Left out: files
and rotation (the container runtime's or the local stack's business).
"""

import atexit
import contextlib
import json
import logging
import logging.handlers
import queue
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from prometheus_client import Counter

CAPACITY = 10_000
_PATIENCE_S = 1.0
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the current task works for; empty outside of requests and in batches, which belong to several."""
LINES_LOST = Counter("onerec_log_lines_lost_total", "Log lines dropped because they could not be written fast enough")


class JsonLines(logging.Formatter):
    """One JSON object a record, without line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; values that JSON does not know become strings."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", ""),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value != ""}, default=str)


class _Queued(logging.handlers.QueueHandler):
    """Hands records over as they are: formatting is the writing thread's work."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.request_id = getattr(record, "request_id", "") or REQUEST_ID.get()
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            LINES_LOST.inc()


class Writer(logging.handlers.QueueListener):
    """The thread that writes; ``stop`` writes what is queued, unless nobody has read for a second."""

    _sentinel: None

    def __init__(self, waiting: "queue.Queue[logging.LogRecord | None]", output: logging.Handler) -> None:
        super().__init__(waiting, output)
        self._waiting = waiting

    def stop(self) -> None:
        """Ends the thread."""
        thread, self._thread = self._thread, None
        with contextlib.suppress(queue.Full):
            self._waiting.put(self._sentinel, timeout=_PATIENCE_S)
        if thread is not None:
            thread.join(_PATIENCE_S)


def configure_logging(stream: TextIO | None = None, level: int = logging.INFO) -> Writer:
    """Sends every logger of the process through one JSON handler; what is queued is written before the process ends."""
    output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(JsonLines())
    waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(CAPACITY)
    logging.root.handlers[:] = [_Queued(waiting)]
    logging.root.setLevel(level)
    for name in list(logging.root.manager.loggerDict):  # libraries that brought handlers of their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    writer = Writer(waiting, output)
    writer.start()
    atexit.register(writer.stop)
    return writer
