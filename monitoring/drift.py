"""Drift of exposures and predictions, measured by Evidently, and the decision to retrain that follows from it.

Scores are effect sizes (PSI, normed Wasserstein, Jensen-Shannon), never p-values: those fire on any large
sample. A window below the minimum of rows gives the verdict "insufficient data", not a guess. Where both windows
hold enough exposures from one source of traffic (our own model first) those are compared, so that a change in the
traffic mix is not taken for a change of the world.
"""

import logging
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.runs import Run
from features.schema import SOURCES
from features.settings import settings
from features.storage import connect

log = logging.getLogger(__name__)

MINIMUM_ROWS = 500
COMMON_TAGS = 20
"""Tags beyond the reference's most engaged ones count as one: a distance over many rare categories is mostly noise."""
DRIFT, STABLE, INSUFFICIENT = "drift", "stable", "insufficient data"


@dataclass(frozen=True, kw_only=True)
class Column:
    """How one column is tested; only ``decides`` columns count for the verdict."""

    name: str
    method: str
    threshold: float
    categorical: bool = False
    decides: bool = True


COLUMNS = (
    Column(name="play_ratio", method="psi", threshold=0.03),
    Column(name="long_view", method="psi", threshold=0.02),
    Column(name="engaged_tag", method="jensenshannon", threshold=0.15, categorical=True),
    Column(name="duration_s", method="psi", threshold=0.20),
    Column(name="like", method="psi", threshold=0.02),
    Column(name="dislike", method="psi", threshold=0.02),
    Column(name="log_prob", method="wasserstein", threshold=0.25, decides=False),
    Column(name="sid_1", method="jensenshannon", threshold=0.25, categorical=True, decides=False),
)
"""Thresholds are ours, set on quiet and drifting weeks of the simulator (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """The verdict, the score of each column, and how many rows were compared."""

    verdict: str
    reason: str
    rows_reference: int
    rows_current: int
    columns: dict[str, dict[str, Any]]
    html: str


def frame(exposures: pa.Table, items: pa.Table) -> pd.DataFrame:
    """Scalars per exposure that drift is measured on: list columns cannot be tested."""
    duration = exposures["duration_ms"].to_numpy().astype(np.float64)
    play = exposures["play_ms"].to_numpy().astype(np.float64)
    long_view = exposures["long_view"].to_numpy(zero_copy_only=False)
    tags = {
        item: (tag[0] if tag else "none")
        for item, tag in zip(items["item_id"].to_pylist(), items["tags"].to_pylist(), strict=True)
    }
    tag = np.array([tags.get(item, "unknown") for item in exposures["item_id"].to_pylist()], object)
    log_probs = pd.Series(exposures["log_probs"].to_pylist(), dtype=object)
    sids = pd.Series(exposures["sid"].to_pylist(), dtype=object)
    return pd.DataFrame(
        {
            "play_ratio": np.clip(play / np.maximum(duration, 1), 0, 3),
            "long_view": long_view.astype(float),
            "engaged_tag": pd.Series(tag).where(long_view),
            "duration_s": duration / 1000,
            "like": exposures["like"].to_numpy(zero_copy_only=False).astype(float),
            "dislike": exposures["dislike"].to_numpy(zero_copy_only=False).astype(float),
            "log_prob": log_probs.map(lambda values: float(np.sum(values)) if values is not None else np.nan),
            "sid_1": sids.map(lambda sid: str(sid[0]) if sid is not None and len(sid) else None),
        }
    )


def comparable(reference: pa.Table, current: pa.Table, minimum_rows: int) -> tuple[pa.Table, pa.Table]:
    """Both windows cut to one source of traffic with enough rows in each, our own model's if possible; else empty."""
    for source in SOURCES:
        pair = tuple(table.filter(pc.equal(table["source"], source)) for table in (reference, current))
        if min(table.num_rows for table in pair) >= minimum_rows:
            return pair[0], pair[1]
    return reference.slice(0, 0), current.slice(0, 0)


