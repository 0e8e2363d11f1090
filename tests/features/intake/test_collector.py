import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from starlette.testclient import TestClient

from features import offline
from features.intake import exposures
from features.intake.api import Api
from features.intake.child import online_apply
from features.intake.collector import main
from features.intake.intake import Intake, IntakeConfig
from features.intake.upload import Apply, Update, Upload
from features.intake.wal import WalLimits
from features.online import OnlineFeatures
from features.settings import Settings, settings
from features.storage import Storage, connect

TIME = 1_651_363_200_123
CLIENT = {"Authorization": "Bearer client"}
SERVER = {"Authorization": "Bearer server"}


def impression(name: str, **changes: Any) -> dict[str, Any]:
    event = {"kind": "impression", "exposure_id": name, "request_id": "r", "user_id": "u", "item_id": "i"}
    return event | {"position": 0, "event_time": TIME, "source": "onerec", "duration_ms": 9000} | changes


def feedback(name: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "feedback", "exposure_id": name, "user_id": "u", "event_time": TIME + 5, "play_ms": 7} | changes


def served(name: str) -> dict[str, Any]:
    event = {"kind": "served", "exposure_id": name, "request_id": "r", "user_id": "u", "item_id": "i", "position": 0}
    return event | {"sid": [1, 2], "model_version": "m", "log_probs": [-1.0, -2.0], "event_time": TIME - 5}


class Updates:
    """Stands in for the updater; fails as often as it is told to."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.seen: list[str] = []

    def apply(self, impressions: pa.Table, feedback: pa.Table, since: float) -> None:
        if self.failures:
            raise self.failures.pop()
        assert since <= time.time()
        self.seen += impressions.column("exposure_id").to_pylist() + feedback.column("exposure_id").to_pylist()


def config(folder: Path, **changes: Any) -> IntakeConfig:
    return IntakeConfig(**{"wal": folder, "limits": WalLimits(segment_seconds=0.05), "drain_s": 0.2} | changes)


def down() -> Storage:
    return connect(Settings(s3_endpoint="127.0.0.1:1"))


class Collectors:
    """Starts collectors in this process, all on the same log, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: TestClient | None = None

    def __call__(self, storage: Storage, apply: Apply | None = None, **changes: Any) -> TestClient:
        intake = Intake(config(self.folder, **changes), Upload(storage), Update(apply) if apply else None)
        self.running = TestClient(Api(intake, client_token="client", server_token="server"))
        return self.running.__enter__()

    def stop(self) -> None:
        if self.running:
            self.running.__exit__(None, None, None)
        self.running = None


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Collectors]:
    collectors = Collectors(tmp_path / "wal")
    yield collectors
    collectors.stop()


def post(client: TestClient, *events: Any, headers: dict[str, str] = CLIENT) -> Any:
    return client.post("/v1/events", json={"events": list(events)}, headers=headers)


def metric(client: TestClient, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"onerec_collector_{name}")]
    return float(lines[0].rsplit(" ", 1)[1])


def test_events_become_exposures(make: Collectors, s3: Storage) -> None:
    updates = Updates()
    client = make(s3, updates.apply)
    assert post(client, impression("a"), feedback("a", like=True), impression("b")).json() == {"accepted": 3}
    assert post(client, served("a"), headers=SERVER).status_code == 202
    assert post(client, impression("a")).status_code == 202
    answer = client.post("/v1/flush?timeout=30", headers=CLIENT)
    assert (answer.status_code, answer.json()["flushed"]) == (200, True)
    assert sorted(updates.seen) == ["a", "a", "a", "b"]

    (hour,) = {key.rsplit("/", 1)[0] for key in s3.keys("events/kind=impression/")}
    assert hour == "events/kind=impression/date=2022-05-01/hour=00"
    events = {kind: exposures.read_events(s3, kind, None, None) for kind in ("served", "impression", "feedback")}
    rows = exposures.join(*events.values()).exposures.to_pylist()
    assert [(row["exposure_id"], row["sid"], row["like"], row["play_ms"]) for row in rows] == [
        ("a", [1, 2], True, 7),
        ("b", None, False, 0),
    ]
    assert metric(client, 'events_accepted_total{kind="impression"}') == 3
    assert metric(client, "oldest_unuploaded_seconds") == 0


