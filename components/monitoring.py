"""Components: compare the newest exposures with the training window, decide whether to retrain, record the outcome."""

from kfp import dsl

from components.base import light


@light
def detect_drift(
    run_id: str, data: str, reference_start: str, current_start: str, report: dsl.Output[dsl.HTML]
) -> None:
    """Evidently's verdict on exposures since ``current_start`` against those from ``reference_start`` to it."""
    from monitoring.drift import drift_run

    page = drift_run(run_id, data=data, reference_start=reference_start, current_start=current_start)
    with open(report.path, "w", encoding="utf-8") as file:  # noqa: PTH123 - kfp copies this body into a file of its own
        file.write(page)


@light
def should_retrain(run_id: str, policy: str) -> bool:
    """The verdict turned into a decision: policy "nightly" retrains on enough new rows, "on_drift" on drift only."""
    from monitoring.drift import decide_run

    return decide_run(run_id, policy)


@light
def record_outcome(run_id: str, job_id: str, pipeline: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """The exit handler: how the run ended, whatever happened in it."""
    from monitoring.outcome import record_run

    record_run(run_id or job_id, pipeline=pipeline, state=status.state, error=status.error_message or "")
