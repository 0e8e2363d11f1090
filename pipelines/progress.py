"""Progress of long work: one line a step, with what is going on now and how long it took.

On a terminal the current step is live (Rich); elsewhere each step prints when it begins and ends, so that a log
stays readable.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


@dataclass
class Step:
    """The step under way."""

    title: str
    console: Console
    live: RichProgress | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Says what the step is doing now."""
        self.notes.append(text)
        if self.live is not None:
            self.live.update(self.live.task_ids[0], description=f"{self.title}: {text}")
        else:
            self.console.print(f"    {text}", highlight=False)

    def update(self, done: int, total: int) -> None:
        """Moves the bar."""
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=done, total=total)


@dataclass
class Progress:
    """Steps one after the other, on stderr."""

    console: Console = field(default_factory=lambda: Console(stderr=True))
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """A step with a title; prints its time when it ends well."""
        start = time.monotonic()
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            with RichProgress(*columns, console=self.console, transient=True) as live:
                live.add_task(title, total=None)
                yield Step(title, self.console, live)
        else:
            self.console.print(f"{self._clock()} {title} ...", highlight=False)
            yield Step(title, self.console)
        self.console.print(f"{self._clock()} {title}: {time.monotonic() - start:.1f} s", highlight=False)

    def _clock(self) -> str:
        elapsed = int(time.monotonic() - self.began)
        return f"[{elapsed // 60:02d}:{elapsed % 60:02d}]".replace("[", "\\[")