def test_only_the_server_may_say_what_was_served(make: Collectors) -> None:
    client = make(down())
    assert post(client, impression("a"), served("a")).status_code == 403
    assert post(client, impression("a", log_probs=[-1.0])).status_code == 422
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer clien"}, {"Authorization": "client"}):
        assert post(client, impression("a"), headers=headers).status_code == 401
        assert client.post("/v1/flush", headers=headers).status_code == 401
    assert metric(client, 'events_accepted_total{kind="impression"}') == 0


def test_nothing_of_a_bad_batch_is_accepted(make: Collectors, s3: Storage) -> None:
    client = make(s3)
    answer = post(client, impression("a"), impression("b", position="first"))
    assert (answer.status_code, answer.json()["index"]) == (422, 1)
    assert "position" in answer.json()["error"]
    assert client.post("/v1/events", content=b"{", headers=CLIENT).status_code == 422
    assert post(client, *[impression("a")] * 1001).status_code == 413
    assert client.post("/v1/events", content=b" " * (4 * 1024 * 1024 + 1), headers=CLIENT).status_code == 413
    chunks = (b" " * 1024 * 1024 for _ in range(5))
    assert client.post("/v1/events", content=chunks, headers=CLIENT).status_code == 413
    assert post(client).json() == {"accepted": 0}
    assert client.post("/v1/flush", headers=SERVER).status_code == 200
    assert list(s3.keys("")) == []
    assert metric(client, 'requests_refused_total{reason="too_large"}') == 3


def test_a_full_log_answers_429_until_there_is_room(make: Collectors) -> None:
    client = make(down(), limits=WalLimits(segment_seconds=0.05, segment_bytes=2000), budget_bytes=2000)
    answers = [post(client, impression(str(n))) for n in range(15)]
    codes = [answer.status_code for answer in answers]
    assert codes == sorted(codes)
    assert set(codes) == {202, 429}
    assert int(answers[-1].headers["Retry-After"]) > 0
    assert "budget is 2000" in answers[-1].json()["error"]
    assert client.get("/healthz").status_code == 200


def test_flush_says_what_is_down_and_nothing_is_lost(make: Collectors, s3: Storage, tmp_path: Path) -> None:
    client = make(down())
    assert post(client, impression("a"), feedback("a")).status_code == 202
    answer = client.post("/v1/flush?timeout=0.5", headers=CLIENT)
    assert (answer.status_code, answer.json()["flushed"]) == (503, False)
    assert "127.0.0.1:1" in answer.json()["error"]
    assert client.get("/readyz").json()["ready"]
    assert "127.0.0.1:1" in client.get("/readyz").json()["failing"]["upload"]
    assert metric(client, "oldest_unuploaded_seconds") > 0
    assert client.post("/v1/flush?timeout=soon", headers=CLIENT).status_code == 422
    make.stop()
    assert list((tmp_path / "wal").glob("*.wal"))

    again = make(s3)
    assert again.post("/v1/flush?timeout=30", headers=CLIENT).status_code == 200
    assert exposures.read_events(s3, "impression", None, None).num_rows == 1
    assert list((tmp_path / "wal").glob("*.wal")) == []


def test_a_dead_feature_store_does_not_stop_intake(make: Collectors, s3: Storage) -> None:
    updates = Updates()
    updates.failures = [ConnectionError("Valkey at 127.0.0.1:6379 does not answer")] * 1000
    client = make(s3, updates.apply)
    assert post(client, impression("a")).status_code == 202
    answer = client.post("/v1/flush?timeout=1", headers=CLIENT)
    assert answer.status_code == 503
    assert "Valkey" in answer.json()["error"]
    assert answer.json()["segments_left"] == {"upload": 0, "update": 1}
    assert exposures.read_events(s3, "impression", None, None).num_rows == 1
    assert metric(client, "updater_lag_seconds") > 0
    updates.failures.clear()
    assert client.post("/v1/flush?timeout=30", headers=CLIENT).status_code == 200
    assert updates.seen == ["a"]


