"""The daily report: what happened up to a day, on one HTML page that opens without a network.

Users, stay time by who answered, feedback, drift scores, decisions of trigger and gate, canaries and intake by hour,
read from object storage. Days are UTC days of the log, whose clock need not be the wall's. Left out: what needs the
whole history; Evidently's workspace has every drift snapshot, Grafana every metric.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from features.intake import exposures as exposure_store
from features.schema import FLAGS
from features.storage import ObjectMissing, Storage
from monitoring import trial, trigger
from monitoring.page import page, plots
from monitoring.quality import GATE

DAYS = 14
COLUMNS = ("user_id", "event_time", "source", "model_version", "play_ms", *FLAGS)
SHOWN_FLAGS = ("long_view", "like", "follow", "comment", "forward", "dislike")
LAYOUT = {"height": 340, "legend": {"orientation": "h", "y": 1.14}}


class NothingStored(ValueError):
    """The days asked for hold no exposure."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """What one run of the retraining pipeline decided, as far as it came."""

    run_id: str
    window_end: str
    retrain: bool
    reason: str
    drift: dict[str, Any]
    gate: dict[str, Any]
    version: str
    state: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a report is drawn from; ``exposures`` has a column ``day`` and ``answered_by`` (source and version)."""

    day: date
    exposures: pd.DataFrame
    nights: Sequence[Night]
    canaries: Sequence[trial.Trial]


def gather(storage: Storage, day: date, days: int = DAYS) -> Facts:
    """Facts of the ``days`` up to and with ``day``; raises NothingStored when they hold no exposure."""
    end = datetime.combine(day + timedelta(days=1), time(), UTC)
    start = end - timedelta(days=days)
    rows = exposure_store.read(storage, start, end, COLUMNS)
    if not rows.num_rows:
        raise NothingStored(f"no exposure is stored between {start:%Y-%m-%d} and {end:%Y-%m-%d}; give another --day")
    canaries = trial.ended(storage)
    under_way = trial.read(storage)
    since = start.isoformat()
    return Facts(
        day=day,
        exposures=_labelled(rows),
        nights=[_night(storage, made) for made in trigger.decisions(storage, end, days)],
        canaries=[each for each in [*canaries, *([under_way] if under_way else [])] if each.started >= since],
    )


def write_day(storage: Storage, day: date, path: Path, days: int = DAYS) -> Path:
    """Draws the report of ``day`` into ``path``; raises NothingStored."""
    text = render(gather(storage, day, days))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _labelled(rows: pa.Table) -> pd.DataFrame:
    frame = rows.to_pandas()
    frame["day"] = frame["event_time"].dt.date
    frame["answered_by"] = frame["source"].where(
        frame["model_version"].isna() | (frame["source"] != "onerec"), frame["model_version"]
    )
    return frame


def _night(storage: Storage, made: dict[str, Any]) -> Night:
    run_id = made["run_id"]
    stored = {
        name: _stored(storage, f"runs/{run_id}/{name}")
        for name in ("drift/done.json", GATE, "publish/done.json", "outcome.json")
    }
    return Night(
        run_id=run_id,
        window_end=made["window_end"],
        retrain=bool(made.get("retrain")),
        reason=str(made.get("reason", "not decided yet")),
        drift=stored["drift/done.json"].get("summary", {}),
        gate=stored[GATE],
        version=str(stored["publish/done.json"].get("summary", {}).get("version", "")),
        state=str(stored["outcome.json"].get("state", "")),
    )


def render(facts: Facts) -> str:
    """The whole page."""
    rows = facts.exposures
    sections = [
        ("Users", _users(rows), "People with at least one exposure on the day."),
        ("Stay time", _stay(rows), "Minutes watched a user who came, by who answered: a model's version or a source."),
        ("Share of the exposures", _share(rows), "Who answered how much of the day."),
        ("Feedback", _feedback(rows), "Share of the day's exposures; dislikes: lower is better."),
        ("Drift", _drift(facts.nights), "Score over its threshold by the end of the window; above 1 is drift."),
        ("Gate", _gates(facts.nights), "Thresholds that each candidate passed and failed; red was refused."),
        (
            "Intake",
            _intake(rows, facts.day),
            "Exposures stored an hour, on the day of the report and before.",
        ),
    ]
    body = f"{_head(facts)}{plots(sections, LAYOUT)}{_nights(facts.nights)}{_canaries(facts.canaries)}"
    return page(f"OneRec, {facts.day}", body)


def _head(facts: Facts) -> str:
    rows = facts.exposures
    today, before = (rows[rows["day"] == day] for day in (facts.day, facts.day - timedelta(days=1)))
    cards = [
        _card("users", _distinct(today), _distinct(before), "{:,.0f}"),
        _card("minutes a user", _minutes(today), _minutes(before), "{:.2f}"),
        _card("exposures", float(len(today)), float(len(before)), "{:,.0f}"),
        _card("long views", _rate(today, "long_view"), _rate(before, "long_view"), "{:.1%}"),
        _card("dislikes", _rate(today, "dislike"), _rate(before, "dislike"), "{:.2%}"),
    ]
    return f"<h1>OneRec, {facts.day:%A %d %B %Y}</h1><div class=cards>{''.join(cards)}</div>"


def _card(name: str, now: float | None, before: float | None, form: str) -> str:
    shown = form.format(now) if now is not None else "none"
    change = f"{now / before - 1:+.1%} on the day before" if now is not None and before else "nothing the day before"
    return f"<div class=card>{html.escape(name)}<b>{shown}</b>{change}</div>"


def _distinct(rows: pd.DataFrame) -> float:
    return float(rows["user_id"].nunique())


