"""Micro-batching: concurrent calls become one run of the model.

KServe has no batching of its own for protocol v2. A call waits at most ``max_wait_s`` for company; while every
slot is busy further calls gather, so batches grow with the load by themselves. Only calls with equal keys share
a batch. Left out: priorities.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Payload = TypeVar("Payload")
Result = TypeVar("Result")


class Overloaded(RuntimeError):
    """More rows wait for the model than it may keep waiting."""


@dataclass(eq=False)
class _Call(Generic[Payload, Result]):
    key: Hashable
    payload: Payload
    rows: int
    answer: "asyncio.Future[Result]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class MicroBatcher(Generic[Payload, Result]):
    """Groups calls and hands them to ``run(key, payloads)``, which returns one result per payload, in order.

    ``max_rows`` bounds a batch (one larger call runs alone), ``slots`` how many batches are under way,
    ``max_waiting`` how many rows may wait. Use it from one event loop.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list[Payload]], Awaitable[list[Result]]],
        *,
        max_rows: int = 32,
        max_wait_s: float = 0.003,
        slots: int = 2,
        max_waiting: int = 4096,
    ) -> None:
        self._run = run
        self._max_rows = max_rows
        self._max_wait_s = max_wait_s
        self._max_waiting = max_waiting
        self._slots = asyncio.Semaphore(slots)
        self._waiting: deque[_Call[Payload, Result]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._dispatching = False

    @property
    def waiting(self) -> int:
        """Rows that no batch has taken yet."""
        return sum(call.rows for call in self._waiting)

    async def submit(self, key: Hashable, payload: Payload, rows: int) -> Result:
        """The result for ``payload``; raises Overloaded, or whatever ``run`` raised for its batch."""
        if self.waiting + rows > self._max_waiting:
            raise Overloaded(f"{self.waiting} rows are waiting already; try again, or add replicas")
        call: _Call[Payload, Result] = _Call(key, payload, rows)
        self._waiting.append(call)
        if not self._dispatching:
            self._dispatching = True
            self._spawn(self._dispatch())
        return await call.answer

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dispatch(self) -> None:
        try:
            while self._waiting:
                if self.waiting < self._max_rows:
                    await asyncio.sleep(self._max_wait_s)
                await self._slots.acquire()
                self._spawn(self._answer(self._take()))
        finally:
            self._dispatching = False

    def _take(self) -> list[_Call[Payload, Result]]:
        """The oldest call and those with its key, up to ``max_rows`` rows."""
        batch: list[_Call[Payload, Result]] = []
        left: deque[_Call[Payload, Result]] = deque()
        rows = 0
        for call in self._waiting:
            if call.answer.done():  # the client went away
                continue
            if not batch or (call.key == batch[0].key and rows + call.rows <= self._max_rows):
                batch.append(call)
                rows += call.rows
            else:
                left.append(call)
        self._waiting = left
        return batch

    async def _answer(self, batch: list[_Call[Payload, Result]]) -> None:
        try:
            results = await self._run(batch[0].key, [call.payload for call in batch]) if batch else []
        except Exception as error:  # every caller of the batch gets it
            for call in batch:
                if not call.answer.done():
                    call.answer.set_exception(error)
        else:
            for call, result in zip(batch, results, strict=True):
                if not call.answer.done():
                    call.answer.set_result(result)
        finally:
            self._slots.release()