def measure(
    reference: pa.Table,
    current: pa.Table,
    items: pa.Table,
    *,
    minimum_rows: int = MINIMUM_ROWS,
    workspace: Path | str | None = None,
) -> DriftReport:
    """Compares two windows of exposures; stores a snapshot in the Evidently workspace, a folder or a server's URL."""
    rows = {"rows_reference": reference.num_rows, "rows_current": current.num_rows}
    reference, current = comparable(reference, current, minimum_rows)
    if not current.num_rows:
        reason = (
            f"no source of traffic has {minimum_rows} exposures in both windows "
            f"({rows['rows_current']} current, {rows['rows_reference']} reference in all)"
        )
        return DriftReport(verdict=INSUFFICIENT, reason=reason, **rows, columns={}, html=_plain_page(reason))
    frames = frame(reference, items), frame(current, items)
    common = frames[0]["engaged_tag"].value_counts().index[:COMMON_TAGS]
    for each in frames:
        rare = each["engaged_tag"].notna() & ~each["engaged_tag"].isin(common)
        each.loc[rare, "engaged_tag"] = "other"
    tested = [c for c in COLUMNS if min(f[c.name].notna().sum() for f in frames) >= minimum_rows // 5]
    snapshot = _evidently(frames[0], frames[1], tested)
    if workspace is not None:
        _keep(snapshot, workspace)
    columns = {}
    for column, metric in zip(tested, snapshot.dict()["metrics"], strict=True):
        score = float(metric["value"])
        columns[column.name] = {
            "method": column.method,
            "score": score,
            "threshold": column.threshold,
            "drifted": bool(score >= column.threshold),
            "decides": column.decides,
        }
    drifted = [name for name, result in columns.items() if result["drifted"] and result["decides"]]
    verdict = DRIFT if drifted else STABLE
    reason = f"drifted: {', '.join(drifted)}" if drifted else "no deciding column passed its threshold"
    return DriftReport(
        verdict=verdict, reason=reason, **rows, columns=columns, html=snapshot.get_html_str(as_iframe=False)
    )


def _evidently(reference: pd.DataFrame, current: pd.DataFrame, tested: list[Column]) -> Any:
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    definition = DataDefinition(
        numerical_columns=[c.name for c in tested if not c.categorical],
        categorical_columns=[c.name for c in tested if c.categorical],
    )
    names = [c.name for c in tested]
    datasets = [Dataset.from_pandas(f[names], data_definition=definition) for f in (current, reference)]
    metrics: list[Any] = [ValueDrift(column=c.name, method=c.method, threshold=c.threshold) for c in tested]
    return Report(metrics, include_tests=True).run(datasets[0], datasets[1])


def _keep(snapshot: Any, workspace: Path | str) -> None:
    """History for people; the verdict is stored elsewhere, so a server that is away costs a warning."""
    try:
        _store(snapshot, workspace)
    except (OSError, ValueError) as error:
        if isinstance(workspace, Path):
            raise
        log.warning("drift is measured, but its history at %s misses this run: %s", workspace, error)


def _store(snapshot: Any, workspace: Path | str) -> None:
    from evidently.ui.workspace import RemoteWorkspace, Workspace

    store = Workspace.create(str(workspace)) if isinstance(workspace, Path) else RemoteWorkspace(workspace)
    projects = [project for project in store.list_projects() if project.name == "exposures"]
    project = projects[0] if projects else store.create_project("exposures", "Drift of exposures and predictions")
    store.add_run(project.id, snapshot)


def _plain_page(reason: str) -> str:
    return f"<!doctype html><meta charset=utf-8><title>Drift</title><h1>{INSUFFICIENT}</h1><p>{reason}</p>"


def _workspace() -> Path | str:
    """On one machine the interface reads this home's folder; a pod has none, and sends what it found to the server."""
    folder = settings().home / "evidently"
    return folder if folder.exists() or not settings().evidently_url else settings().evidently_url


def drift_run(run_id: str, *, data: str, reference_start: str, current_start: str) -> str:
    """The component's body: measures drift on the run's data, stores the verdict, returns the HTML page."""
    run = Run(connect(), run_id)
    pages: list[str] = []

    def work(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            source = run.fetch("data", Path(scratch))
            exposures = pq.read_table(source / "exposures.parquet")
            items = pq.read_table(source / "items.parquet")
        split, first = (
            pa.scalar(datetime.fromisoformat(t), exposures.schema.field("event_time").type)
            for t in (current_start, reference_start)
        )
        time = exposures["event_time"]
        reference = exposures.filter(pc.and_(pc.greater_equal(time, first), pc.less(time, split)))
        current = exposures.filter(pc.greater_equal(time, split))
        report = measure(reference, current, items, workspace=_workspace())
        (folder / "report.html").write_text(report.html, encoding="utf-8")
        pages.append(report.html)
        return {name: value for name, value in asdict(report).items() if name != "html"}

    run.stage("drift", {"data": data, "reference_start": reference_start, "current_start": current_start}, work)
    return pages[0] if pages else run.storage.get(f"{run.prefix('drift')}/report.html").decode()


def decide_run(run_id: str, policy: str) -> bool:
    """Turns the stored verdict into "retrain?"; the decision is written beside it."""
    if policy not in ("nightly", "on_drift"):
        raise ValueError(f"policy {policy!r} is unknown; give 'nightly' or 'on_drift'")
    run = Run(connect(), run_id)
    summary = run.summary("drift")
    verdict = summary["verdict"]
    enough = summary["rows_current"] >= MINIMUM_ROWS
    retrain = verdict == DRIFT or (policy == "nightly" and enough)
    record = {"retrain": retrain, "policy": policy, "verdict": verdict, "reason": summary["reason"]}
    run.storage.put_json(f"runs/{run_id}/drift_decision/decision.json", record)
    print(f"retrain: {retrain} ({verdict}; {summary['reason']}; policy {policy})")
    return retrain
