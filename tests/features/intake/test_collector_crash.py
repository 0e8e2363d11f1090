"""The collector as a process of its own: killed, and its object store stopped, in the middle of the traffic."""

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pydantic import SecretStr

from features.intake import exposures
from features.settings import Settings
from features.storage import Storage, connect

DAY = datetime(2022, 5, 1, tzinfo=UTC)
T0 = int(DAY.timestamp() * 1000)
SERVER = {"Authorization": "Bearer server"}
ROOT = Path(__file__).parents[3]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, f"{what} is not ready"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


class Process:
    """A process that is started and stopped again and again on the same data."""

    def __init__(self, command: list[str], env: dict[str, str], ready_url: str, log: Path) -> None:
        self.command, self.env, self.ready_url, self.log = command, env, ready_url, log
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            env = {**os.environ, **self.env}
            self.child = subprocess.Popen(self.command, env=env, cwd=ROOT, stdout=log, stderr=log)
        wait_for(lambda: answers(self.ready_url), self.command[0])

    def send(self, number: int) -> None:
        assert self.child
        self.child.send_signal(number)

    def stop(self, number: int = signal.SIGKILL) -> int:
        self.send(number)
        assert self.child
        return self.child.wait(30)


class Sender:
    """Posts batches from several threads until stopped, the same batch until it is acknowledged."""

    def __init__(self, url: str, threads: int = 3) -> None:
        self.url = url
        self.acked: set[str] = set()
        self.sent: set[str] = set()
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, thread: int) -> None:
        batch = 0
        with httpx.Client(headers=SERVER, timeout=10) as client:
            while not self._stop.is_set():
                names = [f"{thread}-{batch}-{n}" for n in range(40)]
                self.sent.update(names)
                self._post(client, {"events": [event for name in names for event in events(name)]}, names)
                batch += 1
                time.sleep(0.01)

    def _post(self, client: httpx.Client, body: dict[str, Any], names: list[str]) -> None:
        while not self._stop.is_set():
            try:
                answer = client.post(f"{self.url}/v1/events", json=body)
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            if answer.status_code == 202:
                self.acked.update(names)
                return
            self.errors.append(answer.text)
            time.sleep(0.02)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def events(name: str) -> list[dict[str, Any]]:
    time_ms = T0 + hash(name) % 3_600_000
    event = {"exposure_id": name, "request_id": "r", "user_id": "u", "item_id": "i", "position": 0}
    event |= {"event_time": time_ms}
    return [
        {"kind": "served", **event, "sid": [1], "model_version": "m", "log_probs": [-1.0]},
        {"kind": "impression", **event, "source": "onerec", "duration_ms": 9000},
        {"kind": "feedback", "exposure_id": name, "user_id": "u", "event_time": time_ms + 1, "play_ms": 5},
    ]


@pytest.fixture
def weed(tmp_path: Path) -> Iterator[tuple[Process, Storage, dict[str, str]]]:
    """An object store that may be stopped, its bucket, and the environment that names both."""
    flags = [
        f"{name}.{kind}" for name in ("master", "volume", "filer", "s3", "admin") for kind in ("port", "port.grpc")
    ]
    ports = dict(zip(flags, free_ports(len(flags)), strict=True))
    key, secret, endpoint = "test", secrets.token_urlsafe(24), f"127.0.0.1:{ports['s3.port']}"
    (tmp_path / "s3").mkdir()
    command = [str(Path(sys.prefix) / "bin/weed"), "mini", f"-dir={tmp_path / 's3'}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=200", "-master.volumeSizeLimitMB=64"]
    command += [f"-{flag}={port}" for flag, port in ports.items()]
    env = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "HOME": str(tmp_path)}
    process = Process(command, env, f"http://{endpoint}/healthz", tmp_path / "weed.log")
    process.start()
    config = Settings(
        s3_endpoint=endpoint, s3_access_key=SecretStr(key), s3_secret_key=SecretStr(secret), bucket="events"
    )
    names = {"S3_ENDPOINT": endpoint, "S3_ACCESS_KEY": key, "S3_SECRET_KEY": secret, "BUCKET": "events"}
    names |= {"CLIENT_TOKEN": "client", "SERVER_TOKEN": "server"}
    yield process, connect(config), {f"ONEREC_{name}": value for name, value in names.items()}
    process.stop()
    for port in ports.values():
        for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            socket_file.unlink(missing_ok=True)