def test_views_reach_the_feature_store_once_it_is_there(
    make: Collectors, s3: Storage, environment: Settings, valkey: tuple[str, int, str]
) -> None:
    redis.Redis(port=valkey[1], password=valkey[2]).flushall()
    client = make(s3, online_apply())
    assert post(client, impression("a"), feedback("a", like=True, user_id="u")).status_code == 202
    while client.get("/readyz").json()["failing"]["update"] is None:
        time.sleep(0.05)  # Feast takes its time to be imported
    answer = client.post("/v1/flush?timeout=2", headers=CLIENT)
    assert (answer.status_code, answer.json()["segments_left"]) == (503, {"upload": 0, "update": 1})
    assert "update fails with FeaturesUnavailable" in answer.json()["error"]
    offline.apply()
    assert client.post("/v1/flush?timeout=30", headers=CLIENT).status_code == 200
    (features,) = OnlineFeatures.connect().read(["u"], TIME + 1000)
    assert features.short is not None
    assert (features.short.item_ids.tolist(), features.short.play_ms.tolist()) == (["i"], [7])
    assert features.short == features.positive


def test_updates_are_skipped_and_counted_rather_than_fill_the_disk(make: Collectors, s3: Storage) -> None:
    updates = Updates()
    updates.failures = [ConnectionError("away")] * 1000
    limits = WalLimits(segment_seconds=0.05, segment_bytes=2000)
    client = make(s3, updates.apply, limits=limits, budget_bytes=2000, upload_linger_s=0.0)
    sent = 0
    while metric(client, "updater_skipped_events_total") == 0:
        sent += post(client, *(impression(str(n)) for n in range(8))).status_code == 202
    assert sent > 1
    updates.failures = [ValueError("a row it cannot fold")] * 1000
    answer = client.post("/v1/flush?timeout=60", headers=CLIENT)
    assert answer.json()["updates_skipped"] == 8 * sent


def test_a_client_that_gives_up_does_not_harm_the_log(tmp_path: Path) -> None:
    intake = Intake(config(tmp_path), Upload(down()))
    future = intake.log.append(json.dumps({"events": [impression("a")]}).encode())
    assert not future.cancel()
    future.result(5)
    intake.close()
    assert not any(thread.name.startswith("wal") for thread in threading.enumerate())


def test_it_does_not_start_without_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [("", "s", "ONEREC_CLIENT_TOKEN is empty"), ("c", "", "ONEREC_SERVER_TOKEN is empty"), ("x", "x", "equals")]
    for client, server, message in cases:
        monkeypatch.setenv("ONEREC_CLIENT_TOKEN", client)
        monkeypatch.setenv("ONEREC_SERVER_TOKEN", server)
        settings.cache_clear()
        assert main(["--wal", str(tmp_path / "wal"), "--port", "1", "--no-features"]) == 2
        assert message in capsys.readouterr().err
    settings.cache_clear()
    assert not (tmp_path / "wal").exists()


def test_it_does_not_start_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONEREC_CLIENT_TOKEN", "c")
    monkeypatch.setenv("ONEREC_SERVER_TOKEN", "s")
    settings.cache_clear()
    (tmp_path / "file").write_text("mine")
    for wal in (tmp_path / "file", tmp_path / "file" / "wal", Path("/proc/onerec")):
        assert main(["--wal", str(wal), "--port", "1", "--no-features"]) == 2
        said = capsys.readouterr().err
        assert f"the collector cannot start: {wal} cannot be used: " in said
        assert "Errno" not in said
    settings.cache_clear()


