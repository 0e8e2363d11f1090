"""The loop's report: one HTML file with plots that opens without a network.

Input is the JSON that ``pipelines.loop`` writes (``loop.json``), so a report can be redrawn at any time. Left out:
interactive filtering beyond what plotly offers.
"""

import html
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from monitoring.page import page, plots

COLOURS = {"onerec": "#1f6feb", "frozen": "#8b949e", "cascade": "#d29922"}
LABELS = {"onerec": "OneRec, retrained nightly", "frozen": "OneRec, frozen at day 1", "cascade": "Cascade, retrained"}
SHOWN = {
    "model": "the likeliest of what it generates",
    "reward": "what it generates by P-Score",
    "stay": "what it generates and predicts to be watched longest",
}
"""What each way to select (``models.serving.selection``) means to a reader."""
INTERACTIONS = ("like", "follow", "comment", "forward", "collect", "profile_enter", "dislike")
LAYOUT = {"height": 380, "legend": {"orientation": "h", "y": 1.12}}
"""Plotly's, of every plot."""


def write(result: dict[str, Any], path: Path) -> Path:
    """Writes the page for a loop's result to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result), encoding="utf-8")
    return path


def render(result: dict[str, Any]) -> str:
    """The whole page as a string."""
    sections = [
        ("Stay time per user and day", _stay(result), "Minutes, mean over all users of the arm with a 95 % interval."),
        ("Interactions", _interactions(result), "Per 1 000 views over all days; dislikes: lower is better."),
        ("Coming back: LT7", _lt7(result), "Days with a visit within the last seven, mean over users."),
        ("Candidate quality each night", _quality(result), "On held-out requests, through the serving recommender."),
        ("Cold-start share", _cold(result), "Share of shown items with few earlier exposures: a guard-rail."),
        ("Drift", _drift(result), "Evidently's score over its threshold; above 1 is drift."),
        ("Training", _training(result), "Loss per step of every training stage."),
    ]
    body = f"{_head(result)}{plots(sections, LAYOUT)}{_nights(result)}{_raw(result)}"
    return page("OneRec loop report", body)


def _head(result: dict[str, Any]) -> str:
    comparisons = result["comparisons"]
    cards = []
    for name, label in (
        ("onerec_over_frozen", "over frozen, after the drift"),
        ("onerec_over_cascade", "over cascade"),
    ):
        if name in comparisons:
            c = comparisons[name]
            cards.append(
                f"<div class=card>retrained OneRec {label}<b>{c['mean']:+.2f} min</b>"
                f"95 % [{c['low']:+.2f}, {c['high']:+.2f}], {c['pairs']} pairs of users</div>"
            )
    totals = result["totals"]
    cards.append(
        f"<div class=card>impressions acknowledged<b>{totals['impressions_acked']:,}</b>"
        f"{totals['exposures_stored']:,} exposures stored</div>"
    )
    cards.append(
        f"<div class=card>versions served<b>{totals['served_versions']}</b>{totals['retrained']} retrained</div>"
    )
    drift = "detected" if totals["drift_detected"] else "not detected"
    cards.append(f"<div class=card>drift of day {result['drift_day']}<b>{drift}</b></div>")
    return (
        "<h1>OneRec: the loop</h1>"
        f"<p class=note>{result['days']} days, users: {html.escape(result['world'])}; seed {result['seed']}; "
        f"OneRec shows {SHOWN[result['select']]}; "
        f"{html.escape(result['hardware'])}; <code>{html.escape(result['command'])}</code></p>"
        f"<div class=cards>{''.join(cards)}</div>"
    )


def _series(result: dict[str, Any], arm: str, key: str) -> list[Any]:
    return [day["arms"][arm].get(key) for day in result["daily"]]


def _days(result: dict[str, Any]) -> list[int]:
    return [day["day"] for day in result["daily"]]


def _stay(result: dict[str, Any]) -> go.Figure:
    figure = go.Figure()
    for arm in result["arms"]:
        stays = _series(result, arm, "stay")
        mean = [stay["mean"] for stay in stays]
        figure.add_trace(
            go.Scatter(
                x=_days(result),
                y=mean,
                name=LABELS[arm],
                mode="lines+markers",
                line={"color": COLOURS[arm], "width": 3},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [s["high"] - s["mean"] for s in stays],
                    "arrayminus": [s["mean"] - s["low"] for s in stays],
                    "thickness": 1,
                },
            )
        )
    _mark_drift(figure, result)
    figure.update_yaxes(title="minutes a user a day", rangemode="tozero")
    figure.update_xaxes(title="day", dtick=1)
    return figure


def _interactions(result: dict[str, Any]) -> go.Figure:
    figure = go.Figure()
    for arm in result["arms"]:
        views = max(sum(_series(result, arm, "views")), 1)
        rates = [1000 * sum(_series(result, arm, name)) / views for name in INTERACTIONS]
        figure.add_trace(go.Bar(x=list(INTERACTIONS), y=rates, name=LABELS[arm], marker_color=COLOURS[arm]))
    figure.update_yaxes(title="per 1 000 views")
    return figure


def _lt7(result: dict[str, Any]) -> go.Figure:
    return _lines(result, "lt7", "days")


def _cold(result: dict[str, Any]) -> go.Figure:
    return _lines(result, "cold_start_share", "share of views")


def _lines(result: dict[str, Any], key: str, title: str) -> go.Figure:
    figure = go.Figure()
    for arm in result["arms"]:
        figure.add_trace(
            go.Scatter(
                x=_days(result), y=_series(result, arm, key), name=LABELS[arm], line={"color": COLOURS[arm], "width": 3}
            )
        )
    _mark_drift(figure, result)
    figure.update_yaxes(title=title, rangemode="tozero")
    figure.update_xaxes(title="day", dtick=1)
    return figure


def _quality(result: dict[str, Any]) -> go.Figure | None:
    runs = [(run["label"], run["evaluation"]) for run in result["runs"] if run.get("evaluation")]
    if not runs:
        return None
    figure = go.Figure()
    for metric, colour in (("recall@50", "#1f6feb"), ("ndcg@10", "#2da44e"), ("legality", "#8250df")):
        figure.add_trace(
            go.Scatter(
                x=[label for label, _ in runs],
                y=[evaluation["candidate"].get(metric) for _, evaluation in runs],
                name=metric,
                line={"color": colour, "width": 3},
            )
        )
    for rival, dash in (("itemknn", "dash"), ("popularity", "dot")):
        values = [evaluation.get(rival, {}).get("recall@50") for _, evaluation in runs]
        figure.add_trace(
            go.Scatter(x=[label for label, _ in runs], y=values, name=f"recall@50, {rival}", line={"dash": dash})
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def _drift(result: dict[str, Any]) -> go.Figure | None:
    measured = [(day["day"], day["drift"]) for day in result["daily"] if day.get("drift", {}).get("columns")]
    if not measured:
        return None
    figure = go.Figure()
    for name in sorted({column for _, drift in measured for column in drift["columns"]}):
        points = [(day, drift["columns"][name]) for day, drift in measured if name in drift["columns"]]
        figure.add_trace(
            go.Scatter(
                x=[day for day, _ in points],
                y=[column["score"] / column["threshold"] for _, column in points],
                name=name + ("" if points[0][1]["decides"] else " (shown only)"),
                mode="lines+markers",
            )
        )
    figure.add_hline(y=1, line_dash="dash", line_color="#cf222e")
    _mark_drift(figure, result)
    figure.update_yaxes(title="score / threshold", rangemode="tozero")
    figure.update_xaxes(title="day", dtick=1)
    return figure


def _training(result: dict[str, Any]) -> go.Figure | None:
    figure = go.Figure()
    for run in result["runs"]:
        for stage, curve in run.get("curves", {}).items():
            figure.add_trace(go.Scatter(x=curve["step"], y=curve["loss"], name=f"{run['label']}: {stage}"))
    if not figure.data:
        return None
    figure.update_yaxes(title="loss")
    figure.update_xaxes(title="optimizer step")
    return figure


def _mark_drift(figure: go.Figure, result: dict[str, Any]) -> None:
    if result["drift_day"] in _days(result):
        figure.add_vline(x=result["drift_day"], line_dash="dot", annotation_text="the world drifts")


def _nights(result: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(run['label'])}</td><td>{html.escape(run.get('drift', ''))}</td>"
        f"<td>{'yes' if run.get('retrained') else 'no'}</td><td>{'yes' if run.get('blessed') else 'no'}</td>"
        f"<td>{html.escape(run.get('version') or '-')}</td><td>{run.get('seconds', 0):.0f}</td>"
        f"<td>{html.escape('; '.join(run.get('reasons', [])))}</td></tr>"
        for run in result["runs"]
    )
    return (
        "<h2>Runs</h2><table><tr><th>run</th><th>drift verdict</th><th>trained</th><th>blessed</th><th>version</th>"
        f"<th>seconds</th><th>refused because</th></tr>{rows}</table>"
    )


def _raw(result: dict[str, Any]) -> str:
    shown = {key: result[key] for key in ("totals", "comparisons")}
    return f"<h2>Totals</h2><pre>{html.escape(json.dumps(shown, indent=1))}</pre>"