def _minutes(rows: pd.DataFrame) -> float | None:
    return float(rows["play_ms"].sum() / 60_000 / rows["user_id"].nunique()) if len(rows) else None


def _rate(rows: pd.DataFrame, flag: str) -> float | None:
    return float(rows[flag].mean()) if len(rows) else None


def _users(rows: pd.DataFrame) -> go.Figure:
    count = rows.groupby("day")["user_id"].nunique()
    return _axes(go.Figure(go.Bar(x=count.index, y=count, marker_color="#1f6feb")), "users")


def _stay(rows: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    grouped = rows.groupby(["answered_by", "day"]).agg(play=("play_ms", "sum"), users=("user_id", "nunique"))
    for name in sorted(rows["answered_by"].unique()):
        own = grouped.loc[name]
        figure.add_trace(
            go.Scatter(x=own.index, y=own["play"] / 60_000 / own["users"], name=name, mode="lines+markers")
        )
    return _axes(figure, "minutes a user who came")


def _share(rows: pd.DataFrame) -> go.Figure:
    share = rows.groupby("day")["answered_by"].value_counts(normalize=True).unstack(fill_value=0)
    figure = go.Figure([go.Bar(x=share.index, y=share[name], name=name) for name in share.columns])
    figure.update_layout(barmode="stack")
    return _axes(figure, "share of the exposures")


def _feedback(rows: pd.DataFrame) -> go.Figure:
    rates = rows.groupby("day")[list(SHOWN_FLAGS)].mean()
    figure = go.Figure([go.Scatter(x=rates.index, y=rates[name], name=name) for name in SHOWN_FLAGS])
    return _axes(figure, "share of the exposures")


def _drift(nights: Sequence[Night]) -> go.Figure | None:
    measured = [night for night in nights if night.drift.get("columns")]
    names = sorted({name for night in measured for name in night.drift["columns"]})
    if not names:
        return None
    figure = go.Figure()
    for name in names:
        own = [(night.window_end, night.drift["columns"][name]) for night in measured if name in night.drift["columns"]]
        label = name if own[0][1]["decides"] else f"{name} (shown only)"
        scores = [about["score"] / about["threshold"] for _, about in own]
        figure.add_trace(go.Scatter(x=[end for end, _ in own], y=scores, name=label, mode="lines+markers"))
    figure.add_hline(y=1, line_dash="dash", line_color="#cf222e")
    return _axes(figure, "score / threshold")


def _gates(nights: Sequence[Night]) -> go.Figure | None:
    judged = [night for night in nights if night.gate]
    if not judged:
        return None
    colours = ["#2da44e" if night.gate.get("blessed") else "#cf222e" for night in judged]
    failed = [len(night.gate.get("failed", ())) for night in judged]
    figure = go.Figure(
        go.Bar(
            x=[night.window_end for night in judged],
            y=[len(night.gate.get("passed", ())) for night in judged],
            marker_color=colours,
            name="thresholds passed",
        )
    )
    figure.add_trace(go.Scatter(x=[n.window_end for n in judged], y=failed, name="failed", mode="markers"))
    return _axes(figure, "thresholds")


def _intake(rows: pd.DataFrame, day: date) -> go.Figure:
    figure = go.Figure()
    for each, colour in ((day - timedelta(days=1), "#8b949e"), (day, "#1f6feb")):
        own = rows[rows["day"] == each]
        count = own.groupby(own["event_time"].dt.hour).size().reindex(range(24), fill_value=0)
        figure.add_trace(go.Bar(x=count.index, y=count, name=str(each), marker_color=colour))
    figure.update_xaxes(title="hour (UTC)", dtick=2)
    figure.update_yaxes(title="exposures", rangemode="tozero")
    return figure


def _axes(figure: go.Figure, title: str) -> go.Figure:
    figure.update_yaxes(title=title, rangemode="tozero")
    figure.update_xaxes(title="day")
    return figure


def _nights(nights: Sequence[Night]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(night.window_end[:16])}</td><td class=text>{html.escape(night.run_id)}</td>"
        f"<td class=text>{html.escape(str(night.drift.get('verdict', '')))}</td>"
        f"<td class=text>{'retrain' if night.retrain else 'no'}: {html.escape(night.reason)}</td>"
        f"<td class=text>{_gate(night.gate)}</td><td class=text>{html.escape(night.version or '-')}</td>"
        f"<td class=text>{html.escape(night.state.lower() or 'open')}</td></tr>"
        for night in nights
    )
    head = "".join(f"<th>{name}</th>" for name in ("window end", "run", "drift", "trigger", "gate", "version", "state"))
    return f"<h2>Decisions</h2><table><tr>{head}</tr>{rows}</table>" if nights else "<h2>Decisions</h2><p>None.</p>"


def _gate(decision: dict[str, Any]) -> str:
    if not decision:
        return "-"
    return "blessed" if decision.get("blessed") else f"refused: {html.escape('; '.join(decision.get('failed', ())))}"


def _canaries(canaries: Sequence[trial.Trial]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(each.started[:16])}</td><td class=text>{html.escape(each.version)}</td>"
        f"<td class=text>{html.escape(each.status)}</td><td>{len(each.looks)}</td>"
        f"<td class=text>{html.escape(each.reason)}</td></tr>"
        for each in canaries
    )
    head = "".join(f"<th>{name}</th>" for name in ("since", "version", "end", "looks", "why"))
    return f"<h2>Canaries</h2><table><tr>{head}</tr>{rows}</table>" if canaries else ""


def _stored(storage: Storage, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = storage.get_json(key)
    except ObjectMissing:
        return {}
    return found
