import asyncio
from collections.abc import Hashable

import pytest

from models.serving.batching import MicroBatcher, Overloaded


class Recorder:
    """Answers with the doubled payload and remembers the batches; waits for ``gate`` when there is one."""

    def __init__(self, gate: asyncio.Event | None = None) -> None:
        self.gate = gate
        self.batches: list[tuple[Hashable, list[int]]] = []

    async def __call__(self, key: Hashable, payloads: list[int]) -> list[int]:
        self.batches.append((key, payloads))
        if self.gate:
            await self.gate.wait()
        if -1 in payloads:
            raise RuntimeError("the model failed")
        return [2 * payload for payload in payloads]


def test_concurrent_calls_share_batches_of_one_key_and_get_their_own_result() -> None:
    async def main() -> None:
        run = Recorder()
        batcher = MicroBatcher(run, max_rows=8)
        answers = await asyncio.gather(*(batcher.submit(i % 2, i, 1) for i in range(40)))
        assert answers == [2 * i for i in range(40)]
        assert len(run.batches) < 40
        for key, payloads in run.batches:
            assert len(payloads) <= 8
            assert {payload % 2 for payload in payloads} == {key}

    asyncio.run(main())


def test_a_large_call_runs_alone_and_calls_gather_while_slots_are_busy() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        run = Recorder(gate)
        batcher = MicroBatcher(run, max_rows=4, slots=1)
        calls = [asyncio.create_task(batcher.submit("k", 0, 100))]
        while not run.batches:
            await asyncio.sleep(0.001)
        calls += [asyncio.create_task(batcher.submit("k", i, 1)) for i in range(1, 5)]
        await asyncio.sleep(0.02)
        assert len(run.batches) == 1
        gate.set()
        await asyncio.gather(*calls)
        assert run.batches == [("k", [0]), ("k", [1, 2, 3, 4])]

    asyncio.run(main())


def test_an_error_reaches_every_caller_of_its_batch_and_no_other() -> None:
    async def main() -> None:
        batcher = MicroBatcher(Recorder())
        bad = [batcher.submit("bad", payload, 1) for payload in (-1, 1)]
        results = await asyncio.gather(*bad, batcher.submit("good", 3, 1), return_exceptions=True)
        assert [type(result) for result in results] == [RuntimeError, RuntimeError, int]
        assert await batcher.submit("good", 4, 1) == 8

    asyncio.run(main())


def test_a_caller_who_left_costs_nothing_and_the_queue_is_bounded() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        run = Recorder(gate)
        batcher = MicroBatcher(run, slots=1, max_waiting=2)
        first = asyncio.create_task(batcher.submit("k", 1, 1))
        while not run.batches:
            await asyncio.sleep(0.001)
        left = asyncio.create_task(batcher.submit("k", 2, 1))
        await asyncio.sleep(0)
        left.cancel()
        stays = asyncio.create_task(batcher.submit("k", 3, 1))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.submit("k", 4, 1)
        gate.set()
        assert (await first, await stays) == (2, 6)
        assert run.batches == [("k", [1]), ("k", [3])]

    asyncio.run(main())
