import asyncio
import time
from collections.abc import Hashable

import pytest

from models.serving.admission import Limits
from models.serving.batching import MicroBatcher, Wanted
from models.serving.errors import DeadlinePassed, Overloaded


class Recorder:
    """Answers with the doubled payload and remembers the batches; waits for ``gate`` when there is one."""

    def __init__(self, gate: asyncio.Event | None = None) -> None:
        self.gate = gate
        self.batches: list[tuple[Hashable, list[int]]] = []

    async def __call__(self, key: Hashable, payloads: list[int], wanted: Wanted) -> list[int]:
        self.batches.append((key, payloads))
        self.wanted = wanted
        if self.gate:
            await self.gate.wait()
        if -1 in payloads:
            raise TimeoutError("the model failed")
        return [2 * payload for payload in payloads]

    async def busy(self) -> None:
        while not self.batches:
            await asyncio.sleep(0.001)


def test_concurrent_calls_share_batches_of_one_key_and_get_their_own_result() -> None:
    async def main() -> None:
        run = Recorder()
        batcher = MicroBatcher(run, Limits(max_rows=8))
        answers = await asyncio.gather(*(batcher.submit(i % 2, i, 1) for i in range(40)))
        assert [answer.result for answer in answers] == [2 * i for i in range(40)]
        assert len(run.batches) < 40
        for key, payloads in run.batches:
            assert len(payloads) <= 8
            assert {payload % 2 for payload in payloads} == {key}
        assert batcher.waiting == 0

    asyncio.run(main())


def test_a_large_call_runs_alone_and_calls_gather_while_the_model_is_busy() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        run = Recorder(gate)
        batcher = MicroBatcher(run, Limits(max_rows=4))
        calls = [asyncio.create_task(batcher.submit("k", 0, 100))]
        await run.busy()
        calls += [asyncio.create_task(batcher.submit("k", i, 1)) for i in range(1, 5)]
        await asyncio.sleep(0.02)
        assert len(run.batches) == 1
        gate.set()
        answers = await asyncio.gather(*calls)
        assert run.batches == [("k", [0]), ("k", [1, 2, 3, 4])]
        assert [answer.rows for answer in answers] == [100, 4, 4, 4, 4]
        assert all(answer.waited_s >= 0.02 for answer in answers[1:])

    asyncio.run(main())


def test_as_many_batches_run_at_once_as_are_allowed() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        run = Recorder(gate)
        batcher = MicroBatcher(run, Limits(max_rows=1, at_once=2, max_wait_s=0))
        calls = [asyncio.create_task(batcher.submit("k", i, 1)) for i in range(4)]
        await asyncio.sleep(0.02)
        assert len(run.batches) == 2
        failing = asyncio.create_task(batcher.submit("k", -1, 1))
        gate.set()
        assert [answer.result for answer in await asyncio.gather(*calls)] == [0, 2, 4, 6]
        with pytest.raises(TimeoutError):
            await failing
        assert (await batcher.submit("k", 5, 1)).result == 10

    asyncio.run(main())


def test_an_error_reaches_every_caller_of_its_batch_and_no_other() -> None:
    async def main() -> None:
        batcher = MicroBatcher(Recorder())
        bad = [batcher.submit("bad", payload, 1) for payload in (-1, 1)]
        results = await asyncio.gather(*bad, batcher.submit("good", 3, 1), return_exceptions=True)
        assert [type(result) for result in results[:2]] == [TimeoutError, TimeoutError]
        assert results[2].result == 6
        assert (await batcher.submit("good", 4, 1)).result == 8

    asyncio.run(main())


def test_a_caller_who_left_costs_nothing_and_the_queue_is_bounded() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        run = Recorder(gate)
        batcher = MicroBatcher(run, Limits(max_rows=1, queue_rows=2))
        first = asyncio.create_task(batcher.submit("k", 1, 1))
        await run.busy()
        left = asyncio.create_task(batcher.submit("k", 2, 2))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.submit("k", 4, 1)
        left.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 0
        assert not batcher._calls  # what they asked for is not held either, however long the model is busy
        stays = asyncio.create_task(batcher.submit("k", 3, 1))
        await asyncio.sleep(0)
        gate.set()
        assert ((await first).result, (await stays).result) == (2, 6)
        assert run.batches == [("k", [1]), ("k", [3])]

    asyncio.run(main())


def test_a_run_is_wanted_until_the_last_of_its_callers_has_gone() -> None:
    async def main() -> None:
        run = Recorder(asyncio.Event())
        batcher = MicroBatcher(run, Limits(max_rows=2))
        leaves = asyncio.create_task(batcher.submit("k", 1, 1))
        late = asyncio.create_task(batcher.submit("k", 2, 1, deadline=time.monotonic() + 0.1))
        await run.busy()
        assert run.batches == [("k", [1, 2])]
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        assert run.wanted()
        with pytest.raises(DeadlinePassed, match="not finished"):
            await late
        assert not run.wanted()

    asyncio.run(main())


def test_what_would_come_too_late_is_not_run() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        run = Recorder(gate)
        batcher = MicroBatcher(run, Limits(max_rows=1))
        with pytest.raises(DeadlinePassed, match="not run"):
            await batcher.submit("k", 9, 1, deadline=time.monotonic() - 1)
        first = asyncio.create_task(batcher.submit("k", 1, 1))
        await run.busy()
        with pytest.raises(DeadlinePassed, match="not run"):
            await batcher.submit("k", 2, 1, deadline=time.monotonic() + 0.01)
        gate.set()
        assert (await first).result == 2
        gate.clear()
        with pytest.raises(DeadlinePassed, match="not finished"):
            await batcher.submit("k", 3, 1, deadline=time.monotonic() + 0.02)
        gate.set()
        assert (await batcher.submit("k", 4, 1)).result == 8
        assert [payloads for _, payloads in run.batches] == [[1], [3], [4]]

    asyncio.run(main())
