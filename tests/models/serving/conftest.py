"""Model servers as people run them: ``python -m models.serving`` against real object storage and Valkey."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from features.intake.events import InvalidBatch, parse
from features.storage import Storage


class Collector(ThreadingHTTPServer):
    """A stand-in that validates with the collector's own rules and answers ``status`` when told to."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.events: list[dict[str, Any]] = []
        self.posts = 0
        self.status = 202
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts += 1
        status = self.server.status
        if self.headers["Authorization"] != "Bearer server-token":
            status = 401
        elif status == 202:
            try:
                self.server.events += msgspec.to_builtins(parse(body))
            except InvalidBatch:
                status = 422
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def new_collector() -> Iterator[Callable[..., Collector]]:
    """Starts stand-in collectors that end with the test."""
    made: list[Collector] = []

    def make(port: int = 0) -> Collector:
        made.append(Collector(port))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@dataclass
class ModelServer:
    """A running server process."""

    process: subprocess.Popen
    url: str
    grpc: str
    log: Path
    collector: Collector
    storage: Storage
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def infer(
        self, users: list[str], model: str = "onerec", inputs: list | None = None, **parameters: Any
    ) -> httpx.Response:
        tensors = [{"name": "user_id", "datatype": "BYTES", "shape": [len(users)], "data": users}, *(inputs or [])]
        return self.client.post(f"/v2/models/{model}/infer", json={"inputs": tensors, "parameters": parameters})

    def status(self) -> dict[str, Any]:
        return self.client.get("/onerec/status").json()

    def wait(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 30
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def serving(self, version: str, model: str = "onerec") -> None:
        self.wait(lambda: self.status()["models"][model]["version"] == version)


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def model_server(folder: Path, storage: Storage, environment: dict[str, str], *models: str) -> Iterator[ModelServer]:
    """Runs a server until the block ends; ``environment`` holds ONEREC_ values by their lower-case names."""
    http, grpc = _ports(2)
    collector = Collector()
    values = {
        "bucket": storage.bucket,
        "s3_endpoint": storage.endpoint,
        "home": str(folder / "home"),
        "collector_url": collector.url,
        "server_token": "server-token",
    } | environment
    command = [sys.executable, "-m", "models.serving", "--port", str(http), "--grpc_port", str(grpc), "--threads", "1"]
    command += [argument for model in models for argument in ("--model", model)]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **{f"ONEREC_{name.upper()}": value for name, value in values.items()}},
        )
    try:
        yield ModelServer(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", log, collector, storage)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        collector.stop()


@pytest.fixture(scope="module")
def keys(seaweedfs: Any, valkey: tuple[str, int, str]) -> dict[str, str]:
    """Credentials and addresses of the session's real servers, as ONEREC_ values."""
    host, port, password = valkey
    return {
        "s3_access_key": seaweedfs.access_key,
        "s3_secret_key": seaweedfs.secret_key,
        "redis": f"{host}:{port}",
        "redis_password": password,
    }


@pytest.fixture(scope="session")
def start_model_server() -> Callable[..., Any]:
    """``with start_model_server(folder, storage, environment, "onerec=production") as server``."""
    return model_server
