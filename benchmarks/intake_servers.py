"""The servers that ``benchmarks.intake`` needs: an object store and a collector that can be killed and restarted.

``tests/features/intake/test_collector_crash.py`` kills the same.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr

from benchmarks.intake_load import LoadConfig
from features.settings import Settings
from features.storage import Storage, connect
from pipelines.processes import free_ports

DAY = datetime(2026, 1, 1, tzinfo=UTC)
T0 = int(DAY.timestamp() * 1000)
ROOT = Path(__file__).parents[1]
_PARTS = [f"{name}.{kind}" for name in ("master", "volume", "filer", "s3", "admin") for kind in ("port", "port.grpc")]
_SLOW_DISK = """
import os, sys, time
flush = os.fdatasync
def slow(file):
    flush(file)
    time.sleep({seconds})
os.fdatasync = slow
from features.intake.collector import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Server:
    """A process that is started and stopped again and again on the same data."""

    command: list[str]
    env: dict[str, str]
    ready: str
    log: Path
    child: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    def start(self) -> None:
        """Returns once it answers; raises RuntimeError with the end of its log when it does not."""
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command, env={**os.environ, **self.env}, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while not _answers(self.ready):
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.command[:3]} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def send(self, number: int) -> None:
        """Sends a signal."""
        assert self.child
        self.child.send_signal(number)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Ends it."""
        if self.child and self.child.poll() is None:
            self.child.send_signal(number)
            self.child.wait(60)


@dataclass
class Servers:
    """What runs, and how to speak to it."""

    s3: Server
    collector: Server
    storage: Storage
    port: int
    folder: Path

    def metrics(self) -> dict[str, float]:
        """The collector's own metrics by name and labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("onerec_collector_"))
        return {name: float(value) for name, value in pairs}

    def flush(self, timeout: float) -> None:
        """Returns once everything accepted is in S3."""
        url = f"http://127.0.0.1:{self.port}/v1/flush?timeout={timeout:g}"
        request = urllib.request.Request(url, method="POST", headers={"Authorization": "Bearer server"})
        urllib.request.urlopen(request, timeout=timeout + 10).close()

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time used so far by the collector, its uploader and S3."""
        assert self.collector.child
        assert self.s3.child
        process = psutil.Process(self.collector.child.pid)
        return {
            "collector": _cpu(process),
            "uploader": sum(_cpu(child) for child in process.children(recursive=True)),
            "s3": _cpu(psutil.Process(self.s3.child.pid)),
        }


@contextmanager
def servers(*, disk_ms: float = 0.0) -> Iterator[Servers]:
    """An object store and a collector in a temporary folder, both gone afterwards."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="onerec-intake-") as name, object_store(Path(name)) as (s3, store):
        folder = Path(name)
        server = collector(folder, port, store, ["--budget-mb", "8192"], disk_ms=disk_ms)
        try:
            server.start()
            yield Servers(s3=s3, collector=server, storage=connect(store), port=port, folder=folder)
        finally:
            server.stop(signal.SIGTERM)


def load(config: LoadConfig) -> dict[str, Any]:
    """Runs the load generator in a process of its own; returns what it saw."""
    return finish_load(begin_load(config))


def begin_load(config: LoadConfig) -> "subprocess.Popen[bytes]":
    """Starts the load generator."""
    code = "from benchmarks.intake_load import main; main()"
    command = [sys.executable, "-c", code, json.dumps(asdict(config))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})


def finish_load(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """Waits for the load generator; returns what it saw."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the load generator failed with {process.returncode}")
    outcome: dict[str, Any] = json.loads(output)
    return outcome


@contextmanager
def object_store(folder: Path) -> Iterator[tuple[Server, Settings]]:
    """A running SeaweedFS with its data in ``folder``, and the settings that name it; gone afterwards."""
    ports = dict(zip(_PARTS, free_ports(len(_PARTS)), strict=True))
    key, secret, endpoint = "bench", secrets.token_urlsafe(24), f"127.0.0.1:{ports['s3.port']}"
    (folder / "s3").mkdir()
    command = [str(Path(sys.prefix) / "bin/weed"), "mini", f"-dir={folder / 's3'}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=400", "-master.volumeSizeLimitMB=64"]
    command += [f"-{part}={port}" for part, port in ports.items()]
    env = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "HOME": str(folder)}
    server = Server(command, env, f"http://{endpoint}/healthz", folder / "s3.log")
    store = Settings(
        s3_endpoint=endpoint, s3_access_key=SecretStr(key), s3_secret_key=SecretStr(secret), bucket="events"
    )
    try:
        server.start()
        yield server, store
    finally:
        server.stop()
        for port in ports.values():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)


def collector(folder: Path, port: int, store: Settings, options: Sequence[str] = (), *, disk_ms: float = 0.0) -> Server:
    """A collector of the tokens "client" and "server", not started, with its log in ``folder`` and no features."""
    run = ["-c", _SLOW_DISK.format(seconds=disk_ms / 1000)] if disk_ms else ["-m", "features.intake.collector"]
    command = [sys.executable, *run, "--port", str(port), "--wal", str(folder / "wal"), "--no-features", *options]
    env = {
        "ONEREC_S3_ENDPOINT": store.s3_endpoint,
        "ONEREC_S3_ACCESS_KEY": store.s3_access_key.get_secret_value(),
        "ONEREC_S3_SECRET_KEY": store.s3_secret_key.get_secret_value(),
        "ONEREC_BUCKET": store.bucket,
        "ONEREC_CLIENT_TOKEN": "client",
        "ONEREC_SERVER_TOKEN": "server",
        "PYTHONPATH": str(ROOT),
    }
    return Server(command, env, f"http://127.0.0.1:{port}/readyz", folder / "collector.log")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
