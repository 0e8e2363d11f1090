"""The HTTP surface of the collector, an ASGI application.

``POST /v1/events`` is handled without a framework in between, because it is the one path whose cost counts; all else
is Starlette. Every refusal names its reason, the same word that ``onerec_collector_requests_refused_total`` counts.
Left out: TLS and time limits on headers (the ingress has both), rate limits per client (429 comes from the disk
budget alone).
"""

import asyncio
import contextlib
import hmac
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from features.intake import openapi
from features.intake.events import MAX_BODY_BYTES, Event, InvalidBatch, Served, parse, times_ms
from features.intake.intake import Intake
from features.intake.openapi import FLUSH_TIMEOUT_S, LONGEST_FLUSH_S
from features.intake.wal import WalFailed, WalFull
from features.intake.worker import UPLOAD

RETRY_AFTER_S = 5
BODY_TIMEOUT_S = 30.0

_OTHER_METHODS = ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


class Refused(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, reason: str, error: str, **details: Any) -> None:
        super().__init__(error)
        self.status = status
        self.reason = reason
        self.body = {"error": error, "reason": reason, **details}

    def headers(self) -> dict[str, str]:
        """Besides the content: when to try again, how to authenticate, that the connection is of no more use."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER_S)}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        # The rest of the body is not read, so the connection cannot be used again.
        return {"Connection": "close"} if self.status in (408, 413) else {}


class Api:
    """The routes; raises ValueError when a token is empty or both are equal."""

    def __init__(self, intake: Intake, *, client_token: str, server_token: str) -> None:
        check_tokens(client_token, server_token)
        self.intake = intake
        self._client, self._server = client_token.encode(), server_token.encode()
        self._others = Starlette(
            routes=[
                Route("/v1/events", _method_not_allowed, methods=list(_OTHER_METHODS)),
                Route("/v1/flush", self.flush, methods=["POST"]),
                Route("/healthz", self.healthz),
                Route("/readyz", self.readyz),
                Route("/metrics", self.metrics),
                Route("/openapi.json", _openapi),
                Route("/docs", _docs),
            ],
            exception_handlers={Refused: self._refused},
            lifespan=self._lifespan,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] != "/v1/events" or scope["method"] != "POST":
            await self._others(scope, receive, send)
            return
        try:
            answer = b'{"accepted":%d}' % await self.events(scope["headers"], receive)
        except Refused as refusal:
            await self._answer(refusal)(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def events(self, headers: Sequence[tuple[bytes, bytes]], receive: Receive) -> int:
        """Takes a batch; returns how many events are on disk now. Raises Refused."""
        begun = time.perf_counter()
        fields = dict(headers)
        from_server = self._is_server(fields.get(b"authorization", b""))
        body = await _body(fields.get(b"content-length", b""), receive)
        events = _parsed(body)
        kinds = Counter(map(type, events))
        if not from_server and Served in kinds:
            raise Refused(403, "forbidden", "served events come from the model server alone; use the server token")
        self._check_clock(events)
        if events:
            await self._accept(body, kinds)
        self.intake.telemetry.ack_seconds.observe(time.perf_counter() - begun)
        return len(events)

    def _check_clock(self, events: list[Event]) -> None:
        """Counts events whose time is far from now; refuses them when the collector was told to."""
        config = self.intake.config
        now, most = time.time() * 1000, config.skew.total_seconds() * 1000
        times = times_ms(events)
        if not times or (min(times) > now - most and max(times) < now + most):
            return
        # Replayed logs lie in the past as a whole: then there is no need to look at each.
        far = len(times) if max(times) < now - most else sum(abs(time_ms - now) > most for time_ms in times)
        if config.refuse_skewed:
            error = f"{far} events lie more than {config.skew} from now; mend the clock of the sender"
            raise Refused(422, "clock", error)
        self.intake.telemetry.skewed.inc(far)

    async def _accept(self, body: bytes, kinds: Counter[type[Event]]) -> None:
        try:
            await self.intake.accept(body, kinds)
        except WalFull as error:
            raise Refused(429, "full", f"the collector is full, send again in {RETRY_AFTER_S} s: {error}") from None
        except WalFailed as error:
            reason = "disk_full" if error.disk_full else "log_failed"
            raise Refused(503, reason, f"nothing was accepted, send again: {error}") from None

    async def flush(self, request: Request) -> Response:
        """Answers when everything accepted so far is in S3 and in the on-line features."""
        self._is_server(request.headers.get("authorization", "").encode())
        timeout = _timeout(request.query_params.get("timeout", str(FLUSH_TIMEOUT_S)))
        try:
            flushed = await self.intake.flush(timeout)
        except WalFailed as error:
            raise Refused(503, "log_failed", f"the log cannot be flushed: {error}") from None
        if flushed:
            return JSONResponse({"flushed": True, "updates_skipped": self.intake.telemetry.skipped()})
        left = {step: self.intake.backlog.segments(step) for step in self.intake.backlog.steps}
        text = f"not flushed within {timeout:g} s: {self.intake.problems()}; nothing is lost, flush again"
        raise Refused(503, "flush_timeout", text, flushed=False, segments_left=left)

    async def healthz(self, request: Request) -> Response:
        """Whether the process should go on living."""
        alive = self.intake.log.thread_alive()
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    async def readyz(self, request: Request) -> Response:
        """Whether the next batch would be accepted, and what the background workers complain about."""
        problem = self.intake.log.failure
        used = self.intake.backlog.bytes(UPLOAD)
        if problem is None and used >= self.intake.config.budget_bytes:
            problem = f"{used} bytes wait for S3, the budget is {self.intake.config.budget_bytes}"
        failing = {worker.step: worker.failure for worker in self.intake.workers}
        return JSONResponse({"ready": problem is None, "problem": problem, "failing": failing}, 503 if problem else 200)

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        return Response(self.intake.telemetry.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.intake.close)

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return self._answer(error)

    def _answer(self, refusal: Refused) -> Response:
        self.intake.telemetry.refused.labels(refusal.reason).inc()
        return JSONResponse(refusal.body, refusal.status, refusal.headers())

    def _is_server(self, authorization: bytes) -> bool:
        """Whether the sender holds the server token; refuses senders with neither."""
        scheme, _, token = authorization.partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else b""
        # Both are compared whatever the first gives: the time taken says nothing.
        is_server = hmac.compare_digest(given, self._server)
        is_client = hmac.compare_digest(given, self._client)
        if not (is_server or is_client):
            raise Refused(401, "unauthorized", "send the client or server token: 'Authorization: Bearer <token>'")
        return is_server


def check_tokens(client_token: str, server_token: str) -> None:
    """Raises ValueError when a token is empty or both are equal."""
    for name, token in (("ONEREC_CLIENT_TOKEN", client_token), ("ONEREC_SERVER_TOKEN", server_token)):
        if not token:
            raise ValueError(f"{name} is empty; the collector does not start without both tokens, set it")
    if client_token == server_token:
        raise ValueError("ONEREC_CLIENT_TOKEN equals ONEREC_SERVER_TOKEN; clients must not be able to write log_probs")


def _parsed(body: bytes) -> list[Event]:
    try:
        return parse(body)
    except InvalidBatch as error:
        raise Refused(413 if error.too_large else 422, error.kind, error.reason, index=error.index) from None


async def _body(declared: bytes, receive: Receive) -> bytes:
    """The request's body, at most MAX_BODY_BYTES, whatever its headers promise."""
    too_large = Refused(413, "too_large", f"the body is larger than {MAX_BODY_BYTES} bytes; split the batch")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > MAX_BODY_BYTES):
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "disconnected", "the client went away before its batch was whole")
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > MAX_BODY_BYTES:
                    raise too_large
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except TimeoutError:
        raise Refused(408, "slow", f"the body did not come within {BODY_TIMEOUT_S:g} s; send it again") from None


def _timeout(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= LONGEST_FLUSH_S:
        raise Refused(422, "invalid", f"timeout is {given!r}; give seconds above 0 and at most {LONGEST_FLUSH_S:g}")
    return seconds


async def _method_not_allowed(request: Request) -> Response:
    return JSONResponse({"error": "events are posted: POST /v1/events"}, 405, {"Allow": "POST"})


async def _openapi(request: Request) -> Response:
    return JSONResponse(openapi.document())


async def _docs(request: Request) -> Response:
    return HTMLResponse(openapi.page())
