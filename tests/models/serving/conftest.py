"""Model servers as people run them: ``python -m models.serving`` against real object storage and Valkey."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from watched import NOW_MS

from features.histories.windows import Window
from features.intake.events import InvalidBatch, parse
from features.online import UserFeatures
from features.storage import Storage
from models.bundle import Bundle
from models.serving.lookup import FeatureLookup
from models.serving.predictor import Predictor
from models.serving.recommender import Recommender
from models.serving.telemetry import Telemetry
from models.serving.transformer import OneRecModel
from pipelines.processes import free_ports


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

    def load(self, model: str = "onerec", token: str = "admin-token") -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"}
        return self.client.post(f"/v2/repository/models/{model}/load", headers=headers)

    def status(self) -> dict[str, Any]:
        return self.client.get("/onerec/status").json()

    def wait(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 120
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


@contextmanager
def model_server(folder: Path, storage: Storage, environment: dict[str, str], *models: str) -> Iterator[ModelServer]:
    """Runs a server of these models (NAME=ALIAS) and options until the block ends.

    ``environment`` holds ONEREC_ values by their lower-case names.
    """
    http, grpc = free_ports(2)
    collector = Collector()
    values = {
        "bucket": storage.bucket,
        "s3_endpoint": storage.endpoint,
        "home": str(folder / "home"),
        "collector_url": collector.url,
        "server_token": "server-token",
        "admin_token": "admin-token",
    } | environment
    command = [sys.executable, "-m", "models.serving", "--port", str(http), "--grpc_port", str(grpc), "--threads", "1"]
    # Patient with the feature store, because machines that run tests are busy ones; a later option wins.
    command += ["--feature_budget_ms", "5000"]
    command += [argument for model in models for argument in (["--model", model] if "=" in model else [model])]
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


class Fixed:
    """A source that serves one recommender, or none."""

    def __init__(self, recommender: Recommender | None, name: str = "onerec") -> None:
        self.name = name
        self.telemetry = Telemetry(name)
        self.recommender = recommender
        self.reason = "" if recommender else "alias 'production' does not exist yet"
        self.checked = 0
        self.loading = False

    def about(self) -> dict[str, Any]:
        return {"version": self.recommender.bundle.version if self.recommender else None}

    def check(self, retry_refused: bool = False) -> None:
        self.checked += 1


class Store:
    """A feature store in memory: who is in ``users`` is known; ``delay_s`` makes it slow, ``error`` breaks it."""

    def __init__(self, users: dict[str, UserFeatures]) -> None:
        self.users = users
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.reads: list[list[str]] = []

    def read(self, user_ids: list[str], times_ms: np.ndarray) -> list[UserFeatures]:
        self.reads.append(list(user_ids))
        time.sleep(self.delay_s)
        if self.error:
            raise self.error
        unknown = {"static": None, "short": None, "positive": None, "lifelong": None, "expired": (), "pushed_ms": 0}
        return [self.users.get(user_id) or UserFeatures(user_id=user_id, **unknown) for user_id in user_ids]


def user(name: str, items: list[str], seed: int = 0) -> UserFeatures:
    """A user who watched ``items`` in the last minute."""
    n, rng = len(items), np.random.default_rng(seed)
    window = Window(
        ids=np.arange(n),
        item_ids=np.array(items, object),
        times=NOW_MS - 60_000 + np.arange(n),
        play_ms=rng.integers(0, 20_000, n),
        duration_ms=rng.integers(5_000, 30_000, n),
        labels=rng.integers(0, 512, n),
    )
    static = rng.integers(0, 1024, 8)
    return UserFeatures(
        user_id=name, static=static, short=window, positive=window, lifelong=None, expired=(), pushed_ms=NOW_MS
    )


@pytest.fixture(scope="session")
def tiny_bundle(write_bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(write_bundle(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def store(tiny_bundle: Bundle) -> Store:
    """Knows the users "a", "b" and "c", of different histories."""
    items = tiny_bundle.catalogue.item_ids
    return Store({name: user(name, items[at : at + 3 + at], at) for at, name in enumerate("abc")})


@pytest.fixture
def fixed() -> type[Fixed]:
    return Fixed


@pytest.fixture
def make_user() -> Callable[..., UserFeatures]:
    return user


@pytest.fixture
def caller() -> Callable[..., OneRecModel]:
    """``caller(predictor, store, budget_s=...)``: the transformer's model around a predictor and a store."""

    def make(predictor: Any, store: Any, **options: Any) -> OneRecModel:
        lookup = FeatureLookup(lambda: store, ThreadPoolExecutor(1), **{"budget_s": 30.0, **options})
        return OneRecModel(predictor, lookup, None, Telemetry("onerec"), 30_000)

    return make


@pytest.fixture
def predictor(tiny_bundle: Bundle) -> Callable[..., Predictor]:
    """``predictor(recommender=..., limits=...)``: a predictor in this process."""

    def make(recommender: Recommender | None = None, **options: Any) -> Predictor:
        return Predictor(Fixed(recommender or Recommender(tiny_bundle)), ThreadPoolExecutor(1), **options)

    return make
