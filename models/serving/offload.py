"""Large requests are parsed, and their answers written, in a thread: the event loop has probes and others to answer."""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kserve import InferRequest

LARGE = 20_000
"""Values from which on a thread is worth its hop: some 10 ms of parsing."""
ITEM = 16
"""Values that stand for one recommended item: its ids, codes, log-probabilities and event."""

Result = TypeVar("Result")


async def beside(size: int, work: Callable[[], Result]) -> Result:
    """``work()``, in a thread when it deals with ``size`` >= LARGE values."""
    return work() if size < LARGE else await asyncio.to_thread(work)


def size_of(payload: Any) -> int:
    """About how many values the request has; nothing about it has been checked yet."""
    if isinstance(payload, InferRequest):
        return sum(_product(tensor.shape) for tensor in payload.inputs)
    instances = payload.get("instances") if isinstance(payload, Mapping) else None
    return sum(map(_values, instances)) if isinstance(instances, list) else 0


def _product(shape: Any) -> int:
    plain = isinstance(shape, list) and len(shape) < 9 and all(type(size) is int for size in shape)
    return abs(math.prod(shape)) if plain else 0


def _values(instance: Any) -> int:
    exclude = instance.get("exclude") if isinstance(instance, Mapping) else None
    return 1 + (len(exclude) if isinstance(exclude, list) else 0)
