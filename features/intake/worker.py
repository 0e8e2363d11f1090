"""Empties the write-ahead log: a backlog of sealed segments, and a worker for every step that each segment needs.

The steps (upload to S3, on-line features) are independent, because either may be down while the other is not; the file
of a segment is removed when all are done with it. A step may repeat a segment after a crash: uploads are
content-addressed and readers de-duplicate, and applying twice changes nothing (``features.histories.windows``). On-line
features are derived data: when their store stays away longer than the disk has room, their oldest segments are skipped
and counted.
Left out: more than one uploader, since one keeps ahead of one log.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from features.intake.upload import Outcome
from features.intake.wal import Segment

log = logging.getLogger(__name__)

UPLOAD, UPDATE = "upload", "update"
BAD_DATA = (ValueError, TypeError, KeyError)
"""Errors of a step that come from the rows: trying them again will not help."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 30.0
_TAKEN_BYTES = 16 * 1024 * 1024
_TRIES_OF_BAD_DATA = 5


@dataclass
class _Entry:
    segment: Segment
    todo: set[str]


class Backlog:
    """Sealed segments, oldest first, and which of the ``steps`` each still needs. Safe between threads."""

    def __init__(self, steps: Sequence[str]) -> None:
        self.steps = tuple(steps)
        self._changed = threading.Condition()
        self._entries: deque[_Entry] = deque()
        self._count = dict.fromkeys(steps, 0)
        self._bytes = dict.fromkeys(steps, 0)
        self._hurrying = 0

    def add(self, segment: Segment) -> None:
        """Takes over a segment; it is removed from disk when every step is done with it."""
        with self._changed:
            self._entries.append(_Entry(segment, set(self.steps)))
            for step in self.steps:
                self._count[step] += 1
                self._bytes[step] += segment.size
            self._changed.notify_all()

    def take(self, step: str, linger: float, stopped: Callable[[], bool]) -> list[Segment]:
        """The oldest segments that need ``step``, once the oldest is ``linger`` seconds old; [] when stopped."""
        with self._changed:
            while not stopped():
                missing = 1.0
                if self._count[step]:
                    missing = self._first(step).since + linger - time.time()
                    if missing <= 0 or self._bytes[step] >= _TAKEN_BYTES or self._hurrying:
                        return self._first_bytes(step)
                self._changed.wait(min(missing, 1.0))
            return []

    def done(self, step: str, segments: Sequence[Segment]) -> None:
        """Marks ``step`` as done; removes the segments that nothing else needs."""
        numbers = {segment.number for segment in segments}
        with self._changed:
            for entry in self._entries:
                if entry.segment.number in numbers and step in entry.todo:
                    entry.todo.remove(step)
                    self._count[step] -= 1
                    self._bytes[step] -= entry.segment.size
                    if not entry.todo:
                        entry.segment.remove()
            self._entries = deque(entry for entry in self._entries if entry.todo)
            self._changed.notify_all()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """While somebody waits, workers take what there is at once and retry without long pauses."""
        with self._changed:
            self._hurrying += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._hurrying -= 1

    def pause(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """Waits so long; only shortly when hurried, not at all when stopped."""
        begun = time.monotonic()
        with self._changed:
            while not stopped() and (passed := time.monotonic() - begun) < seconds:
                if self._hurrying and passed >= _FIRST_WAIT_S:
                    return
                self._changed.wait(min(seconds - passed, _FIRST_WAIT_S))

    def wait_done(self, number: int, timeout: float) -> bool:
        """Waits until no segment up to ``number`` needs anything; False on timeout."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._entries or self._entries[0].segment.number > number, timeout
            )

    def newest(self) -> int:
        """Number of the newest segment, 0 when there is none."""
        with self._changed:
            return self._entries[-1].segment.number if self._entries else 0

    def segments(self, step: str) -> int:
        """How many segments need ``step``."""
        return self._count[step]

    def bytes(self, step: str) -> int:
        """How many bytes need ``step``."""
        return self._bytes[step]

    def age(self, step: str) -> float:
        """Seconds since the oldest record that needs ``step`` was logged, 0 when none does."""
        with self._changed:
            return max(0.0, time.time() - self._first(step).since) if self._count[step] else 0.0

    def wake(self) -> None:
        """Lets waiting workers see that they were stopped."""
        with self._changed:
            self._changed.notify_all()

    def _first(self, step: str) -> Segment:
        return next(entry.segment for entry in self._entries if step in entry.todo)

    def _first_bytes(self, step: str) -> list[Segment]:
        taken: list[Segment] = []
        size = 0
        for entry in self._entries:
            if step in entry.todo:
                size += entry.segment.size
                if taken and size > _TAKEN_BYTES:
                    break
                taken.append(entry.segment)
        return taken


@dataclass(eq=False, kw_only=True)
class Worker:
    """One thread that does one step for every segment, in order, and retries with back-off and jitter."""

    backlog: Backlog
    step: str
    work: Callable[[list[Segment]], Outcome]
    linger: float = 0.0
    """Seconds that a segment may wait for company, so that objects do not get too small."""
    skip_above_bytes: int | None = None
    """Derived data only: the oldest segments beyond this much backlog are given up, failing or too many."""
    on_failure: Callable[[], None] = lambda: None
    on_skip: Callable[[list[Segment]], None] = lambda segments: None
    on_done: Callable[[Outcome], None] = lambda outcome: None
    failure: str | None = field(default=None, init=False)
    """Why the last try failed, None after a success."""

    def __post_init__(self) -> None:
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"wal-{self.step}", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def halt(self) -> None:
        """Lets the worker stop after the present segments; what is left stays in the log."""
        self._stopping = True
        self.backlog.wake()

    def join(self, timeout: float) -> None:
        """Waits for the worker's end."""
        self._thread.join(timeout)

    def _stopped(self) -> bool:
        return self._stopping

    def _run(self) -> None:
        while segments := self.backlog.take(self.step, self.linger, self._stopped):
            if self._persist(segments):
                self.backlog.done(self.step, segments)

    def _persist(self, segments: list[Segment]) -> bool:
        """Tries until the segments are worked off or given up; False when stopped before."""
        tries = 0
        while not self._stopping:
            if self.skip_above_bytes is not None and self.backlog.bytes(self.step) > self.skip_above_bytes:
                return self._skip(segments, f"more than {self.skip_above_bytes} bytes wait")
            tries += 1
            try:
                outcome = self.work(segments)
            except Exception as error:  # whatever it is, the log keeps the rows and this thread must live
                self._failed(error, tries)
                bad_data = isinstance(error, BAD_DATA)
                if self.skip_above_bytes is not None and bad_data and tries >= _TRIES_OF_BAD_DATA:
                    return self._skip(segments, f"{tries} tries failed")
            else:
                self.failure = None
                self.on_done(outcome)
                return True
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(tries - 1, 10))
            self.backlog.pause(wait * random.uniform(0.5, 1.0), self._stopped)
        return False

    def _failed(self, error: Exception, tries: int) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        self.on_failure()
        if tries == 1 or tries % 20 == 0:
            log.warning("%s failed (try %d), the log keeps the rows: %s", self.step, tries, self.failure)

    def _skip(self, segments: list[Segment], why: str) -> bool:
        log.error(
            "%s: gave up %d segments from %s on, %s: %s", self.step, len(segments), segments[0], why, self.failure
        )
        try:
            self.on_skip(segments)
        except OSError as error:
            log.error("%s: what was given up cannot be counted: %s", self.step, error)
        return True
