import asyncio
import threading
from typing import Any

import pytest
from kserve import InferInput, InferRequest

from models.serving.offload import LARGE, beside, size_of


def request(*shapes: Any) -> InferRequest:
    return InferRequest("onerec", [InferInput("user_id", shape, "BYTES", []) for shape in shapes])


@pytest.mark.parametrize(
    ("payload", "length", "size"),
    [
        (request([3], [3, 10]), None, 33),
        (request([3], [3, 10]), "800", 100),
        (request([-1, 10**6]), "80", 10**6),
        (request([1]), "8000000", 10**6),
        (request("x", ["y"], None), "", 0),
        ({"instances": ["u"]}, "80", 10),
        ({"instances": 5}, "-8", 0),
        ([1], "٨", 0),
        (None, None, 0),
    ],
)
def test_sizes_of_whatever_may_come(payload: Any, length: str | None, size: int) -> None:
    assert size_of(payload, {} if length is None else {"content-length": length}) == size
    assert size_of(payload, None) >= 0


async def where(size: int) -> threading.Thread:
    return await beside(size, threading.current_thread)


def test_only_large_work_leaves_the_event_loop() -> None:
    here = threading.current_thread()
    assert asyncio.run(where(LARGE - 1)) is here
    assert asyncio.run(where(LARGE)) is not here
