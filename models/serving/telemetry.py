"""What an operator sees of a model server: its metrics in one place, and one log line a request.

``Telemetry`` is one served model's view of them. Metrics are Prometheus's (``GET /metrics``); which of them alert, and
how they are drawn, is ``monitoring``'s; those of served events stand beside their code. A request's story is a
``Trace``: who asked for what, how long each stage took, how it ended. Left out: distributed tracing (the request id in
the logs of transformer and predictor ties them together).
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from prometheus_client import Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect

from models.serving.logs import REQUEST_ID

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LEGALITY_S = 60.0
MAX_REQUEST_ID = 128
CLIENT_CLOSED = 499
"""The status, in metrics and logs, of a request whose client went away."""

REQUESTS = Counter("onerec_requests_total", "Recommendation requests by outcome, an HTTP status", ["model", "status"])
REQUEST_SECONDS = Histogram(
    "onerec_request_seconds", "Answered requests, from the body to the answer", ["model"], buckets=_SECONDS
)
IN_FLIGHT = Gauge("onerec_in_flight_requests", "Requests accepted and not yet answered", ["model"])
WAITING = Gauge("onerec_waiting_rows", "Users waiting for a batch", ["model"])
BATCH_ROWS = Histogram("onerec_batch_rows", "Users per run of the model", ["model"], buckets=_POWERS)
BEAMS = Histogram("onerec_beam_width", "Beams that requests ask for", ["model"], buckets=_POWERS)
STAGE_SECONDS = Histogram(
    "onerec_stage_seconds",
    "Time of a request by stage: parse, queue, features, model, respond",
    ["model", "stage"],
    buckets=_SECONDS,
)
USERS = Counter("onerec_recommended_users_total", "Users recommended to, by flag", ["model", "flag"])
CACHE = Counter("onerec_feature_cache_total", "Contexts taken from the cache, by outcome", ["model", "outcome"])
ILLEGAL = Gauge(
    "onerec_illegal_share", "Share of unconstrained samples whose SID names no item: a health metric", ["model"]
)
REFUSED = Counter("onerec_bundle_refused_total", "Bundles refused by a model server", ["model", "version"])
LOADED = Counter("onerec_bundle_loaded_total", "Bundles put into service by a model server", ["model"])
SERVING = Gauge(
    "onerec_bundle_serving", "1 for the version a model serves now, 0 for those before", ["model", "version"]
)
MOVED = Counter("onerec_catalogue_moved_total", "Times a server applied deltas of the catalogue", ["model"])
ITEMS = Gauge("onerec_catalogue_items", "Items a model can name now, by kind", ["model", "kind"])
UNAPPLIED = Gauge("onerec_catalogue_deltas_refused", "Deltas of the version in service that are unreadable", ["model"])

log = logging.getLogger(__name__)


@dataclass
class Trace:
    """The story of one request, filled in while it is worked on; written as one log line at its end."""

    model: str
    request_id: str
    users: int = 0
    beams: int = 0
    mode: str = ""
    version: str = ""
    flags: list[str] = field(default_factory=list)
    batch_rows: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage of the request."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.took(name, time.perf_counter() - began)

    def took(self, name: str, seconds: float) -> None:
        """Notes a stage that was timed elsewhere, such as by the batch it ran in."""
        STAGE_SECONDS.labels(self.model, name).observe(seconds)
        self.milliseconds[name] = round(1000 * seconds, 2)


class Telemetry:
    """Metrics and log lines of one served model; call it from any thread."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._sampled_at = -_LEGALITY_S

    @contextmanager
    def request(self, request_id: str) -> Iterator[Trace]:
        """Everything about one request: in flight until the block ends, then counted by its outcome and logged."""
        trace, began, status = Trace(self.model, request_id), time.perf_counter(), int(HTTPStatus.OK)
        token = REQUEST_ID.set(request_id)
        IN_FLIGHT.labels(self.model).inc()
        try:
            yield trace
        except BaseException as error:
            status = status_of(error)
            raise
        finally:
            IN_FLIGHT.labels(self.model).dec()
            self._ended(trace, status, time.perf_counter() - began)
            REQUEST_ID.reset(token)

    def _ended(self, trace: Trace, status: int, seconds: float) -> None:
        REQUESTS.labels(self.model, str(status)).inc()
        if status == HTTPStatus.OK:
            REQUEST_SECONDS.labels(self.model).observe(seconds)
            if trace.beams:
                BEAMS.labels(self.model).observe(trace.beams)
        about = {name: value for name, value in vars(trace).items() if value and name != "milliseconds"}
        timing = {**trace.milliseconds, "total": round(1000 * seconds, 2)}
        log.info("request", extra={"fields": {**about, "status": status, "ms": timing}})

    def users(self, flags: list[str]) -> None:
        """Counts users answered, each with its flag ("" when all was well)."""
        for flag in flags:
            USERS.labels(self.model, flag or "none").inc()

    def batch(self, rows: int) -> None:
        """Notes how many users share a run of the model."""
        BATCH_ROWS.labels(self.model).observe(rows)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Lets the queue's gauge read ``waiting`` whenever it is scraped."""
        WAITING.labels(self.model).set_function(waiting)

    def cache(self, outcome: str, users: int = 1) -> None:
        """Counts users whose context was wanted from the cache: "hit" or "miss"."""
        CACHE.labels(self.model, outcome).inc(users)

    def legality_due(self) -> bool:
        """True once a minute: then sample a request without constraint and tell ``illegal``."""
        now = time.monotonic()
        if now - self._sampled_at < _LEGALITY_S:
            return False
        self._sampled_at = now
        return True

    def illegal(self, share: float) -> None:
        """Notes the share of unconstrained samples that name no item."""
        ILLEGAL.labels(self.model).set(share)

    def serving(self, version: str, before: str | None) -> None:
        """A version was put into service, in the place of ``before``."""
        if before and before != version:
            SERVING.labels(self.model, before).set(0)
        SERVING.labels(self.model, version).set(1)
        LOADED.labels(self.model).inc()

    def refused(self, version: str) -> None:
        """A version was not put into service."""
        REFUSED.labels(self.model, version).inc()

    def catalogue(self, counts: Mapping[str, int], problems: int) -> None:
        """What the version in service can name (``items``, ``appended``, ``blocked``), and unreadable deltas."""
        for kind in ("items", "appended", "blocked"):
            ITEMS.labels(self.model, kind).set(counts[kind])
        UNAPPLIED.labels(self.model).set(problems)

    def moved(self) -> None:
        """Deltas were applied to the version in service."""
        MOVED.labels(self.model).inc()


def status_of(error: BaseException) -> int:
    """The HTTP status that stands for ``error``: its own ``status`` when it has one."""
    own = getattr(error, "status", None)
    if isinstance(own, int):
        return int(own)
    if isinstance(error, (asyncio.CancelledError, ClientDisconnect)):
        return CLIENT_CLOSED
    known = {
        InvalidInput: HTTPStatus.BAD_REQUEST,
        ModelNotFound: HTTPStatus.NOT_FOUND,
        ModelNotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    }
    return int(next((status for kind, status in known.items() if isinstance(error, kind)), 500))


def request_id_of(payload: Any, headers: Mapping[str, str] | None) -> str:
    """The id the client gave (header ``x-request-id``, else the v2 request's ``id``) when it is printable; else new."""
    given = (headers or {}).get("x-request-id") or getattr(payload, "id", "") or ""
    if isinstance(given, str) and 1 <= len(given) <= MAX_REQUEST_ID and given.isprintable():
        return given
    return uuid.uuid4().hex
