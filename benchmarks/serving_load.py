"""Load for ``benchmarks.serving``: a process of its own that asks a model server over HTTP, open-loop or closed-loop.

Open-loop: requests arrive by a Poisson process whatever the server does, and latency counts from the *intended* start,
so that a slow server cannot slow the clock it is measured with (no coordinated omission). Closed-loop (``rate`` 0):
so many connections each send when they were answered; it finds the capacity. Requests are byte strings and answers are
read just as far as their status line and length, so that the generator takes little of the processor it shares with the
server; what it takes is reported. ``verify`` reads every answer: it must name one version, also in its exposure ids.
Left out: TLS, HTTP pipelining.
"""

import asyncio
import json
import signal
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import msgspec
import numpy as np

from benchmarks.load_loop import loop_factory
from features.schema import exposure_id

NUMBER = b"@@@@@@@@"
"""Where the eight digits of the request's number go."""
HEALTH_EVERY_S = 0.05
_PAUSE_S = 0.05
"""Closed-loop: how long a refused client waits."""
clock = time.perf_counter
"""Not the event loop's own time, which uvloop keeps in whole milliseconds."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is asked, how often and for how long."""

    port: int
    seconds: float
    rate: float = 0.0
    """Requests a second, by a Poisson process; 0 is closed-loop."""
    connections: int = 64
    """Closed-loop: requests in flight. Open-loop: how many connections may be open at most."""
    warm_s: float = 0.0
    """Requests meant for the first so many seconds are not counted."""
    path: str = "/v2/models/onerec/infer"
    beam: int = 128
    num_items: int = 10
    users: int = 256
    time_ms: int = 0
    """The requests' clock."""
    timeout_s: float = 12.0
    seed: int = 0
    verify: bool = False
    health: bool = False
    """Ask for liveness every 50 ms beside the load."""
    slices: int = 1
    """Percentiles are also given for so many equal parts of the time."""


