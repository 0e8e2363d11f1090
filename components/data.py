"""Components: join events to exposures, look at the canary with them, freeze one window as a run's training data."""

from typing import NamedTuple

from components.base import component


@component
def prepare_data(run_id: str, job_id: str, start: str, end: str, against: str) -> NamedTuple(  # type: ignore[valid-type]
    "Prepared",
    [("run_id", str), ("data", str), ("base", str)],
):
    """Freezes exposures of [start, end) (ISO 8601, UTC; empty: all there is), every one trained on.

    Returns the run's id, which is ``job_id`` unless ``run_id`` is given, the digest of its data, and the version behind
    the alias ``against``, empty when there is none: what the outcome is compared with.
    """
    from models.window import prepare_all

    run = run_id or job_id
    chosen, data = prepare_all(run, start=start, end=end, against=against)
    return (run, data, chosen["base"])


@component
def prepare_window(
    run_id: str, job_id: str, start: str, reference_start: str, current_start: str, end: str, base: str, targets: str
) -> NamedTuple(  # type: ignore[valid-type]
    "Window",
    [("run_id", str), ("data", str), ("reference_start", str), ("current_start", str), ("base", str)],
):
    """Takes the look that is due at the canary under way, chooses what of the newest window is not given, freezes it.

    The look comes first, because it may put another model into production, which this run then goes on from.
    ``base`` is a version, an alias such as ``production``, or empty for none; ``targets`` says what is trained on:
    "new" is from ``reference_start`` on, what came before gives contexts only; "all" is the whole window.
    """
    from models.steering import follow_canary
    from models.window import prepare_newest

    follow_canary(end)
    given = {"start": start, "reference_start": reference_start, "current_start": current_start, "end": end}
    chosen, data = prepare_newest(run_id or job_id, given, base=base, targets=targets)
    return (run_id or job_id, data, chosen["reference_start"], chosen["current_start"], chosen["base"])
