"""Tables, intervals and plots of the alignment benchmark.

The gap an arm closes is ``(arm - pretrained) / (oracle - pretrained)`` of mean stay time over all held-out users of all
seeds; its interval and those of differences draw users whole, the same ones for every arm (paired bootstrap).
"""

from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.alignment_judge import MEASURES
from benchmarks.harness import table

RESAMPLES = 4000
SEESAW = ("play_s", "lt7", "long_view", "like", "follow", "collect", "comment", "forward")
RIVALS = ("p-score", "feedback", "hybrid")
"""Reward model, user feedback and both: the seesaw (V2 3.1)."""
SELECTION = "pretrained, selected"
"""What is there without any alignment: its lead is what training adds."""
Records = list[dict[str, Any]]


def pooled(records: Records, arm: str, measure: str = "play_s") -> np.ndarray:
    """float64 [users of all seeds]."""
    return np.concatenate([np.array(record["arms"][arm]["users"][measure]) for record in records])


def gap_closed(arm: np.ndarray, base: np.ndarray, oracle: np.ndarray, seed: int = 0) -> dict[str, float]:
    """``value``, ``low`` and ``high`` of the share of the gap from ``base`` to ``oracle``, all [users]."""
    drawn = np.random.default_rng(seed).integers(0, len(arm), (RESAMPLES, len(arm)))
    gain, whole = (arm - base)[drawn].mean(1), (oracle - base)[drawn].mean(1)
    low, high = np.percentile(gain / whole, [2.5, 97.5])
    value = float((arm - base).mean() / (oracle - base).mean())
    return {"value": value, "low": float(low), "high": float(high)}