def template(config: LoadConfig, user: int) -> list[bytes]:
    """A request for one user as bytes, split where the request's number goes."""
    tensors: list[dict[str, Any]] = [
        {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": [f"user-{user}"]},
        {"name": "request_id", "datatype": "BYTES", "shape": [1], "data": [f"load-{NUMBER.decode()}"]},
    ]
    if config.time_ms:
        tensors.append({"name": "time_ms", "datatype": "INT64", "shape": [1], "data": [config.time_ms]})
    parameters = {"num_items": config.num_items, "beam_width": config.beam}
    body = json.dumps({"inputs": tensors, "parameters": parameters}, separators=(",", ":")).encode()
    head = f"POST {config.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return (f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body).split(NUMBER)


@dataclass
class Tally:
    """What became of the requests."""

    sent: int = 0
    intended: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    """An HTTP status, 0 for a broken connection, -1 for no answer in time."""
    late: list[float] = field(default_factory=list)
    """How long after its intended start a request was written."""
    retry_after: int = 0
    without_features: int = 0
    """Answers that say they were given without the user's features."""
    versions: Counter[str] = field(default_factory=Counter)
    mixed: int = 0
    """Answers that do not name exactly one version."""
    health: list[float] = field(default_factory=list)

    def note(self, intended: float, now: float, status: int) -> None:
        """One request ended."""
        self.intended.append(intended)
        self.latency.append(now - intended)
        self.status.append(status)


class _Connection(asyncio.Protocol):
    """One connection: at most one request in flight."""

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.transport: asyncio.Transport | None = None
        self.intended, self.number = 0.0, -1
        self.buffer = bytearray()
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def ask(self, intended: float, number: int) -> None:
        """Sends a request."""
        assert self.transport
        self.intended, self.number = intended, number
        self.buffer.clear()
        now = clock()
        self.load.tally.late.append(now - intended)
        self.transport.write((b"%08d" % number).join(self.load.templates[number % len(self.load.templates)]))
        self.timer = self.load.loop.call_later(self.load.config.timeout_s, self._timed_out)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(self.buffer) - end - 4 < length:
            return
        status = int(head[9:12])
        if status in (429, 503):
            self.load.tally.retry_after += b"\r\nretry-after:" in head
        elif status == 200:
            self.load.tally.without_features += b"features_unavailable" in self.buffer
            if self.load.config.verify:
                self.load.check(self.number, bytes(self.buffer[end + 4 :]))
        self._ended(status)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.number >= 0:
            self._ended(0)
        else:
            self.load.lost(self)

    def _timed_out(self) -> None:
        transport, self.transport = self.transport, None
        self._ended(-1)
        if transport:
            transport.abort()

    def _ended(self, status: int) -> None:
        if self.number < 0:
            return
        self.number = -1
        if self.timer:
            self.timer.cancel()
        self.load.tally.note(self.intended, clock(), status)
        self.load.ended(self)


class Load:
    """Connections, the schedule and the tally of one run."""

    def __init__(self, config: LoadConfig) -> None:
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.templates = [template(config, user) for user in range(config.users)]
        self.tally = Tally()
        self.idle: list[_Connection] = []
        self.open = 0
        self.pending: deque[tuple[float, int]] = deque()
        self.begun = self.until = 0.0
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> dict[str, Any]:
        """Asks until the time is over (or SIGTERM comes) and every request has ended."""
        self.begun = clock()
        self.until = self.begun + self.config.seconds
        self.loop.add_signal_handler(signal.SIGTERM, self._stop)
        used, began = time.process_time(), time.perf_counter()
        watch = asyncio.ensure_future(self._health()) if self.config.health else None
        await (self._open_loop() if self.config.rate else self._closed_loop())
        busy = (time.process_time() - used) / (time.perf_counter() - began)
        patience = clock() + 2 * self.config.timeout_s  # every request ends, if only by its timeout
        while len(self.tally.status) < self.tally.sent and clock() < patience:
            await asyncio.sleep(0.01)
        if watch:
            watch.cancel()
        for connection in self.idle:
            if connection.transport:
                connection.transport.close()
        config = replace(self.config, seconds=self.until - self.begun)
        return summary(config, self.tally, self.begun, busy)

    def _stop(self) -> None:
        """Asks no more, and counts until now."""
        self.until = clock()

    async def _open_loop(self) -> None:
        rng = np.random.default_rng(self.config.seed)
        count = rng.poisson(self.config.rate * self.config.seconds)
        for at in np.sort(rng.random(count)) * self.config.seconds:
            wait = self.begun + at - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            if self.begun + at > self.until:
                return
            self._ask(self.begun + float(at))

    async def _closed_loop(self) -> None:
        for _ in range(self.config.connections):
            self._ask(clock())
        while clock() < self.until:
            await asyncio.sleep(0.01)

    def _ask(self, intended: float) -> None:
        number, self.tally.sent = self.tally.sent, self.tally.sent + 1
        if self.idle:
            self.idle.pop().ask(intended, number)
            return
        self.pending.append((intended, number))
        self._connect_more()

    def _connect_more(self) -> None:
        if self.pending and self.open < self.config.connections:
            self.open += 1
            task = asyncio.ensure_future(self._connect())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _connect(self) -> None:
        try:
            _, connection = await self.loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.config.port)
        except OSError:
            self.open -= 1
            if self.pending:
                self.tally.note(self.pending.popleft()[0], clock(), 0)
            return
        self._give(cast(_Connection, connection))

    def ended(self, connection: _Connection) -> None:
        """A request ended: the connection takes the next one, if there is one."""
        if not self.config.rate and clock() < self.until:
            if self.tally.status[-1] == 200:
                self._ask(clock())
            else:
                self.loop.call_later(_PAUSE_S, lambda: self._ask(clock()))
        if connection.transport is None or connection.transport.is_closing():
            self.open -= 1
            self._connect_more()
        else:
            self._give(connection)

    def lost(self, connection: _Connection) -> None:
        """An idle connection was closed by the server."""
        if connection in self.idle:
            self.idle.remove(connection)
            self.open -= 1

    def _give(self, connection: _Connection) -> None:
        if self.pending:
            connection.ask(*self.pending.popleft())
        else:
            self.idle.append(connection)

    def check(self, number: int, body: bytes) -> None:
        """Reads an answer: its version, and that its exposure ids are of that version."""
        answer = msgspec.json.decode(body)
        version = answer["model_version"]
        named = {version, answer["parameters"]["model_version"]}
        found = next(output["data"] for output in answer["outputs"] if output["name"] == "exposure_ids")
        expected = [exposure_id(f"load-{number:08d}", version, slot) for slot in range(len(found))]
        self.tally.mixed += len(named) != 1 or found != expected
        self.tally.versions[version] += 1

    async def _health(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.config.port)
        try:
            while True:
                began = clock()
                writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]))
                self.tally.health.append(clock() - began)
                await asyncio.sleep(HEALTH_EVERY_S)
        finally:
            writer.close()


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """p50, p99 and the worst, in ms; 0 where there is nothing."""
    if not len(seconds):
        return {"p50_ms": 0.0, "p99_ms": 0.0, "max_ms": 0.0}
    p50, p99, worst = 1000 * np.quantile(seconds, (0.5, 0.99, 1.0))
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(worst)}


def summary(config: LoadConfig, tally: Tally, begun: float, core_share: float) -> dict[str, Any]:
    """The outcome as JSON: counts by status and the percentiles of the answered."""
    at = np.array(tally.intended) - begun
    latency, status = np.array(tally.latency), np.array(tally.status, int)
    kept = (at >= config.warm_s) & (at < config.seconds)
    done = at + latency
    answered = (status == 200) & (done >= config.warm_s) & (done < config.seconds)
    good = kept & (status == 200)
    edges = np.linspace(config.warm_s, config.seconds, config.slices + 1)
    parts = [good & (at >= low) & (at < high) for low, high in pairwise(edges)]
    return {
        "rate": config.rate,
        "seconds": config.seconds - config.warm_s,
        "asked": int(kept.sum()),
        "statuses": {str(code): int((kept & (status == code)).sum()) for code in np.unique(status[kept])},
        "answered_per_second": float(answered.sum() / (config.seconds - config.warm_s)),
        **percentiles(latency[good]),
        "refused_p99_ms": percentiles(latency[kept & (status != 200)])["p99_ms"],
        "slices": [{"answered": int(part.sum()), **percentiles(latency[part])} for part in parts],
        "late_p99_ms": percentiles(np.array(tally.late))["p99_ms"],
        "retry_after": tally.retry_after,
        "without_features": tally.without_features,
        "versions": dict(tally.versions),
        "mixed": tally.mixed,
        "health": percentiles(np.array(tally.health)),
        "core_share": core_share,
    }


async def _run(config: LoadConfig) -> dict[str, Any]:
    return await Load(config).run()


def main() -> None:
    """Reads a LoadConfig as JSON from the first argument, prints the outcome as JSON."""
    config = LoadConfig(**json.loads(sys.argv[1]))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(json.dumps(runner.run(_run(config))))


if __name__ == "__main__":
    main()
