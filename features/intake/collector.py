"""The event collector: ``POST /v1/events`` answers 202 only when the batch is on disk.

A batch goes through validation, the write-ahead log (``features.intake.wal``) and the answer; upload to S3 and the
on-line features follow in the background (``features.intake.upload``), and neither being down stops intake while the
disk has room. Delivery is at least once: a client that saw no 202 sends the batch again, ids make it harmless.
Run: ``python -m features.intake.collector --host 127.0.0.1 --port 8090 --wal .onerec/wal``.
Left out: TLS (the ingress has it) and rate limits per client (429 comes from the disk budget alone).
"""

import argparse
import asyncio
import contextlib
import hmac
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from features.intake.events import MAX_BODY_BYTES, InvalidBatch, parse
from features.intake.telemetry import Telemetry
from features.intake.upload import UPDATE, UPLOAD, Apply, Backlog, Worker, update, upload
from features.intake.wal import WalFailed, WalFull, WalLimits, WriteAheadLog
from features.settings import settings
from features.storage import Storage, connect

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5
FLUSH_TIMEOUT_S, LONGEST_FLUSH_S = 60.0, 600.0


@dataclass(frozen=True, kw_only=True)
class IntakeConfig:
    """Where the log lies and how much of it may wait."""

    wal: Path
    limits: WalLimits = field(default_factory=WalLimits)
    budget_bytes: int = 2 * 1024**3
    """Disk for rows that are not uploaded; as much again for rows that only the on-line features miss."""
    upload_linger_s: float = 10.0
    drain_s: float = 5.0
    """How long a shutdown waits for S3 and the features; the rest stays in the log."""

    def __post_init__(self) -> None:
        if self.budget_bytes < self.limits.segment_bytes:
            raise ValueError(
                f"the budget of {self.budget_bytes} bytes is below one segment of {self.limits.segment_bytes}; raise it"
            )


class Intake:
    """The log, its workers and its counters: everything behind the HTTP surface."""

    def __init__(self, config: IntakeConfig, storage: Storage, apply: Apply | None = None) -> None:
        """Opens the log and starts the workers; without ``apply`` there are no on-line features to update."""
        self.config = config
        self.backlog = Backlog((UPLOAD, UPDATE) if apply else (UPLOAD,))
        self.log = WriteAheadLog(config.wal, self.backlog.add, config.limits)
        self.telemetry = Telemetry(self.log, self.backlog)
        self.workers = [self._uploader(storage)] + ([self._updater(apply)] if apply else [])
        for worker in self.workers:
            worker.start()

    def _uploader(self, storage: Storage) -> Worker:
        return Worker(
            backlog=self.backlog,
            step=UPLOAD,
            work=lambda decoded, since: upload(storage, decoded),
            linger=self.config.upload_linger_s,
            on_failure=self.telemetry.upload_failures.inc,
            on_done=self.telemetry.count_uploaded,
        )

    def _updater(self, apply: Apply) -> Worker:
        return Worker(
            backlog=self.backlog,
            step=UPDATE,
            work=lambda decoded, since: update(apply, decoded, since),
            skip_above_bytes=self.config.budget_bytes,
            on_failure=self.telemetry.update_failures.inc,
            on_skip=self.telemetry.count_skipped,
        )

    async def accept(self, body: bytes, events: Sequence[dict[str, Any]]) -> None:
        """Returns once ``body``, which holds ``events``, is durable; raises WalFull or WalFailed."""
        used = self.backlog.bytes(UPLOAD) + self.log.open_bytes()
        if used + len(body) > self.config.budget_bytes:
            raise WalFull(f"{used} bytes wait for S3, the budget is {self.config.budget_bytes}: {self.problems()}")
        await asyncio.wrap_future(self.log.append(body))
        for kind, count in Counter(event["kind"] for event in events).items():
            self.telemetry.accepted.labels(kind).inc(count)

    async def flush(self, timeout: float) -> bool:
        """Waits until everything accepted so far is in S3 and in the on-line features; False on timeout."""
        until = time.monotonic() + timeout
        with self.backlog.hurry():
            try:
                await asyncio.wait_for(asyncio.wrap_future(self.log.seal()), timeout)
            except TimeoutError:
                return False
            left = max(0.0, until - time.monotonic())
            return await asyncio.to_thread(self.backlog.wait_done, self.backlog.newest(), left)

    def problems(self) -> str:
        """What the workers complain about, for error messages."""
        found = [f"{worker.step} fails with {worker.failure}" for worker in self.workers if worker.failure]
        return "; ".join(found) or "the workers are busy"

    def close(self) -> None:
        """Seals the log, gives the workers a moment, stops them; what is left is replayed by the next start."""
        with self.backlog.hurry():
            self.log.close()
            # What already fails will hardly be mended by waiting.
            failing = any(worker.failure for worker in self.workers)
            self.backlog.wait_done(self.backlog.newest(), min(self.config.drain_s, 1.0 if failing else math.inf))
        for worker in self.workers:
            worker.stop(timeout=1.0)