def difference(arm: np.ndarray, base: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean paired difference of [users] with its interval, in the measure's unit."""
    gaps = arm - base
    drawn = np.random.default_rng(seed).integers(0, len(gaps), (RESAMPLES, len(gaps)))
    low, high = np.percentile(gaps[drawn].mean(1), [2.5, 97.5])
    return {"value": float(gaps.mean()), "low": float(low), "high": float(high)}


def summary(records: Records) -> list[dict[str, Any]]:
    """One row an arm: true means, the gap it closes, its leads over cascade and selection alone, guard-rails."""
    base, oracle = pooled(records, "pretrained"), pooled(records, "oracle")
    rivals = {"over_cascade": pooled(records, "cascade"), "over_selection": pooled(records, SELECTION)}
    rows = []
    for name in records[0]["arms"]:
        mine = pooled(records, name)
        each = [record["arms"][name] for record in records]
        row: dict[str, Any] = {"arm": name}
        row |= {measure: float(pooled(records, name, measure).mean()) for measure in MEASURES}
        row |= {"gap_closed": gap_closed(mine, base, oracle)}
        row |= {lead: difference(mine, rival) for lead, rival in rivals.items()}
        for rail in ("cold_start_share", "density", "long_share", "duration_s", "distinct"):
            row[rail] = float(np.mean([one[rail] for one in each]))
        if "recall50" in each[0]:
            recall, before = _recalls(records, name), _recalls(records, "pretrained")
            moved = difference(recall, before)
            row["recall50"] = float(recall.mean())
            row["recall_change"] = {end: value / max(before.mean(), 1e-9) for end, value in moved.items()}
        if "legality" in each[0]:
            row["legality"] = float(np.mean([one["legality"] for one in each]))
        rows.append(row)
    return rows


def _recalls(records: Records, arm: str) -> np.ndarray:
    """float64 [users of all seeds with something to find]."""
    return np.concatenate([np.array(record["arms"][arm]["recall50"]) for record in records])


LEADS = {"over_cascade": "over cascade, s", "over_selection": "over selection alone, s"}


def show(rows: list[dict[str, Any]]) -> None:
    """The tables on stderr."""
    columns = ["play_s", "stay_s", "lt7", "long_view", "like", "follow", "comment", "collect", "forward"]
    lines = []
    for row in rows:
        said = [_said(row["gap_closed"], "+.1%"), *(_said(row[lead], "+.1f") for lead in LEADS)]
        lines.append([row["arm"], *(row[name] for name in columns), *said])
    table("true value of one list of ten (held-out users)", ["arm", *columns, "gap closed", *LEADS.values()], lines)
    rails = ["cold_start_share", "density", "long_share", "duration_s", "distinct", "recall50", "legality"]
    lines = [
        [row["arm"], *(row.get(name, "") for name in rails), _said(row.get("recall_change"), "+.1%")] for row in rows
    ]
    table("guard-rails", ["arm", *rails, "recall against pretrained"], lines)


def _said(found: dict[str, float] | None, form: str) -> str:
    """A value with its interval, "" without one."""
    if found is None:
        return ""
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


AXES = (
    ("", "share of the gap"),
    ("", "relative change"),
    ("step", "share of free draws"),
    ("step", "norm (logarithmic)"),
    ("share of what is served; points: strength", "stay, s a list"),
    ("day", "stay, s a list"),
    ("stay, s a list; points: weight of the policy", "relative change"),
)
"""Titles of the panels' axes."""


def draw(rows: list[dict[str, Any]], studies: dict[str, Any], file: Path) -> None:
    """One page: stay time by arm, the seesaw, and the studies' curves."""
    titles = (
        "stay time by arm: gap closed to the oracle",
        "seesaw: change against pre-trained",
        "legality under RL",
        "gradient norm, lagging sampler",
        "rules: share against stay time",
        "self-generated share",
        "guard-rails against stay time: relative change",
    )
    figure = make_subplots(rows=4, cols=2, subplot_titles=titles)
    gaps = {row["arm"]: row["gap_closed"] for row in rows if row["arm"] not in ("oracle", "chance", "pretrained")}
    up = [gap["high"] - gap["value"] for gap in gaps.values()]
    down = [gap["value"] - gap["low"] for gap in gaps.values()]
    figure.add_bar(
        x=list(gaps),
        y=[gap["value"] for gap in gaps.values()],
        showlegend=False,
        row=1,
        col=1,
        error_y={"type": "data", "array": up, "arrayminus": down},
    )
    by_name = {row["arm"]: row for row in rows}
    for name in (each for each in RIVALS if each in by_name):
        relative = [by_name[name][m] / max(by_name["pretrained"][m], 1e-9) - 1 for m in SEESAW]
        figure.add_bar(x=list(SEESAW), y=relative, name=name, row=1, col=2)
    _curves(figure, studies)
    for panel, (x, y) in enumerate(AXES):
        row, col = divmod(panel, 2)
        figure.update_xaxes(title=x, row=row + 1, col=col + 1)
        figure.update_yaxes(title=y, row=row + 1, col=col + 1)
    figure.update_layout(template="plotly_white", height=1600, title="Alignment in the simulator")
    figure.write_html(file, include_plotlyjs=True)


def _curves(figure: go.Figure, studies: dict[str, Any]) -> None:
    for name, curve in studies.get("legality", {}).get("curves", {}).items():
        figure.add_scatter(y=curve, name=f"legality: {name}", row=2, col=1)
    for name, found in studies.get("stability", {}).items():
        figure.add_scatter(y=found["gradients"], name=f"gradient: {name}", row=2, col=2)
    for name in ("damped", "boosted"):
        points = studies.get("rules", {}).get(name, [])
        figure.add_scatter(
            x=[point["share"] for point in points],
            y=[point["stay_s"] for point in points],
            name=name,
            text=[str(point["strength"]) for point in points],
            mode="lines+markers+text",
            row=3,
            col=1,
        )
    for rail in ("cold_start_share", "density", "recall50"):
        points = studies.get("balances", {}).get("points", [])
        figure.add_scatter(
            x=[point["stay_s"] for point in points],
            y=[point[rail] / max(points[0][rail], 1e-9) - 1 for point in points],
            text=[
                "pre-trained" if point["policy_weight"] is None else f"{point['policy_weight']:g}" for point in points
            ],
            name=f"{rail}, by weight",
            mode="lines+markers+text",
            row=4,
            col=1,
        )
    for share, found in studies.get("mixes", {}).items():
        figure.add_scatter(y=found["stay_s"], name=f"own share {share}", row=3, col=2)
    figure.update_yaxes(type="log", row=2, col=2)
