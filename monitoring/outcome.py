"""How a pipeline run ended: what the exit handler keeps under ``runs/<run_id>/outcome.json``, whatever happened."""

import re
from datetime import UTC, datetime
from typing import Any

from features.storage import Storage, connect

STAGE = re.compile(r"runs/[^/]+/([^/]+)/done\.json$")


def record_run(run_id: str, *, pipeline: str, state: str, error: str) -> dict[str, Any]:
    """Stores and returns state, error, the stages that finished and what was decided and published."""
    storage = connect()
    stages = sorted(found[1] for key in storage.keys(f"runs/{run_id}/") if (found := STAGE.search(key)))
    outcome = {
        "run_id": run_id,
        "pipeline": pipeline,
        "state": state,
        "error": error,
        "recorded_at": datetime.now(UTC).isoformat(),
        "stages": stages,
        "decision": _stored(storage, f"runs/{run_id}/gate/decision.json"),
        "version": (_stored(storage, f"runs/{run_id}/publish/done.json") or {"summary": {}})["summary"].get("version"),
    }
    storage.put_json(f"runs/{run_id}/outcome.json", outcome)
    print(f"run {run_id} of {pipeline}: {state}{f', {error}' if error else ''}; version {outcome['version']}")
    return outcome


def _stored(storage: Storage, key: str) -> Any:
    return storage.get_json(key) if storage.exists(key) else None
