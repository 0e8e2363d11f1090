"""The predictor's runs: what becomes of one that nobody waits for any more."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from watched import NOW_MS

from models.bundle import Bundle
from models.serving.contexts import Contexts
from models.serving.errors import DeadlinePassed
from models.serving.protocol import Options
from models.serving.recommender import Recommender


class Held(Recommender):
    """Waits in its first search until it is let go; counts searches."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.searches, self.going = 0, threading.Event()

    def _search(self, *arguments: Any) -> Any:
        self.searches += 1
        assert self.going.wait(30)
        return super()._search(*arguments)


def nobody(users: int, beam_width: int) -> Contexts:
    options = Options(beam_width=beam_width)
    return Contexts.of([None] * users, np.full(users, NOW_MS), [frozenset()] * users, options)


@pytest.mark.parametrize("leaves", ["by itself", "by its deadline"])
def test_a_large_request_that_nobody_waits_for_is_given_up_between_its_parts(
    predictor: Any, tiny_bundle: Bundle, leaves: str
) -> None:
    held = Held(tiny_bundle)

    async def main() -> None:
        here = predictor(held)
        patience = 60.0 if leaves == "by itself" else 0.2
        large = asyncio.create_task(here.predict(nobody(40, 512), "r", time.monotonic() + patience))
        while not held.searches:
            await asyncio.sleep(0.005)
        if leaves == "by itself":
            large.cancel()
        (ended,) = await asyncio.gather(large, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError if leaves == "by itself" else DeadlinePassed)
        held.going.set()
        answer = await here.predict(nobody(1, 32), "s", time.monotonic() + 60)
        assert len(answer.recommendations) == 1
        assert held.searches == 2  # of the forty users' parts only the one that was under way
        assert here.waiting == 0

    asyncio.run(main())
