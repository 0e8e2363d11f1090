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

LENGTH = "content-length"
"""The header with the bytes of a body; the REST side sets it to what came."""
VALUE_BYTES = 8
"""Of a value in JSON."""

Result = TypeVar("Result")


async def beside(size: int, work: Callable[[], Result]) -> Result:
    """``work()``, in a thread when it deals with ``size`` >= LARGE values."""
    return work() if size < LARGE else await asyncio.to_thread(work)


def size_of(payload: Any, headers: Mapping[str, str] | None) -> int:
    """About how many values the request has, by its length or by its shapes; nothing about it has been checked yet."""
    length = (headers or {}).get(LENGTH, "")
    size = int(length[:12]) // VALUE_BYTES if length.isascii() and length.isdigit() else 0
    if size >= LARGE or not isinstance(payload, InferRequest):
        return size
    return max(size, sum(_product(tensor.shape) for tensor in payload.inputs))


def _product(shape: Any) -> int:
    plain = isinstance(shape, list) and len(shape) < 9 and all(type(size) is int for size in shape)
    return abs(math.prod(shape)) if plain else 0
