"""Load for ``benchmarks.intake``: a process of its own that posts prebuilt batches over kept-alive connections.

Requests are byte strings made before the clock starts, and answers are read just as far as their status line, so that
the generator takes little of the processor it shares with the collector; what it takes is reported. Every connection
has one batch in flight and sends it again until it is answered 202. Events carry the ids ``<connection>-<batch>-<n>``,
so that who knows the acknowledged batches knows the acknowledged events.
Left out: TLS, HTTP pipelining.
"""

import asyncio
import contextlib
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any, cast

from benchmarks.load_loop import loop_factory

BATCH = b"@@@@@@@@"
"""Where the eight digits of the batch number go."""
CLIENTS = 16
_WAIT_S = 0.05


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is sent and for how long."""

    port: int
    token: str
    seconds: float
    clients: int = CLIENTS
    body_bytes: int = 16_000
    time_ms: int
    """Event time of the first event."""
    think_s: float = 0.0
    """Pause of each client between an answer and its next batch."""


@dataclass
class Tally:
    """What one connection saw."""

    batches: int = 0
    sent: int = 0
    """Batches sent at least once."""
    refused: int = 0
    broken: int = 0
    seconds: list[float] = field(default_factory=list)


def pair(client: int, number: str, row: int, time_ms: int) -> list[dict[str, Any]]:
    """One shown item as impression and feedback."""
    name: dict[str, Any] = {"exposure_id": f"{client:02d}-{number}-{row:03d}", "user_id": f"user-{client}-{row % 50}"}
    at = time_ms + row * 1000
    shown: dict[str, Any] = {
        "kind": "impression",
        **name,
        "request_id": f"request-{client:02d}-{number}",
        "item_id": f"video-{row}",
    }
    shown |= {"position": row % 10, "event_time": at, "source": "onerec", "duration_ms": 9000}
    told: dict[str, Any] = {
        "kind": "feedback",
        **name,
        "event_time": at + 500,
        "play_ms": 7000 + row,
        "long_view": True,
    }
    return [shown, told]


def template(client: int, body_bytes: int, time_ms: int) -> tuple[bytes, int]:
    """A body just below ``body_bytes`` with the batch number left open, and how many pairs it holds."""
    events: list[dict[str, Any]] = []
    rows = 0
    while len(json.dumps({"events": events}, separators=(",", ":"))) < body_bytes - 400:
        events += pair(client, BATCH.decode(), rows, time_ms)
        rows += 1
    return json.dumps({"events": events}, separators=(",", ":")).encode(), rows


class _Clock:
    """When to end: after so many seconds, or on SIGTERM."""

    def __init__(self, seconds: float) -> None:
        self.until = time.perf_counter() + seconds
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop)

    def over(self) -> bool:
        return time.perf_counter() > self.until

    def stop(self) -> None:
        self.until = 0.0


class _Connection(asyncio.Protocol):
    """One client: sends, waits for the answer, sends the next."""

    def __init__(self, client: int, config: LoadConfig, tally: Tally, clock: _Clock) -> None:
        self.config, self.tally, self.clock = config, tally, clock
        body, self.rows = template(client, config.body_bytes, config.time_ms)
        head = f"POST /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {config.token}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        # Split where the number goes, so that a request costs one join.
        self.parts = (head.encode() + body).split(BATCH)
        self.request = b""
        self.begun = 0.0
        self.closed = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.closed.clear()
        if self.request:
            self._send()
        else:
            self._next()

    def _next(self) -> None:
        assert self.transport
        self.request = b""
        if self.transport.is_closing():
            return
        if self.clock.over():
            self.transport.close()
            return
        self.request = (b"%08d" % self.tally.sent).join(self.parts)
        self.tally.sent += 1
        self._send()

    def _send(self) -> None:
        assert self.transport
        self.begun = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 "):
            return  # the body, which may come by itself
        if data.startswith(b"HTTP/1.1 202"):
            self.tally.seconds.append(time.perf_counter() - self.begun)
            self.tally.batches += 1
            if self.config.think_s:
                asyncio.get_running_loop().call_later(self.config.think_s, self._next)
            else:
                self._next()
            return
        self.tally.refused += 1
        if self.clock.over():
            assert self.transport
            self.transport.close()
        else:
            asyncio.get_running_loop().call_later(_WAIT_S, self._again)

    def _again(self) -> None:
        if self.transport and not self.transport.is_closing():
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self.tally.broken += error is not None or not self.clock.over()
        self.closed.set()


async def _client(number: int, config: LoadConfig, tally: Tally, clock: _Clock) -> int:
    connection = _Connection(number, config, tally, clock)
    loop = asyncio.get_running_loop()
    while not clock.over():
        with contextlib.suppress(OSError):
            await loop.create_connection(lambda: connection, "127.0.0.1", config.port)
            await connection.closed.wait()
        if not clock.over():
            await asyncio.sleep(_WAIT_S)
    return connection.rows


async def _run(config: LoadConfig) -> dict[str, Any]:
    tallies = [Tally() for _ in range(config.clients)]
    begun, used = time.perf_counter(), time.process_time()
    clock = _Clock(config.seconds)
    rows = await asyncio.gather(*(_client(n, config, tallies[n], clock) for n in range(config.clients)))
    took = time.perf_counter() - begun
    latencies = sorted(second for tally in tallies for second in tally.seconds)
    return {
        "batches": len(latencies),
        "events": sum(2 * tally.batches * count for tally, count in zip(tallies, rows, strict=True)),
        "seconds": took,
        "core_share": (time.process_time() - used) / took,
        "refused": sum(tally.refused for tally in tallies),
        "broken": sum(tally.broken for tally in tallies),
        "p50_ms": 1e3 * latencies[len(latencies) // 2] if latencies else 0.0,
        "p99_ms": 1e3 * latencies[int(len(latencies) * 0.99)] if latencies else 0.0,
        "clients": [
            {"acked": tally.batches, "sent": tally.sent, "rows": count}
            for tally, count in zip(tallies, rows, strict=True)
        ],
    }


def main() -> None:
    """Reads a LoadConfig as JSON from the first argument, prints the outcome as JSON."""
    config = LoadConfig(**json.loads(sys.argv[1]))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(json.dumps(runner.run(_run(config))))
