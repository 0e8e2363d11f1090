"""The collector as a process of its own: killed, and its object store stopped, in the middle of the traffic."""

import random
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks import intake_servers
from benchmarks.intake_servers import Server, object_store
from features.intake import exposures
from features.settings import Settings
from features.storage import Storage, connect
from pipelines.processes import free_ports

DAY = datetime(2022, 5, 1, tzinfo=UTC)
T0 = int(DAY.timestamp() * 1000)
SERVER = {"Authorization": "Bearer server"}


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
def weed(tmp_path: Path) -> Iterator[tuple[Server, Settings]]:
    """An object store that may be stopped, and the settings that name it."""
    with object_store(tmp_path) as running:
        yield running


@pytest.fixture
def storage(weed: tuple[Server, Settings]) -> Storage:
    return connect(weed[1])


@pytest.fixture
def collector(weed: tuple[Server, Settings], tmp_path: Path) -> Iterator[tuple[Server, str]]:
    (port,) = free_ports(1)
    server = intake_servers.collector(tmp_path, port, weed[1])
    server.start()
    yield server, f"http://127.0.0.1:{port}"
    server.stop()


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


def suffer(kills: int, weed: Server, collector: tuple[Server, str], storage: Storage) -> None:
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
    weed: tuple[Server, Settings], collector: tuple[Server, str], storage: Storage
) -> None:
    suffer(1, weed[0], collector, storage)


@pytest.mark.long
def test_many_kills_lose_nothing(
    weed: tuple[Server, Settings], collector: tuple[Server, str], storage: Storage
) -> None:
    suffer(15, weed[0], collector, storage)


def test_sigterm_under_load_with_a_suspended_object_store_keeps_the_log(
    weed: tuple[Server, Settings], collector: tuple[Server, str], storage: Storage, tmp_path: Path
) -> None:
    """S3 takes connections and never answers: batches are accepted all the same, and the collector ends in time."""
    process, url = collector
    weed[0].send(signal.SIGSTOP)
    sender = Sender(url)
    time.sleep(0.5)
    process.send(signal.SIGTERM)
    assert process.child
    assert process.child.wait(30) in (0, -signal.SIGTERM)
    assert len(sender.acked) > 100
    assert list((tmp_path / "wal").glob("*.wal"))
    weed[0].send(signal.SIGCONT)
    process.start()
    sender.stop()
    flush(url)
    check(storage, sender)
    assert list((tmp_path / "wal").glob("*.wal")) == []


def test_a_disk_that_takes_no_more_is_answered_with_503_until_there_is_room(
    weed: tuple[Server, Settings], collector: tuple[Server, str], storage: Storage, tmp_path: Path
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
    stored = exposures.read_events(storage, "impression", None, None).column("exposure_id").to_pylist()
    assert stored == ["later"]
