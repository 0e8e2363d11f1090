import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from features import offline
from features.intake import exposures
from features.intake.child import BadData, Child, ChildFailed, online_apply
from features.intake.upload import Update, Upload
from features.intake.wal import Segment, WalLimits, WriteAheadLog
from features.online import OnlineFeatures
from features.settings import Settings
from features.storage import Storage

TIME = 1_651_363_200_123


def events(*names: str, kind: str = "impression") -> bytes:
    shown = {"request_id": "r", "item_id": "i", "position": 0, "source": "onerec", "duration_ms": 9000}
    told = {"play_ms": 7, "like": True}
    row: dict[str, Any] = shown if kind == "impression" else told
    same = {"kind": kind, "user_id": "u", **row}
    return json.dumps(
        {"events": [{**same, "exposure_id": name, "event_time": TIME + at} for at, name in enumerate(names)]}
    ).encode()


def logged(folder: Path, *bodies: bytes) -> list[Segment]:
    segments: list[Segment] = []
    with WriteAheadLog(folder, segments.append, WalLimits(segment_seconds=100)) as log:
        for body in bodies:
            log.append(body).result(5)
    return segments


def stored(storage: Storage) -> list[str]:
    return sorted(exposures.read_events(storage, "impression", None, None).column("exposure_id").to_pylist())


def test_a_child_uploads_and_is_started_again_when_it_dies(environment: Settings, s3: Storage, tmp_path: Path) -> None:
    (segment,) = logged(tmp_path, events("a", "b"), events("a", kind="feedback"), b"no batch")
    child = Child("upload", tmp_path)
    outcome = child([segment])
    assert (outcome.events, outcome.rejected) == ({"impression": 2, "feedback": 1, "served": 0}, 1)
    assert stored(s3) == ["a", "b"]

    with pytest.raises(ChildFailed, match="FileNotFoundError"):
        child([Segment(tmp_path / "gone.wal", 9, 9, 0.0)])
    (process,) = (each for each in psutil.Process().children() if "features.intake.child" in each.cmdline())
    process.kill()
    process.wait()
    assert child([segment]) == outcome
    assert stored(s3) == ["a", "b"], "equal rows have equal keys"
    child.close()
    with pytest.raises(ChildFailed, match="was ended"):
        child([segment])


def test_a_child_ends_with_its_parent_and_the_next_waits_for_it(environment: Settings, tmp_path: Path) -> None:
    """The parent is another process, which is killed while its child is busy (here: suspended)."""
    (segment,) = logged(tmp_path, events("a"))
    code = """
import sys, time
from pathlib import Path
from features.intake.child import Child
from features.intake.wal import Segment
child = Child("upload", Path(sys.argv[1]))
child([Segment(Path(sys.argv[2]), 1, 1, 0.0)])
print(child._process.pid, flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(segment.path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    orphan = psutil.Process(int(parent.stdout.readline()))
    orphan.suspend()
    parent.kill()
    parent.wait()
    successor = Child("upload", tmp_path)
    finished = threading.Event()
    thread = threading.Thread(target=lambda: (successor([segment]), finished.set()))
    thread.start()
    assert not finished.wait(1), "the folder is still locked"
    os.kill(orphan.pid, signal.SIGCONT)
    assert finished.wait(30)
    thread.join()
    successor.close()
    orphan.wait(30)


def test_feedback_after_a_restart_finds_an_impression_that_left_the_windows(
    environment: Settings, s3: Storage, valkey: tuple[str, int, str], tmp_path: Path
) -> None:
    """The pairing memory is restored from what the uploader stored."""
    redis.Redis(port=valkey[1], password=valkey[2]).flushall()
    offline.apply()
    first, newer, like = (
        logged(tmp_path / name, body)
        for name, body in (
            ("1", events("first")),
            ("2", events(*(f"later {n}" for n in range(30)))),
            ("3", events("first", kind="feedback")),
        )
    )
    upload, before = Upload(s3), Update(online_apply())
    for segments in (first, newer):
        upload(segments)
        before(segments)
    (features,) = OnlineFeatures.connect().read(["u"], TIME + 100)
    assert features.short is not None
    assert features.short.times.min() > TIME, "the first view has left the windows"
    Update(online_apply())(like)
    (features,) = OnlineFeatures.connect().read(["u"], TIME + 100)
    assert features.positive is not None
    assert features.positive.times.tolist() == [TIME]


def test_bad_data_is_told_apart(environment: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "in the way"
    folder.mkdir()
    child = Child("upload", tmp_path)
    segments: list[Any] = [Segment(folder / "\0", 1, 1, 0.0)]
    with pytest.raises(BadData, match="null"):
        child(segments)
    child.close()
