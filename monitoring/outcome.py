"""How a pipeline run ended, what it cost and what it was made from: kept by the exit handler, whatever happened.

``runs/<run_id>/outcome.json`` is the whole record. What a person asks of a published bundle lies beside it, under
``models/onerec/<version>/records/``: the gate's decision (JSON and page) before anybody meets it, the outcome after.
Cost is counted in seconds and processor seconds of each stage's own process; what a Ray cluster does elsewhere is not.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from features.provenance import code_version
from features.storage import ObjectMissing, Storage, connect
from monitoring.quality import GATE, GATE_PAGE

STAGE = re.compile(r"runs/[^/]+/([^/]+)/done\.json$")


def record_run(run_id: str, *, pipeline: str, state: str, error: str) -> dict[str, Any]:
    """Stores and returns state, error, cost, lineage, and what was decided and published."""
    storage = connect()
    keys = storage.keys(f"runs/{run_id}/")
    done = {found[1]: storage.get_json(key) for key in keys if (found := STAGE.search(key))}
    version = done.get("publish", {"summary": {}})["summary"].get("version")
    outcome = {
        "run_id": run_id,
        "pipeline": pipeline,
        "state": state,
        "error": error,
        "recorded_at": datetime.now(UTC).isoformat(),
        "stages": sorted(done),
        "decision": _stored(storage, f"runs/{run_id}/{GATE}"),
        "version": version,
        "cost": cost(done),
        "lineage": lineage(storage, run_id, done),
    }
    storage.put_json(f"runs/{run_id}/outcome.json", outcome)
    if version:
        storage.put_json(f"{records(version)}/outcome.json", outcome)
    print(f"run {run_id} of {pipeline}: {state}{f', {error}' if error else ''}; version {version}")
    return outcome


def cost(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Seconds and processor seconds of all stages and of each; of a resumed stage those of its last attempt."""
    stages = {name: record["cost"] for name, record in done.items() if "cost" in record}
    return {**{unit: _total(stages.values(), unit) for unit in ("seconds", "cpu_seconds")}, "stages": stages}


def _total(costs: Iterable[dict[str, float]], unit: str) -> float:
    return round(sum(each[unit] for each in costs), 3)


def lineage(storage: Storage, run_id: str, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Code, parent, window, the segments of data consumed, and the content digest of every stage."""
    manifest = _stored(storage, f"runs/{run_id}/data/manifest.json") or {}
    return {
        "code": code_version(),
        "parents": [base] if (base := done.get("evaluate", {"inputs": {}})["inputs"].get("base")) else [],
        "window": done.get("data", {"inputs": {}})["inputs"],
        "segments": manifest.get("segments", []),
        "digests": {name: record["digest"] for name, record in done.items()},
    }


def keep_records(storage: Storage, run_id: str, version: str) -> None:
    """Copies the gate's decision of the run beside the bundle."""
    for name in (GATE, GATE_PAGE):
        kind = "application/json" if name.endswith("json") else "text/html"
        storage.put(f"{records(version)}/{name.replace('gate/', '')}", storage.get(f"runs/{run_id}/{name}"), kind)


def read_records(storage: Storage, version: str) -> dict[str, dict[str, Any]]:
    """What is told of a bundle, by name: decision, canary, outcome; what was never stored is absent."""
    found = {name: _stored(storage, f"{records(version)}/{name}.json") for name in ("decision", "canary", "outcome")}
    return {name: record for name, record in found.items() if record is not None}


def records(version: str) -> str:
    """Where what is told of a bundle lies: not part of it, and not covered by its manifest."""
    return f"models/onerec/{version}/records"


def _stored(storage: Storage, key: str) -> Any:
    try:
        return storage.get_json(key)
    except ObjectMissing:
        return None
