"""Components: compare the newest exposures with the training window, and decide whether to retrain."""

from kfp import dsl

from components.base import component


@component
def detect_drift(
    run_id: str, data: str, reference_start: str, current_start: str, report: dsl.Output[dsl.HTML]
) -> None:
    """Evidently's verdict on exposures since ``current_start`` against those from ``reference_start`` to it."""
    from monitoring.drift import drift_run

    page = drift_run(run_id, data=data, reference_start=reference_start, current_start=current_start)
    with open(report.path, "w", encoding="utf-8") as file:  # noqa: PTH123 - kfp copies this body into a file of its own
        file.write(page)


@component
def should_retrain(run_id: str, policy: str) -> bool:
    """The verdict turned into a decision: policy "nightly" retrains on enough new rows, "on_drift" on drift only."""
    from monitoring.drift import decide_run

    return decide_run(run_id, policy)
