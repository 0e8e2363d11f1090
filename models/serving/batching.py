"""Micro-batching: concurrent calls become one run of the model.

KServe has no batching of its own for protocol v2. While the model runs, further calls gather, so batches grow with the
load by themselves; a call that finds it idle waits at most ``max_wait_s`` for company. Only calls with equal keys share
a batch. A call whose caller has gone, or whose deadline has passed, is never run, and a run that nobody waits for any
more can find out.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from models.serving.admission import Budget, Limits
from models.serving.errors import DeadlinePassed

Payload = TypeVar("Payload")
Result = TypeVar("Result")
Wanted = Callable[[], bool]
"""Whether anybody still waits for a run; to be asked from any thread."""


@dataclass(frozen=True, kw_only=True)
class Batched(Generic[Result]):
    """A call's result and how it came about."""

    result: Result
    waited_s: float
    rows: int
    """Rows of the batch it ran in."""


@dataclass(eq=False)
class _Call(Generic[Payload, Result]):
    key: Hashable
    kind: Hashable
    payload: Payload
    rows: int
    cost: float
    answer: "asyncio.Future[Batched[Result]]"
    since: float
    waiting: bool = True


class MicroBatcher(Generic[Payload, Result]):
    """Groups calls and hands them to ``run(key, payloads, wanted)``, which returns one result per payload, in order.

    ``limits.at_once`` batches run at a time. Use it from one event loop.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list[Payload], Wanted], Awaitable[list[Result]]],
        limits: Limits | None = None,
        patience: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._run = run
        self._budget = Budget(limits or Limits(), patience)
        self._limits = self._budget.limits
        self._idle = asyncio.Semaphore(self._limits.at_once)
        self._calls: deque[_Call[Payload, Result]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._dispatching = False

    @property
    def waiting(self) -> int:
        """Rows that no batch has taken yet."""
        return self._budget.rows

    def glance(self, rows: int) -> None:
        """Raises Overloaded when a call of ``rows`` need not even be prepared."""
        self._budget.glance(rows)

    async def submit(
        self, key: Hashable, payload: Payload, rows: int, *, kind: Hashable = None, deadline: float | None = None
    ) -> Batched[Result]:
        """The result for ``payload``; calls of one ``kind`` cost about the same for each row.

        ``deadline`` is a time of ``time.monotonic``. Raises Overloaded, DeadlinePassed, or whatever ``run`` raised.
        """
        now = time.monotonic()
        if deadline is not None and deadline <= now:
            raise DeadlinePassed("the deadline passed before the model was asked; it was not run")
        cost = self._budget.admit(kind, rows)
        answer = asyncio.get_running_loop().create_future()
        call: _Call[Payload, Result] = _Call(key, kind, payload, rows, cost, answer, now)
        self._calls.append(call)
        if not self._dispatching:
            self._dispatching = True
            self._spawn(self._dispatch())
        patience = asyncio.timeout(None if deadline is None else deadline - now)
        try:
            async with patience:
                return await call.answer
        except TimeoutError:
            if not patience.expired():  # the batch's own
                raise
            what = "it was not run" if call.waiting else "the model had not finished"
            raise DeadlinePassed(f"the deadline passed after {time.monotonic() - now:.2f} s; {what}") from None
        finally:
            if call.waiting:  # the caller went away, or ran out of time
                self._calls.remove(call)
                self._leave(call)

    def _leave(self, call: _Call[Payload, Result]) -> None:
        call.waiting = False
        self._budget.leave(call.rows, call.cost)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dispatch(self) -> None:
        try:
            while self._calls:
                await self._idle.acquire()
                oldest = self._calls[0].since if self._calls else 0.0
                patience = oldest + self._limits.max_wait_s - time.monotonic()
                if patience > 0 and self.waiting < self._limits.max_rows:
                    await asyncio.sleep(patience)
                if batch := self._take():
                    self._spawn(self._answer(batch))
                else:
                    self._idle.release()
        finally:
            self._dispatching = False

    def _take(self) -> list[_Call[Payload, Result]]:
        """The oldest call and those with its key, up to the rows that may share a batch."""
        batch: list[_Call[Payload, Result]] = []
        left: deque[_Call[Payload, Result]] = deque()
        rows = most = 0
        for call in self._calls:
            if not batch:
                most = self._budget.batch_rows(call.kind)
            if not batch or (call.key == batch[0].key and rows + call.rows <= most):
                batch.append(call)
                rows += call.rows
            else:
                left.append(call)
        self._calls = left
        for call in batch:
            self._leave(call)
        return batch

    async def _answer(self, batch: list[_Call[Payload, Result]]) -> None:
        began, rows = time.monotonic(), sum(call.rows for call in batch)
        try:
            wanted = partial(_wanted, [call.answer for call in batch])
            results = await self._run(batch[0].key, [call.payload for call in batch], wanted)
        except Exception as error:  # every caller of the batch gets it
            self._idle.release()
            for call in batch:
                if not call.answer.done():
                    call.answer.set_exception(error)
            return
        # The next batch starts before the answers of this one are written: the model must not wait for that.
        self._idle.release()
        self._budget.costs.ran(batch[0].kind, rows, time.monotonic() - began)
        for call, result in zip(batch, results, strict=True):
            if not call.answer.done():
                call.answer.set_result(Batched(result=result, waited_s=began - call.since, rows=rows))


def _wanted(answers: Sequence["asyncio.Future[Any]"]) -> bool:
    return not all(answer.done() for answer in answers)