@pytest.fixture
def collector(weed: tuple[Process, Storage, dict[str, str]], tmp_path: Path) -> Iterator[tuple[Process, str]]:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "features.intake.collector", "--port", str(port), "--no-features"]
    command += ["--wal", str(tmp_path / "wal")]
    process = Process(command, {**weed[2], "PYTHONPATH": str(ROOT)}, f"{url}/readyz", tmp_path / "collector.log")
    process.start()
    yield process, url
    process.stop()


def flush(url: str) -> None:
    answer = httpx.post(f"{url}/v1/flush", params={"timeout": 60}, headers=SERVER, timeout=70)
    assert answer.status_code == 200, answer.text


def check(storage: Storage, sender: Sender) -> None:
    """Everything acknowledged is stored, nothing is made up, and the join has every exposure once."""
    assert sender.errors == []
    assert len(sender.acked) > 100
    for kind in ("served", "impression", "feedback"):
        stored = exposures.read_events(storage, kind, None, None).column("exposure_id").to_pylist()
        assert sender.acked <= set(stored) <= sender.sent
    summary = exposures.compact(storage, DAY, DAY + timedelta(days=1))
    assert (summary["served_without_impression"], summary["impressions_without_served"]) == (0, 0)
    rows = exposures.read(storage).select(["exposure_id", "play_ms", "log_probs"]).to_pydict()
    assert len(set(rows["exposure_id"])) == len(rows["exposure_id"]) == summary["exposures"]
    assert sender.acked <= set(rows["exposure_id"])
    assert set(rows["play_ms"]) == {5}
    assert None not in rows["log_probs"]


def suffer(kills: int, weed: Process, collector: tuple[Process, str], storage: Storage) -> None:
    process, url = collector
    sender = Sender(url)
    try:
        for round_ in range(kills):
            time.sleep(random.uniform(0.3, 0.7))
            if round_ % 3 == 0:
                weed.stop()
            elif round_ % 3 == 1:
                weed.send(signal.SIGSTOP)
            process.stop()
            process.start()
            time.sleep(random.uniform(0.1, 0.5))
            if round_ % 3 == 0:
                weed.start()
            elif round_ % 3 == 1:
                weed.send(signal.SIGCONT)
    finally:
        sender.stop()
    flush(url)
    check(storage, sender)


def test_a_kill_and_an_absent_object_store_lose_nothing(
    weed: tuple[Process, Storage, dict[str, str]], collector: tuple[Process, str]
) -> None:
    suffer(1, weed[0], collector, weed[1])


@pytest.mark.long
def test_many_kills_lose_nothing(weed: tuple[Process, Storage, dict[str, str]], collector: tuple[Process, str]) -> None:
    suffer(15, weed[0], collector, weed[1])


def test_sigterm_under_load_with_a_suspended_object_store_keeps_the_log(
    weed: tuple[Process, Storage, dict[str, str]], collector: tuple[Process, str], tmp_path: Path
) -> None:
    """S3 takes connections and never answers: batches are accepted all the same, and the collector ends in time."""
    process, url = collector
    weed[0].send(signal.SIGSTOP)
    sender = Sender(url)
    time.sleep(0.5)
    process.stop(signal.SIGTERM)
    assert process.child
    assert process.child.returncode in (0, -signal.SIGTERM)
    assert len(sender.acked) > 100
    assert list((tmp_path / "wal").glob("*.wal"))
    weed[0].send(signal.SIGCONT)
    process.start()
    sender.stop()
    flush(url)
    check(weed[1], sender)
    assert list((tmp_path / "wal").glob("*.wal")) == []


def test_a_disk_that_takes_no_more_is_answered_with_503_until_there_is_room(
    weed: tuple[Process, Storage, dict[str, str]], collector: tuple[Process, str], tmp_path: Path
) -> None:
    """The kernel refuses writes beyond a limit; room is made while the collector runs."""
    process, url = collector
    weed[0].stop()
    assert process.child
    body = {"events": events("small")}
    used = sum(path.stat().st_size for path in (tmp_path / "wal").iterdir())
    psutil.Process(process.child.pid).rlimit(psutil.RLIMIT_FSIZE, (used + 100, -1))
    with httpx.Client(headers=SERVER, timeout=10) as client:
        answer = client.post(f"{url}/v1/events", json=body)
        assert (answer.status_code, answer.json()["reason"]) == (503, "disk_full")
        psutil.Process(process.child.pid).rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
        assert client.post(f"{url}/v1/events", json={"events": events("later")}).status_code == 202
    process.stop()
    weed[0].start()
    process.start()
    flush(url)
    stored = exposures.read_events(weed[1], "impression", None, None).column("exposure_id").to_pylist()
    assert stored == ["later"]
