"""A background step in a process of its own, so that decoding and Parquet do not hold up the answers to clients.

The parent writes a line of JSON per call (the segments) to the child's standard input and reads a line back (the
outcome, or the error). A child ends when its input does, thus also when the parent is killed; before it begins it
waits for the lock of its step in the folder of the log, so that the child of a dead parent and that of its successor
never work at the same time (the on-line update is a read-modify-write). One that dies is started by the next call.
Run by the collector: ``python -m features.intake.child upload|update FOLDER``.
"""

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa
from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, REGISTRY, generate_latest

from features.intake.exposures import recent_events
from features.intake.upload import Apply, Outcome, Update, Upload
from features.intake.wal import Segment
from features.intake.worker import BAD_DATA, UPLOAD
from features.storage import StorageUnavailable, connect

if TYPE_CHECKING:
    from features.updater import Updater

log = logging.getLogger(__name__)

_NICE = 5


class ChildFailed(RuntimeError):
    """The child reported an error, or died."""


class BadData(ValueError):
    """The child cannot work with these rows; trying again will not help."""


@dataclass
class Child:
    """The parent's end; called by one thread."""

    step: str
    folder: Path
    _process: "subprocess.Popen[str] | None" = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)
    _starting: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __call__(self, segments: Sequence[Segment]) -> Outcome:
        """Works off ``segments`` in the child; raises ChildFailed or BadData."""
        process = self._running()
        assert process.stdin
        assert process.stdout
        call = [{"path": str(s.path), "number": s.number, "size": s.size, "since": s.since} for s in segments]
        try:
            process.stdin.write(json.dumps(call) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        if not line:
            raise ChildFailed(f"the process for {self.step} ended ({process.poll()}); it is started again")
        answer = json.loads(line)
        if "error" in answer:
            raise (BadData if answer["bad_data"] else ChildFailed)(answer["error"])
        return Outcome(**answer)

    def start(self) -> None:
        """Starts the child ahead of the first call: what it imports takes seconds."""
        self._running()

    def close(self) -> None:
        """Ends the child at once; what it was doing is done again by the next one."""
        with self._starting:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _running(self) -> "subprocess.Popen[str]":
        with self._starting:
            if self._closed:
                raise ChildFailed(f"the process for {self.step} was ended")
            if self._process is None or self._process.poll() is not None:
                command = [sys.executable, "-m", "features.intake.child", self.step, str(self.folder)]
                # A group of its own: Ctrl-C at a terminal is for the parent, which then drains and ends the child.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
                )
            return self._process


def online_apply() -> Apply:
    """``Updater.apply`` on the configured feature store, which is opened when the first events come.

    Imported here because it needs Feast; opened late because intake must start without the store.
    """
    from features.online import FeaturesUnavailable, OnlineFeatures
    from features.updater import Updater

    updater: Updater | None = None

    def apply(impressions: pa.Table, feedback: pa.Table, since: float) -> int:
        nonlocal updater
        updater = updater or _remembering(Updater(OnlineFeatures.connect()))
        try:
            return updater.apply(impressions, feedback, since)
        except FeaturesUnavailable:
            # Feast caches a registry, so one that was opened before `feast apply` would stay empty.
            updater.online = OnlineFeatures.connect()
            raise

    return apply


def _remembering(updater: "Updater") -> "Updater":
    """``updater`` with what an earlier run knew: feedback pairs with impressions that it applied before it ended."""
    storage = connect()
    try:
        updater.remember(*(recent_events(storage, kind, updater.memory) for kind in ("impression", "feedback")))
    except StorageUnavailable as error:
        log.warning("feedback on impressions of before the restart may stay unpaired: %s", error)
    return updater


def _serve(work: Callable[[Sequence[Segment]], Outcome], calls: TextIO, answers: TextIO) -> None:
    for line in calls:
        segments = [Segment(Path(s["path"]), s["number"], s["size"], s["since"]) for s in json.loads(line)]
        answer: dict[str, Any]
        try:
            answer = {**asdict(work(segments)), "metrics": generate_latest(REGISTRY).decode()}
        except Exception as error:  # whatever it is, the parent decides whether to try again
            answer = {"error": f"{type(error).__name__}: {error}", "bad_data": isinstance(error, BAD_DATA)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _locked(folder: Path, step: str) -> TextIO:
    handle = (folder / f"{step}.lock").open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def main() -> None:
    """Serves calls until the input ends."""
    step, folder = sys.argv[1], Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Libraries may print; only answers go to the parent.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        REGISTRY.unregister(collector)
    # Clients wait for the log, nobody waits for this.
    os.nice(_NICE)
    with _locked(folder, step):
        work = Upload(connect()) if step == UPLOAD else Update(online_apply())
        _serve(work, sys.stdin, answers)


if __name__ == "__main__":
    main()
