"""The schedules of one machine: ``onerec schedule run`` waits for the next time of any and runs its pipeline.

One run at a time; what was missed meanwhile, or while nobody ran this, is not caught up: the newest window holds its
data.
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pipelines.local import PipelineFailed, run
from pipelines.schedules import Schedule, kept

LOOK_SECONDS = 5.0
"""How soon a changed file is noticed."""


class AlreadyScheduling(RuntimeError):
    """Another process runs the schedules of this folder."""


def watch(home: Path, say: Callable[[str], None], now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
    """Runs what is due, for ever; raises AlreadyScheduling."""
    with _alone(home):
        after = now()
        while True:
            schedule, at = due(list(kept(home).schedules), after)
            if schedule is None or at > now():
                time.sleep(LOOK_SECONDS)
                continue
            start(schedule, at, home, say)
            after = now()


def due(schedules: list[Schedule], after: datetime) -> tuple[Schedule | None, datetime]:
    """The schedule that is next after ``after``, and when."""
    times = [(schedule.following(after), schedule.name, schedule) for schedule in schedules]
    if not times:
        return None, after
    at, _, schedule = min(times, key=lambda entry: entry[:2])
    return schedule, at


def start(schedule: Schedule, at: datetime, home: Path, say: Callable[[str], None]) -> bool:
    """Runs the pipeline of ``schedule``; returns whether it ended well. A failure does not end the schedules."""
    run_id = f"{schedule.name}-{at:%Y%m%d%H%M%S}"
    log = home / "logs" / f"{run_id}.log"
    say(f"{schedule.name}: {schedule.pipeline} as run {run_id}, log {log}")
    try:
        run(schedule.pipeline, {**schedule.parameters, "run_id": run_id}, log)
    except PipelineFailed as error:
        say(f"{schedule.name}: {error}")
        return False
    say(f"{schedule.name}: run {run_id} ended well")
    return True


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    with (home / "scheduler.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyScheduling(f"another `onerec schedule run` works on {home}; stop it first") from error
        yield
