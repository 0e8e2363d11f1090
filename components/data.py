"""Component: join events to exposures and freeze one window of them as a run's training data."""

from components.base import component


@component
def prepare_data(run_id: str, start: str, end: str, targets_from: str) -> str:
    """Freezes exposures of [start, end) (ISO 8601, UTC), trained on from ``targets_from`` on; returns the digest."""
    from features.snapshot import prepare

    return prepare(run_id, start, end, targets_from)