class _Refused(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, reason: str, error: str, **details: Any) -> None:
        super().__init__(error)
        self.status = status
        self.reason = reason
        self.body = {"error": error, **details}


def create_app(intake: Intake, *, client_token: str, server_token: str) -> Starlette:
    """The HTTP surface; raises ValueError when a token is empty or both are equal."""
    _check_tokens(client_token, server_token)
    surface = _Surface(intake, client_token, server_token)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(intake.close)

    return Starlette(
        routes=[
            Route("/v1/events", surface.events, methods=["POST"]),
            Route("/v1/flush", surface.flush, methods=["POST"]),
            Route("/healthz", surface.healthz),
            Route("/readyz", surface.readyz),
            Route("/metrics", surface.metrics),
        ],
        exception_handlers={_Refused: surface.refused},
        lifespan=lifespan,
    )


@dataclass(frozen=True)
class _Surface:
    """The routes."""

    intake: Intake
    client_token: str
    server_token: str

    async def events(self, request: Request) -> Response:
        from_server = self._authenticate(request)
        body = await _body(request)
        try:
            events = parse(body)
        except InvalidBatch as error:
            status, reason = (413, "too_large") if error.too_large else (422, "invalid")
            raise _Refused(status, reason, error.reason, index=error.index) from None
        if not from_server and any(event["kind"] == "served" for event in events):
            raise _Refused(403, "forbidden", "served events come from the model server alone; use the server token")
        if events:
            await self._accept(body, events)
        return JSONResponse({"accepted": len(events)}, 202)

    async def _accept(self, body: bytes, events: list[dict[str, Any]]) -> None:
        try:
            await self.intake.accept(body, events)
        except WalFull as error:
            raise _Refused(429, "full", f"the collector is full, send again in {RETRY_AFTER_S} s: {error}") from None
        except WalFailed as error:
            raise _Refused(503, "log_failed", f"nothing was accepted, send again: {error}") from None

    async def flush(self, request: Request) -> Response:
        self._authenticate(request)
        timeout = _timeout(request.query_params.get("timeout", str(FLUSH_TIMEOUT_S)))
        if await self.intake.flush(timeout):
            return JSONResponse({"flushed": True, "updates_skipped": self.intake.telemetry.skipped()})
        left = {step: self.intake.backlog.segments(step) for step in self.intake.backlog.steps}
        error = f"not flushed within {timeout:g} s: {self.intake.problems()}; nothing is lost, flush again"
        raise _Refused(503, "flush_timeout", error, flushed=False, segments_left=left)

    async def healthz(self, request: Request) -> Response:
        alive = self.intake.log.thread_alive()
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    async def readyz(self, request: Request) -> Response:
        problem = self.intake.log.failure
        used = self.intake.backlog.bytes(UPLOAD)
        if problem is None and used >= self.intake.config.budget_bytes:
            problem = f"{used} bytes wait for S3, the budget is {self.intake.config.budget_bytes}"
        failing = {worker.step: worker.failure for worker in self.intake.workers}
        return JSONResponse({"ready": problem is None, "problem": problem, "failing": failing}, 503 if problem else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self.intake.telemetry.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, _Refused)
        self.intake.telemetry.refused.labels(error.reason).inc()
        headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status == 413:
            # The rest of the body is not read, so the connection cannot be used again.
            headers["Connection"] = "close"
        return JSONResponse(error.body, error.status, headers)

    def _authenticate(self, request: Request) -> bool:
        """Whether the sender holds the server token; refuses senders with neither."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        is_server = hmac.compare_digest(given, self.server_token.encode())
        is_client = hmac.compare_digest(given, self.client_token.encode())
        if not (is_server or is_client):
            raise _Refused(401, "unauthorized", "send the client or server token: 'Authorization: Bearer <token>'")
        return is_server


async def _body(request: Request) -> bytes:
    """The request's body, at most MAX_BODY_BYTES, whatever its headers promise."""
    declared = request.headers.get("content-length", "")
    size, chunks = int(declared) if declared.isdigit() else 0, []
    if size <= MAX_BODY_BYTES:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            chunks.append(chunk)
            if size > MAX_BODY_BYTES:
                break
    if size > MAX_BODY_BYTES:
        raise _Refused(413, "too_large", f"the body is larger than {MAX_BODY_BYTES} bytes; split the batch")
    return b"".join(chunks)


