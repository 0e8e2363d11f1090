"""Drift of exposures, features, predictions and reward, measured by Evidently, and what follows from it.

Scores are effect sizes (PSI, normed Wasserstein, Jensen-Shannon), never p-values: those fire on any large
sample. Among few rows a score has to be more than chance as well (``monitoring.chance``). A window below the minimum
of rows gives the verdict "insufficient data", not a guess. Where both windows hold enough exposures from one source
of traffic (our own model first) those are compared, so that a change in the traffic mix is not taken for a change of
the world. The data gate (``monitoring.validation``) looks at the same windows, the trigger (``monitoring.trigger``)
decides on both.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.intake import partitions
from features.runs import Run
from features.schema import SOURCES
from features.settings import settings
from features.storage import connect
from monitoring import trigger
from monitoring.chance import levels
from monitoring.columns import COLUMNS, Column, contexts, frame, rewarded
from monitoring.trigger import DRIFT, INSUFFICIENT, STABLE
from monitoring.validation import Validation, validate

log = logging.getLogger(__name__)

MINIMUM_ROWS = 500
COMMON_TAGS = 20
"""Tags beyond the reference's most engaged ones count as one: a distance over many rare categories is mostly noise."""


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """The verdict, the score of each column, how many rows were compared, and what the data gate says of them."""

    verdict: str
    reason: str
    rows_reference: int
    rows_current: int
    columns: dict[str, dict[str, Any]]
    html: str
    validation: Validation = field(default_factory=lambda: Validation(passed=True, failed=(), measures={}))
    rows_by_hour: dict[str, int] = field(default_factory=dict)
    """Exposures of the newest window by the hour in which they began."""


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
    before: pa.Table | None = None,
    minimum_rows: int = MINIMUM_ROWS,
    workspace: Path | str | None = None,
) -> DriftReport:
    """Compares two windows of exposures; stores a snapshot in the Evidently workspace, a folder or a server's URL.

    ``before`` holds the exposures earlier than both, from which the contexts are told; without it they are left out.
    """
    rows: dict[str, Any] = {"rows_reference": reference.num_rows, "rows_current": current.num_rows}
    rows |= {"validation": validate(reference, current), "rows_by_hour": by_hour(current)}
    known = _with_contexts(before, reference, current) if before is not None else {}
    reference, current = comparable(reference, current, minimum_rows)
    if not current.num_rows:
        reason = (
            f"no source of traffic has {minimum_rows} exposures in both windows "
            f"({rows['rows_current']} current, {rows['rows_reference']} reference in all)"
        )
        return DriftReport(verdict=INSUFFICIENT, reason=reason, **rows, columns={}, html=_plain_page(reason))
    frames = frame(reference, items), frame(current, items)
    for each, table in zip(frames, (reference, current), strict=True):
        each["reward"] = rewarded(frames[0], each)
        found = table["exposure_id"].to_pandas()
        for name in ("history_views", "history_positive"):
            each[name] = found.map(known[name]) if known else np.nan
    common = frames[0]["engaged_tag"].value_counts().index[:COMMON_TAGS]
    for each in frames:
        rare = each["engaged_tag"].notna() & ~each["engaged_tag"].isin(common)
        each.loc[rare, "engaged_tag"] = "other"
    tested = [c for c in COLUMNS if min(f[c.name].notna().sum() for f in frames) >= minimum_rows // 5]
    tested = _above_chance(tested, frames, (reference, current))
    snapshot = _evidently(frames[0], frames[1], tested)
    if workspace is not None:
        _keep(snapshot, workspace)
    columns = _scores(tested, snapshot)
    drifted = [name for name, result in columns.items() if result["drifted"] and result["decides"]]
    verdict = DRIFT if drifted else STABLE
    reason = f"drifted: {', '.join(drifted)}" if drifted else "no deciding column passed its threshold"
    return DriftReport(
        verdict=verdict, reason=reason, **rows, columns=columns, html=snapshot.get_html_str(as_iframe=False)
    )


def _above_chance(
    tested: Sequence[Column], frames: tuple[pd.DataFrame, pd.DataFrame], tables: tuple[pa.Table, pa.Table]
) -> list[Column]:
    """The columns, no deciding one with a threshold that chance passes among so few rows (``monitoring.chance``)."""
    rows = (table.select(["user_id", "event_time"]).to_pandas() for table in tables)
    before, now = (each["user_id"].str.cat(each["event_time"].dt.floor("D").astype(str), sep=" ") for each in rows)
    by_chance = levels({c.name: c.method for c in tested if c.decides}, *frames, (before, now))
    return [replace(c, threshold=max(c.threshold, by_chance.get(c.name, 0.0))) for c in tested]


def by_hour(exposures: pa.Table) -> dict[str, int]:
    """Exposures by the hour in which they began, ISO 8601."""
    counted = pc.value_counts(pc.floor_temporal(exposures["event_time"], unit="hour")).to_pylist()
    counts = {row["values"].astimezone(UTC).isoformat(): int(row["counts"]) for row in counted}
    return dict(sorted(counts.items()))


def _with_contexts(*tables: pa.Table) -> dict[str, pd.Series]:
    """The columns of ``contexts`` by exposure_id."""
    rows = pa.concat_tables(tables)
    found = contexts(rows).set_index(rows["exposure_id"].to_pandas())
    once = found[~found.index.duplicated()]
    return {str(name): once[name] for name in once}


def _scores(tested: list[Column], snapshot: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for column, metric in zip(tested, snapshot.dict()["metrics"], strict=True):
        score = float(metric["value"])
        found[column.name] = {
            "method": column.method,
            "score": score,
            "threshold": column.threshold,
            "drifted": bool(score >= column.threshold),
            "decides": column.decides,
        }
    return found


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
        before = exposures.filter(pc.less(time, first))
        reference = exposures.filter(pc.and_(pc.greater_equal(time, first), pc.less(time, split)))
        current = exposures.filter(pc.greater_equal(time, split))
        report = measure(reference, current, items, before=before, workspace=_workspace())
        (folder / "report.html").write_text(report.html, encoding="utf-8")
        pages.append(report.html)
        told = {name: value for name, value in asdict(report).items() if name != "html"}
        return {**told, "window_end": _window_end(run, report.rows_by_hour)}

    run.stage("drift", {"data": data, "reference_start": reference_start, "current_start": current_start}, work)
    return pages[0] if pages else run.storage.get(f"{run.prefix('drift')}/report.html").decode()


def _window_end(run: Run, rows_by_hour: dict[str, int]) -> str:
    """Where the run's data end: as it was asked for, else after the newest exposure."""
    record = run.done("data")
    given = record["inputs"].get("end") if record else ""
    return partitions.utc(datetime.fromisoformat(given or max(rows_by_hour))).isoformat()


def decide_run(run_id: str, policy: str) -> bool:
    """Turns the stored verdict into "retrain?" (``monitoring.trigger``); the decision is written beside it."""
    chosen = trigger.parse(policy)
    run = Run(connect(), run_id)
    summary = run.summary("drift")
    made = trigger.decide_once(run.storage, run_id, chosen, summary)
    record = {**made, "policy": policy, "verdict": summary["verdict"]}
    run.storage.put_json(f"runs/{run_id}/drift_decision/decision.json", record)
    print(f"retrain: {record['retrain']} ({record['reason']}; policy {policy})")
    for sentence in record["checks"]:
        print(f"  {sentence}")
    return bool(record["retrain"])
