"""How much may wait for the model: a budget in rows and in time, with what a row costs measured as it goes.

A queue without a bound turns overload into answers that come too late for everybody. Here the wait is estimated before
a call is let in; one that would wait too long is refused at once (429), so that those let in keep their latency. A row
of a narrow beam and a row of a wide one differ a hundredfold, so costs are kept by kind of call. Left out: priorities,
and quotas by caller.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from models.serving.errors import Overloaded

MEMORY = 0.8
"""How much of the past a new batch leaves in the estimate."""
KINDS = 256
"""Kinds whose costs are remembered."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may run together and what may wait."""

    max_rows: int = 32
    """Rows of one batch; 1 is no batching."""
    at_once: int = 1
    """Batches that run at the same time."""
    batch_s: float = 0.25
    """Estimated time of one batch: where wide beams gain nothing from company, they need not wait for it."""
    max_wait_s: float = 0.003
    """How long a call waits for company while the model is idle."""
    queue_rows: int = 512
    queue_s: float = 0.4

    def __post_init__(self) -> None:
        if (
            min(self.max_rows, self.at_once, self.queue_rows) < 1
            or self.max_wait_s < 0
            or min(self.batch_s, self.queue_s) <= 0
        ):
            raise ValueError(f"{self}: rows and times must be positive")


class Costs:
    """Seconds of a row by kind of call, from the batches that ran."""

    def __init__(self) -> None:
        self._sums: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # kind -> decayed rows, seconds

    def ran(self, kind: Hashable, rows: int, seconds: float) -> None:
        """A batch of ``rows`` took ``seconds``; large batches count for more."""
        old_rows, old_seconds = self._sums.pop(kind, (0.0, 0.0))
        self._sums[kind] = MEMORY * old_rows + rows, MEMORY * old_seconds + seconds
        if len(self._sums) > KINDS:
            self._sums.popitem(last=False)

    def of(self, kind: Hashable, rows: int) -> float:
        """Estimated seconds of ``rows``; 0 for a kind that never ran."""
        seen, seconds = self._sums.get(kind, (1.0, 0.0))
        return rows * seconds / seen


class Budget:
    """What waits now, against ``limits``."""

    def __init__(self, limits: Limits, patience: Callable[[], float] = lambda: 1.0) -> None:
        """``patience`` multiplies ``limits.queue_s``; what it allowed holds until nobody waits any more."""
        self.limits = limits
        self.patience = patience
        self._allowed = 1.0
        self.costs = Costs()
        self.rows = 0
        self.seconds = 0.0

    def glance(self, rows: int) -> None:
        """Raises Overloaded for a call that would be refused if its rows cost what those that wait cost.

        Asked before a call's features are looked up: a refusal must cost next to nothing, or refusing is what the
        server does all day.
        """
        row = self.seconds / self.rows if self.rows else 0.0
        self._check(rows * row, rows, self._batch_of(row))

    def admit(self, kind: Hashable, rows: int) -> float:
        """Counts a call in and returns its estimated seconds; raises Overloaded."""
        cost = self.costs.of(kind, rows)
        self._check(cost, rows, self.batch_rows(kind))
        self.rows += rows
        self.seconds += cost
        return cost

    def _check(self, cost: float, rows: int, batch: int) -> None:
        """Raises Overloaded where ``rows`` of ``cost`` seconds would wait too long; one full ``batch`` may always."""
        limits = self.limits
        # A queue that was allowed to grow has to drain before newcomers are measured by the usual limit again.
        self._allowed = max(self.patience(), self._allowed if self.rows else 1.0)
        # A call that finds nobody waiting is let in whatever it costs, and the next batch may always be a full one.
        too_long = (self.seconds + cost) / limits.at_once > self._allowed * limits.queue_s
        too_long = too_long and self.rows + rows > batch
        if self.rows and (self.rows + rows > limits.queue_rows or too_long):
            seconds = self.seconds / limits.at_once
            wait = f", about {seconds:.1f} s of work" if seconds else ""
            raise Overloaded(
                f"{self.rows} users are waiting already{wait}; try again later, or add replicas",
                retry_after=max(1, math.ceil(seconds)),
            )

    def leave(self, rows: int, cost: float) -> None:
        """Counts a call out: it runs now, or nobody waits for it any more."""
        self.rows -= rows
        self.seconds = max(0.0, self.seconds - cost) if self.rows else 0.0

    def batch_rows(self, kind: Hashable) -> int:
        """How many rows of ``kind`` may share a batch."""
        return self._batch_of(self.costs.of(kind, 1))

    def _batch_of(self, row: float) -> int:
        """The same of rows that take so many seconds."""
        return self.limits.max_rows if row == 0 else max(1, min(self.limits.max_rows, int(self.limits.batch_s / row)))