def _timeout(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= LONGEST_FLUSH_S:
        raise _Refused(422, "invalid", f"timeout is {given!r}; give seconds above 0 and at most {LONGEST_FLUSH_S:g}")
    return seconds


def _check_tokens(client_token: str, server_token: str) -> None:
    for name, token in (("ONEREC_CLIENT_TOKEN", client_token), ("ONEREC_SERVER_TOKEN", server_token)):
        if not token:
            raise ValueError(f"{name} is empty; the collector does not start without both tokens, set it")
    if client_token == server_token:
        raise ValueError("ONEREC_CLIENT_TOKEN equals ONEREC_SERVER_TOKEN; clients must not be able to write log_probs")


def online_apply() -> Apply:
    """``Updater.apply`` on the configured feature store, which is opened when the first events come.

    Imported here because it needs Feast; opened late because intake must start without the store.
    """
    from features.online import FeaturesUnavailable, OnlineFeatures
    from features.updater import Updater

    updater: Updater | None = None

    def apply(impressions: pa.Table, feedback: pa.Table, since: float) -> int:
        nonlocal updater
        updater = updater or Updater(OnlineFeatures.connect())
        try:
            return updater.apply(impressions, feedback, since)
        except FeaturesUnavailable:
            # Feast caches a registry, so one that was opened before `feast apply` would stay empty.
            updater.online = OnlineFeatures.connect()
            raise

    return apply


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m features.intake.collector", description="Collects events.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--wal", type=Path, required=True, metavar="DIR", help="folder of the write-ahead log")
    parser.add_argument("--budget-mb", type=int, default=2048, help="disk for events that are not uploaded yet")
    parser.add_argument("--no-features", action="store_true", help="do not update the on-line features")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the collector until SIGTERM or Ctrl-C; returns 2 when it is misconfigured."""
    options = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = settings()
    client_token, server_token = config.client_token.get_secret_value(), config.server_token.get_secret_value()
    try:
        _check_tokens(client_token, server_token)
        apply = None if options.no_features else online_apply()
        intake_config = IntakeConfig(wal=options.wal, budget_bytes=options.budget_mb * 1024**2)
        intake = Intake(intake_config, connect(config), apply)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"the collector cannot start: {error}", file=sys.stderr)
        return 2
    app = create_app(intake, client_token=client_token, server_token=server_token)
    server = uvicorn.Config(
        app, host=options.host, port=options.port, access_log=False, log_config=None, timeout_graceful_shutdown=10
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(server).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
