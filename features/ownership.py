"""Who may write a user's on-line windows: users fall into partitions by a hash, a partition has one writer at a time.

Windows are updated by read, fold, write (``features.updater``), which two writers of one user would race: the later
write would forget what the earlier one folded in. Within a process each partition has its own thread; between processes
(several collectors, an ingest beside them) a lock in Valkey holds the partition for the moment of one update. A writer
that was stopped for longer than the lock lives finds that out when it gives the lock back, and applies its batch
again, which is harmless. Left out: handing partitions to processes for good, which would spare two round trips.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

from redis.exceptions import LockError, RedisError

from features.online import FeaturesUnavailable, OnlineFeatures, reporting
from features.repository import redis_client

PARTITIONS = 4
"""The same for every writer: those who divide users differently would not exclude each other."""
HELD_S = 30.0
"""A lock lives so long without its owner: much longer than an update takes, which Valkey's time-outs bound."""
WAIT_S = HELD_S + 10.0
"""Longer than the lock of a writer that was killed lives."""


def partition_of(user_id: str) -> int:
    """The partition of a user, 0 .. PARTITIONS - 1, the same in every process."""
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest(), "little") % PARTITIONS


@contextmanager
def owning(online: OnlineFeatures, partition: int) -> Iterator[None]:
    """Holds ``partition`` while the block runs; raises FeaturesUnavailable when it cannot be had or was lost."""
    name = f"onerec:updater:{partition}"
    lock = redis_client(online.store).lock(name, timeout=HELD_S, blocking_timeout=WAIT_S, sleep=0.005)
    with reporting(online.store):
        if not lock.acquire():
            raise FeaturesUnavailable(
                f"partition {partition} of the on-line windows has been written by somebody else for {WAIT_S:g} s; "
                "the batch is applied again"
            )
    try:
        yield
    except BaseException:
        _give_back(lock)
        raise
    try:
        lock.release()
    except LockError as error:
        raise FeaturesUnavailable(
            f"writing partition {partition} took longer than {HELD_S:g} s and somebody else may have written it too; "
            "the batch is applied again"
        ) from error
    except RedisError as error:
        raise FeaturesUnavailable(f"the partition could not be given back ({error})") from error


def _give_back(lock: object) -> None:
    """Releases after an error, which is what the caller hears of: a lock that cannot be given back expires."""
    try:
        lock.release()  # type: ignore[attr-defined]
    except RedisError:
        return
