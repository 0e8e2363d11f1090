import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.serving import spool
from models.serving.events import LOST, ServedLog


def served(number: int) -> dict:
    return {
        "kind": "served",
        "exposure_id": f"e{number}",
        "request_id": "r",
        "user_id": "u",
        "item_id": "i",
        "sid": [1, 2, 3],
        "position": 0,
        "model_version": "v",
        "log_probs": [-1.0, -2.0, -3.0],
        "event_time": 1_767_225_600_000,
    }


def ids(collector: Any) -> list[str]:
    return [event["exposure_id"] for event in collector.events]


def lost() -> float:
    return sum(s.value for family in LOST.collect() for s in family.samples if s.name.endswith("_total"))


@pytest.fixture
def collector(new_collector: Callable[..., Any]) -> Any:
    return new_collector()


def test_everything_arrives_once_in_few_batches(collector: Any, tmp_path: Path) -> None:
    log = ServedLog(collector.url, "server-token", tmp_path)
    for start in range(0, 5000, 50):
        log.add([served(i) for i in range(start, start + 50)])
    assert log.flush()
    assert ids(collector) == [f"e{i}" for i in range(5000)]
    assert collector.posts < 100
    assert (log.queued, log.spooled) == (0, 0)
    log.close()


@pytest.mark.parametrize("status", [429, 401, 503])
def test_what_the_collector_does_not_take_waits_on_disk(collector: Any, tmp_path: Path, status: int) -> None:
    collector.status = status
    before = lost()
    log = ServedLog(collector.url, "server-token", tmp_path)
    log.add([served(i) for i in range(1500)])
    assert not log.flush(0.3)
    collector.status = 202
    assert log.flush()
    assert sorted(ids(collector)) == sorted(f"e{i}" for i in range(1500))
    log.close()
    assert lost() == before


def test_events_outlive_the_process_and_a_torn_line_is_counted(new_collector, tmp_path: Path) -> None:
    away = new_collector()
    away.stop()
    log = ServedLog(away.url, "server-token", tmp_path)
    log.add([served(i) for i in range(2500)])
    log.close()
    assert sum(len(path.read_text().splitlines()) for path in tmp_path.glob("*.jsonl")) == 2500
    with (tmp_path / "spool.jsonl").open("a") as file:
        file.write(json.dumps(served(9999))[:40])
    before = lost()
    back = new_collector(away.server_port)
    log = ServedLog(back.url, "server-token", tmp_path)
    assert log.flush()
    assert set(ids(back)) == {f"e{i}" for i in range(2500)}
    assert lost() == before + 1
    log.close()


def test_a_torn_line_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    waiting = spool.Spool(tmp_path, 10**6)
    waiting.append([served(1)])
    with (tmp_path / "spool.jsonl").open("a") as file:
        file.write(json.dumps(served(2))[:40])
    waiting.append([served(3), served(4)])
    (segment,) = waiting.segments()
    events, torn = spool.read(segment)
    assert ([event["exposure_id"] for event in events], torn) == (["e1", "e3", "e4"], 1)


def test_a_full_disk_leaves_no_half_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left on device")

    waiting = spool.Spool(tmp_path, 10**6)
    waiting.append([served(1)])
    with monkeypatch.context() as broken:
        broken.setattr(spool.os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            waiting.append([served(2), served(3)])
    waiting.append([served(4)])
    (segment,) = waiting.segments()
    events, torn = spool.read(segment)
    assert ([event["exposure_id"] for event in events], torn) == (["e1", "e4"], 0)


def test_one_bad_event_loses_only_itself(collector: Any, tmp_path: Path) -> None:
    before = lost()
    log = ServedLog(collector.url, "server-token", tmp_path)
    log.add([served(i) | ({"user_id": "a\nb"} if i == 77 else {}) for i in range(200)])
    assert log.flush()
    assert sorted(ids(collector)) == sorted(f"e{i}" for i in range(200) if i != 77)
    assert lost() == before + 1
    log.close()


def test_the_spool_is_bounded_and_what_finds_no_room_is_counted(collector: Any, tmp_path: Path) -> None:
    collector.status = 503
    before = lost()
    log = ServedLog(collector.url, "server-token", tmp_path, spool_bytes=40_000)
    for start in range(0, 2000, 100):
        log.add([served(i) for i in range(start, start + 100)])
        while log.queued:
            time.sleep(0.005)
    kept = log.spooled
    assert 0 < kept < 2000
    assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) <= 40_000
    assert lost() == before + 2000 - kept
    collector.status = 202
    assert log.flush()
    assert len(ids(collector)) == kept
    log.close()


def test_a_long_spool_is_sent_in_segments_beside_new_events(
    collector: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "SEGMENT_BYTES", 20_000)
    collector.status = 503
    log = ServedLog(collector.url, "server-token", tmp_path)
    for start in range(0, 3000, 100):
        log.add([served(i) for i in range(start, start + 100)])
        while log.queued:
            time.sleep(0.001)
    assert len(list(tmp_path.glob("sending-*.jsonl"))) > 5
    collector.status = 202
    log.add([served(9999)])
    assert log.flush()
    found = ids(collector)
    assert sorted(found) == sorted([f"e{i}" for i in range(3000)] + ["e9999"])
    assert [one for one in found if one != "e9999"] == [f"e{i}" for i in range(3000)]  # oldest first
    log.close()


def test_an_answer_larger_than_a_batch_is_delivered(collector: Any, tmp_path: Path) -> None:
    log = ServedLog(collector.url, "server-token", tmp_path)
    log.add([served(i) for i in range(12_800)])
    assert log.flush()
    assert ids(collector) == [f"e{i}" for i in range(12_800)]
    assert collector.posts >= 13
    log.close()


def test_an_event_that_cannot_be_written_down_loses_only_its_batch(collector: Any, tmp_path: Path) -> None:
    before = lost()
    log = ServedLog(collector.url, "server-token", tmp_path)
    log.add([served(1) | {"log_probs": [object()]}])
    while log.queued:
        time.sleep(0.005)
    log.add([served(2)])
    assert log.flush()
    assert (ids(collector), lost() - before) == (["e2"], 1)
    log.close()


def test_closing_with_a_collector_that_does_not_answer_takes_a_moment(new_collector: Any, tmp_path: Path) -> None:
    away = new_collector()
    away.stop()
    log = ServedLog(away.url, "server-token", tmp_path)
    log.add([served(i) for i in range(50_000)])
    log.close()
    assert log.spooled == 50_000
    assert log.queued == 0


def test_what_is_added_just_before_closing_is_kept_though_the_thread_has_just_found_nothing(
    new_collector: Any, tmp_path: Path
) -> None:
    class Starved(ServedLog):
        """Whose first wait ends with nothing, and is told so only when the log is being closed."""

        waiting = threading.Event()

        def _take(self) -> list[spool.Event]:
            if self.waiting.is_set():
                return super()._take()
            self.waiting.set()
            self._closing.wait(30)
            return []

    away = new_collector()
    away.stop()
    log = Starved(away.url, "server-token", tmp_path)
    assert log.waiting.wait(30)
    log.add([served(i) for i in range(10)])
    log.close()
    assert (log.spooled, log.queued) == (10, 0)


def test_a_full_queue_loses_and_says_so(tmp_path: Path, collector: Any) -> None:
    before = lost()
    log = ServedLog(collector.url, "server-token", tmp_path, capacity=10)
    log._closing.set()
    log._thread.join()
    log.add([served(i) for i in range(25)])
    assert log.queued == 10
    assert lost() == before + 15
