"""A copy of the checkpoint in object storage, for machines that do not come back.

Sent in the background while training goes on; fetched when a training starts where no checkpoint lies. Left out:
several generations of checkpoints.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from features.storage import ObjectMissing, StorageUnavailable, connect
from models.training.device import rank

ATTEMPTS = 5
PAUSE_SECONDS = 0.5

log = logging.getLogger(__name__)


class Remote:
    """The copy under ``key``; "" keeps none, and every method then does nothing.

    An upload is tried ``ATTEMPTS`` times with growing pauses. When all fail it is counted and logged, training goes on
    and the next checkpoint is sent instead: a store that is away for a while does not stop a training.
    """

    def __init__(self, key: str) -> None:
        self.key, self.failed = key, 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints") if key else None
        self._sending: Future[None] | None = None

    def fetch(self, path: Path) -> None:
        """Brings the copy to ``path`` when nothing is there; raises StorageUnavailable when the store stays away."""
        if not self.key or path.exists():
            return
        scratch = path.with_name(f"{path.name}.{rank()}.part")
        try:
            insistently(lambda: connect().get_file(self.key, scratch))
        except ObjectMissing:
            return
        scratch.replace(path)

    def send(self, path: Path) -> None:
        """Starts sending the file now at ``path``, after the previous upload."""
        if self._pool is None:
            return
        self._settle()
        frozen = path.with_name(path.name + ".sent")
        frozen.unlink(missing_ok=True)
        os.link(path, frozen)  # the next checkpoint replaces the name, not this file
        self._sending = self._pool.submit(insistently, lambda: connect().put_file(self.key, frozen))

    def close(self, path: Path) -> dict[str, int]:
        """Waits for the last upload; returns how many failed, when there is a store at all."""
        if self._pool is None:
            return {}
        self._settle()
        self._pool.shutdown()
        path.with_name(path.name + ".sent").unlink(missing_ok=True)
        return {"uploads_failed": self.failed}

    def _settle(self) -> None:
        sending, self._sending = self._sending, None
        if sending is None:
            return
        try:
            sending.result()
        except StorageUnavailable as error:
            self.failed += 1
            log.warning("the checkpoint could not be copied to %s: %s; training goes on", self.key, error)


def remove(key: str) -> None:
    """Removes the copy of a training that is finished; "" has none."""
    if key:
        insistently(lambda: connect().remove(key))


def insistently(work: Callable[[], None]) -> None:
    """``work`` until it succeeds, at most ``ATTEMPTS`` times; raises the last StorageUnavailable."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return work()
        except StorageUnavailable:
            time.sleep(PAUSE_SECONDS * 2**attempt)
    return work()
