"""The log, its workers and its counters: everything of the collector behind the HTTP surface.

A batch goes through the write-ahead log (``features.intake.wal``) and is acknowledged; upload to S3 and the on-line
features follow in the background (``features.intake.worker``), and neither being down stops intake while the disk
has room. Delivery is at least once: a client that saw no 202 sends the batch again, ids make it harmless.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from features.intake.child import Child
from features.intake.events import KINDS, Event
from features.intake.telemetry import Telemetry
from features.intake.upload import Outcome, read
from features.intake.wal import Segment, WalFull, WalLimits, WriteAheadLog
from features.intake.worker import UPDATE, UPLOAD, Backlog, Worker

Step = Callable[[Sequence[Segment]], Outcome]


@dataclass(frozen=True, kw_only=True)
class IntakeConfig:
    """Where the log lies and how much of it may wait."""

    wal: Path
    limits: WalLimits = field(default_factory=WalLimits)
    budget_bytes: int = 2 * 1024**3
    """Disk for rows that are not uploaded; as much again for rows that only the on-line features miss."""
    upload_linger_s: float = 10.0
    drain_s: float = 5.0
    """How long a shutdown waits for S3 and the features; the rest stays in the log."""
    skew: timedelta = timedelta(days=2)
    """Events whose time is farther from now are counted."""
    refuse_skewed: bool = False
    """Refuse them instead; not for replayed logs and simulated days, which live in their own time."""

    def __post_init__(self) -> None:
        if self.budget_bytes < self.limits.segment_bytes:
            raise ValueError(
                f"the budget of {self.budget_bytes} bytes is below one segment of {self.limits.segment_bytes}; raise it"
            )


class Intake:
    """Takes batches; owns the log and the workers that empty it."""

    def __init__(self, config: IntakeConfig, upload: Step, update: Step | None = None) -> None:
        """Opens the log and starts the workers; without ``update`` there are no on-line features."""
        self.config = config
        self._steps = (upload, update)
        self.backlog = Backlog((UPLOAD, UPDATE) if update else (UPLOAD,))
        self.telemetry = Telemetry(self.backlog, self.config.budget_bytes)
        self.log = WriteAheadLog(config.wal, self.backlog.add, config.limits, self.telemetry.committed)
        self.telemetry.watch(self.log)
        self.workers = [self._uploader(upload)] + ([self._updater(update)] if update else [])
        for step in self._children():
            step.start()
        for worker in self.workers:
            worker.start()

    def _children(self) -> list[Child]:
        return [step for step in self._steps if isinstance(step, Child)]

    def _uploader(self, upload: Step) -> Worker:
        return Worker(
            backlog=self.backlog,
            step=UPLOAD,
            work=upload,
            linger=self.config.upload_linger_s,
            on_failure=self.telemetry.upload_failures.inc,
            on_done=self.telemetry.count_uploaded,
        )

    def _updater(self, update: Step) -> Worker:
        return Worker(
            backlog=self.backlog,
            step=UPDATE,
            work=update,
            skip_above_bytes=self.config.budget_bytes,
            on_failure=self.telemetry.update_failures.inc,
            on_skip=lambda segments: self.telemetry.count_skipped(read(segments)),
            on_done=self.telemetry.keep_update,
        )

    async def accept(self, body: bytes, kinds: Mapping[type[Event], int]) -> None:
        """Returns once ``body``, with so many events of each kind, is durable; raises WalFull or WalFailed."""
        used = self.backlog.bytes(UPLOAD) + self.log.open_bytes()
        if used + len(body) > self.config.budget_bytes:
            raise WalFull(f"{used} bytes wait for S3, the budget is {self.config.budget_bytes}: {self.problems()}")
        await self.log.commit(body)
        for kind, count in kinds.items():
            self.telemetry.count_accepted(KINDS[kind], count)

    async def flush(self, timeout: float) -> bool:
        """Waits until everything accepted so far is in S3 and in the on-line features; False on timeout."""
        until = time.monotonic() + timeout
        with self.backlog.hurry():
            try:
                await asyncio.wait_for(asyncio.wrap_future(self.log.seal()), timeout)
            except TimeoutError:
                return False
            left = max(0.0, until - time.monotonic())
            return await asyncio.to_thread(self.backlog.wait_done, self.backlog.newest(), left)

    def problems(self) -> str:
        """What the workers complain about, for error messages."""
        found = [f"{worker.step} fails with {worker.failure}" for worker in self.workers if worker.failure]
        return "; ".join(found) or "the workers are busy"

    def close(self) -> None:
        """Seals the log, gives the workers a moment, stops them; what is left is replayed by the next start."""
        with self.backlog.hurry():
            self.log.close()
            # What already fails will hardly be mended by waiting.
            failing = any(worker.failure for worker in self.workers)
            self.backlog.wait_done(self.backlog.newest(), min(self.config.drain_s, 1.0 if failing else math.inf))
        for worker in self.workers:
            worker.halt()
        for step in self._children():
            step.close()
        for worker in self.workers:
            worker.join(timeout=1.0)
