"""What a user sees while something behind the server is dead: answers, each saying what it lacks."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from watched import NOW_MS, watched

from benchmarks.intake_servers import Server, object_store
from benchmarks.serving_servers import Valkey, valkey
from features.offline import apply
from features.online import OnlineFeatures
from features.storage import Storage, StorageUnavailable, connect
from models.bundle import publish, set_alias

TIME = datetime(2026, 1, 2, tzinfo=UTC)


@dataclass
class World:
    """The model server and everything behind it, each of which can be killed."""

    server: Any
    s3: Server
    online: Valkey
    storage: Storage
    versions: list[str]
    push: Any

    def ask(self) -> dict[str, Any]:
        """One request of a known user; the parameters and item ids of its answer."""
        clock = [{"name": "time_ms", "datatype": "INT64", "shape": [1], "data": [NOW_MS]}]
        answer = self.server.infer(["known"], inputs=clock, num_items=5)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        named = {output["name"]: output["data"] for output in body["outputs"]}
        assert all(named["item_ids"])
        return {**body["parameters"], **named}

    def undelivered(self) -> int:
        """Served events that no collector has acknowledged."""
        status = self.server.status()
        return int(status["served_queue"] + status["served_spooled"])

    def until(self, flags: str) -> dict[str, Any]:
        """Asks until the answer has exactly these flags."""
        deadline = time.monotonic() + 30
        while (answer := self.ask())["flags"] != flags:
            assert time.monotonic() < deadline, (answer["flags"], self.server.log.read_text()[-3000:])
            time.sleep(0.05)
        return answer


@dataclass
class Asking:
    """What users got meanwhile."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    exposures: set[str] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)


@contextmanager
def asking(world: World) -> Iterator[Asking]:
    """Two users ask all the time; at the end nobody may have failed."""
    seen, stop, lock = Asking(), threading.Event(), threading.Lock()

    def work() -> None:
        while not stop.is_set():
            try:
                answer = world.ask()
            except (AssertionError, httpx.HTTPError) as error:
                seen.failures.append(repr(error))
                continue
            with lock:
                seen.answers += 1
                seen.exposures |= set(answer["exposure_ids"])
                seen.versions.add(answer["model_version"])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen.failures == []
    assert seen.answers > 0


@pytest.fixture(scope="module")
def world(start_model_server: Any, write_bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("chaos")
    with object_store(folder) as (s3, store), valkey(folder) as online:
        config = store.model_copy(
            update={"home": folder / "home", "redis": online.address, "redis_password": online.password}
        )
        config = type(store)(**config.model_dump())
        storage = connect(config)
        storage.ensure_bucket()
        versions = [
            publish(storage, write_bundle(folder / f"b{seed}", seed=seed), data_time=TIME + timedelta(days=seed))
            for seed in range(2)
        ]
        set_alias(storage, "production", versions[0])
        apply(folder / "home" / "feast", config)
        window = watched(["i20", "i21", "i22"])

        def push(time_ms: int) -> None:
            features = OnlineFeatures.connect(folder / "home" / "feast", config)
            features.push_windows(["known"], [window], [window], np.array([time_ms]))

        push(NOW_MS - 500)
        environment = {
            "s3_access_key": config.s3_access_key.get_secret_value(),
            "s3_secret_key": config.s3_secret_key.get_secret_value(),
            "redis": online.address,
            "redis_password": online.password,
        }
        with start_model_server(folder, storage, environment, "onerec=production") as server:
            server.serving(versions[0])
            yield World(server, s3, online, storage, versions, push)


def test_valkey_killed_the_last_known_context_answers_and_says_so(world: World) -> None:
    before = world.until("")
    with asking(world):
        world.online.kill()
        without = world.until("cached_context,features_unavailable")
        assert without["item_ids"] == before["item_ids"]  # from what was known of the user
        world.online.start()
        world.until("cold_user")  # a Valkey that lost everything is not an error
        world.push(NOW_MS - 400)
        assert world.until("")["item_ids"] == before["item_ids"]


def moved(storage: Storage, version: str) -> bool:
    """Whether the alias could be moved: a server that has just started may answer before it takes writes."""
    try:
        set_alias(storage, "production", version)
    except StorageUnavailable:
        return False
    return True


def test_s3_killed_the_loaded_version_goes_on_and_the_next_one_follows_when_s3_is_back(world: World) -> None:
    with asking(world) as seen:
        world.s3.stop(signal.SIGKILL)
        world.server.wait(lambda: "does not answer" in world.server.status()["models"]["onerec"]["reason"])
        assert world.ask()["model_version"] == world.versions[0]
        world.s3.start()
        world.server.wait(lambda: moved(world.storage, world.versions[1]))
        world.server.serving(world.versions[1])
        set_alias(world.storage, "production", world.versions[0])
        world.server.serving(world.versions[0])
    assert seen.versions == set(world.versions)


def test_collector_killed_events_wait_on_disk_and_arrive(world: World) -> None:
    dead = world.server.collector
    with asking(world) as seen:
        dead.stop()
        world.server.wait(lambda: world.server.status()["served_spooled"] > 0)
        alive = type(dead)(dead.server_port)
        world.server.wait(lambda: len(alive.events) > 0)
    try:
        world.server.wait(lambda: world.undelivered() == 0)
        arrived = {event["exposure_id"] for event in dead.events + alive.events}
    finally:
        alive.stop()
    assert seen.exposures <= arrived
    metrics = world.server.client.get("/metrics").text
    assert not [line for line in metrics.splitlines() if line.startswith("onerec_served_lost_total{")]


def test_a_corrupt_bundle_is_refused_while_the_old_one_answers(world: World, write_bundle, tmp_path: Path) -> None:
    bad = publish(world.storage, write_bundle(tmp_path / "bad", seed=9), data_time=TIME)
    key = f"models/onerec/{bad}/sids.parquet"
    world.storage.put(key, world.storage.get(key)[:-7])
    with asking(world) as seen:
        set_alias(world.storage, "production", bad)
        world.server.wait(lambda: "is corrupt" in world.server.status()["models"]["onerec"]["reason"])
        reason = world.server.status()["models"]["onerec"]["reason"]
        set_alias(world.storage, "production", world.versions[0])
        world.server.wait(lambda: world.server.status()["models"]["onerec"]["reason"] == "")
    assert "sids.parquet" in reason
    assert f"{world.versions[0]} stays in service" in reason
    assert seen.versions == {world.versions[0]}


def test_everything_away_at_once_still_answers(world: World) -> None:
    """The collector is dead already."""
    world.until("")
    with asking(world):
        world.online.kill()
        world.s3.stop(signal.SIGKILL)
        world.until("cached_context,features_unavailable")
        assert world.server.client.get("/v2/models/onerec/ready").status_code == 200
        assert world.server.client.get("/v2/health/live").status_code == 200
    world.s3.start()
    world.online.start()
