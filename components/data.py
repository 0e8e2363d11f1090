"""Components: join events to exposures and freeze one window of them as a run's training data."""

from typing import NamedTuple

from components.base import component


@component
def prepare_data(run_id: str, job_id: str, start: str, end: str) -> NamedTuple(  # type: ignore[valid-type]
    "Prepared",
    [("run_id", str), ("data", str)],
):
    """Freezes exposures of [start, end) (ISO 8601, UTC; empty: all there is), every one trained on.

    Returns the run's id, which is ``job_id`` unless ``run_id`` is given, and the digest of its data.
    """
    from models.window import prepare_all

    run = run_id or job_id
    return (run, prepare_all(run, start=start, end=end))


@component
def prepare_window(
    run_id: str, job_id: str, start: str, reference_start: str, current_start: str, end: str, base: str, targets: str
) -> NamedTuple(  # type: ignore[valid-type]
    "Window",
    [("run_id", str), ("data", str), ("reference_start", str), ("current_start", str), ("base", str)],
):
    """Chooses what of the newest window is not given, once a run, and freezes it.

    ``base`` is a version, an alias such as ``production``, or empty for none; ``targets`` says what is trained on:
    "new" is from ``reference_start`` on, what came before gives contexts only; "all" is the whole window.
    """
    from models.window import prepare_newest

    given = {"start": start, "reference_start": reference_start, "current_start": current_start, "end": end}
    chosen, data = prepare_newest(run_id or job_id, given, base=base, targets=targets)
    return (run_id or job_id, data, chosen["reference_start"], chosen["current_start"], chosen["base"])