def test_clocks_that_are_far_off_are_counted_or_refused(make: Collectors) -> None:
    far = int((time.time() + 10 * 365 * 86400) * 1000)
    now = int(time.time() * 1000)
    client = make(down())
    events = [impression("a", event_time=now), impression("b", event_time=far), impression("c")]
    assert post(client, *events).status_code == 202
    assert metric(client, "events_skewed_total") == 2
    make.stop()
    client = make(down(), refuse_skewed=True)
    answer = post(client, *events)
    assert (answer.status_code, answer.json()["reason"]) == (422, "clock")
    assert "2 events" in answer.json()["error"]
    assert post(client, events[0]).status_code == 202
    assert metric(client, 'requests_refused_total{reason="clock"}') == 1


def test_a_full_disk_is_named_and_nothing_of_it_is_acknowledged(
    make: Collectors, s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make(s3)
    assert post(client, impression("before")).status_code == 202
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        answer = post(client, impression("during"))
        assert (answer.status_code, answer.json()["reason"]) == (503, "disk_full")
        assert "No space left" in answer.json()["error"]
        assert int(answer.headers["Retry-After"]) > 0
        assert client.get("/readyz").status_code == 503
    assert post(client, impression("after")).status_code == 202
    assert client.get("/readyz").status_code == 200
    assert client.post("/v1/flush?timeout=30", headers=CLIENT).status_code == 200
    stored = exposures.read_events(s3, "impression", None, None).column("exposure_id").to_pylist()
    assert sorted(stored) == ["after", "before"]
    assert metric(client, 'requests_refused_total{reason="disk_full"}') == 1


def test_refusals_are_counted_by_their_reason(make: Collectors) -> None:
    client = make(down())
    bad = {"play_ms": -1}, {"user_id": "x" * 10_000}, {"like": "yes"}, {"event_time": TIME // 1000}, {"colour": 1}
    bodies = [
        ("malformed", b'{"events": ['),
        *(("invalid", json.dumps({"events": [feedback("a", **changes)]}).encode()) for changes in bad),
        ("too_large", b" " * (4 * 1024 * 1024 + 1)),
    ]
    for reason, body in bodies:
        answer = client.post("/v1/events", content=body, headers=CLIENT)
        assert answer.json()["reason"] == reason
    assert metric(client, 'requests_refused_total{reason="malformed"}') == 1
    assert metric(client, 'requests_refused_total{reason="invalid"}') == len(bad)
    assert metric(client, 'requests_refused_total{reason="too_large"}') == 1


def test_feedback_on_an_unknown_exposure_is_kept_and_joined_when_its_impression_comes(
    make: Collectors, s3: Storage
) -> None:
    client = make(s3)
    day = datetime(2022, 5, 1, tzinfo=UTC)
    assert post(client, feedback("a", dislike=True)).status_code == 202
    client.post("/v1/flush?timeout=30", headers=CLIENT)
    summary = exposures.compact(s3, day, day + timedelta(days=1))
    assert (summary["exposures"], summary["feedback_without_impression"]) == (0, 1)
    assert post(client, impression("a")).status_code == 202
    client.post("/v1/flush?timeout=30", headers=CLIENT)
    exposures.compact(s3, day, day + timedelta(days=1))
    assert exposures.read(s3).column("dislike").to_pylist() == [True]


def test_updates_that_were_acknowledged_and_not_applied_are_applied_after_a_restart(
    make: Collectors, s3: Storage
) -> None:
    """Upload may be done with a segment that the features still need; it is kept, and repeated uploads do no harm."""
    updates = Updates()
    updates.failures = [ConnectionError("away")] * 1000
    client = make(s3, updates.apply, upload_linger_s=0.0)
    assert post(client, impression("a"), feedback("a")).status_code == 202
    while metric(client, 'events_uploaded_total{kind="impression"}') == 0:
        time.sleep(0.02)
    make.stop()
    updates.failures.clear()
    client = make(s3, updates.apply)
    assert client.post("/v1/flush?timeout=30", headers=CLIENT).status_code == 200
    assert updates.seen == ["a", "a"]
    day = datetime(2022, 5, 1, tzinfo=UTC)
    assert exposures.compact(s3, day, day + timedelta(days=1))["exposures"] == 1
    assert list(make.folder.glob("*.wal")) == []
