"""The quality card of a codebook: one HTML page that opens without a network.

Input is the JSON of ``quality.codebook_report`` (with whatever scalars its caller adds), so a card can be redrawn at
any time.
"""

import html as escaping
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from monitoring.page import page, plots

_PER_LEVEL = {
    "utilisation": "codes in use, share",
    "dead_codes": "dead codes",
    "entropy_nats": "token entropy, nats",
    "perplexity": "perplexity",
    "gini": "Gini",
    "largest_cluster": "largest cluster, items",
    "mse_share_of_variance": "error left, share of variance",
}
_DRIFT = {
    "js": "drift of the new items' codes, Jensen-Shannon distance",
    "js_noise": "the same by chance alone",
    "psi": "population stability index",
}
_DRAWN = {"loads", "items_of_a_sid", "examples", "neighbour_hit_rate"}


def html(report: Mapping[str, Any], title: str = "Tokenizer") -> str:
    """The whole page for a codebook's report."""
    sections = [
        ("Items of each code", _loads(report), "Codes from the fullest to the emptiest; dashed: an even share."),
        ("Error after each level", _errors(report), "Squared reconstruction error as a share of the variance."),
        ("Do neighbours share codes?", _neighbours(report), "Pairs of items engaged with one after the other."),
        ("Items of a SID", _collisions(report), "1 is an item with a SID of its own."),
    ]
    drawn = plots(sections, {"height": 340})
    return page(
        title,
        f"<h1>{escaping.escape(title)}</h1>{_head(report)}{_levels(report)}{drawn}{_examples(report)}{_rest(report)}",
    )


def _head(report: Mapping[str, Any]) -> str:
    cards = [
        ("items", f"{report['items']:,}", f"{report['levels']} levels of {report['codes']} codes"),
        ("reconstruction error", f"{report['mse']:.4g}", f"{report['mse_share_of_variance'][-1]:.1%} of the variance"),
        ("items with a SID of their own", f"{report['unique_sid_share']:.2%}", _collision(report)),
        ("duplicate embeddings", f"{report['duplicate_embeddings']:,}", f"{report['inseparable_items']:,} share a SID"),
    ]
    rates = report.get("neighbour_hit_rate") or {}
    if "prefix1" in rates:
        lift = rates["prefix1"] / max(rates["prefix1_chance"], 1e-12)
        cards.append(("neighbours that share the first code", f"{rates['prefix1']:.1%}", f"{lift:.1f} x chance"))
    shown = "".join(f"<div class=card>{name}<b>{value}</b>{note}</div>" for name, value, note in cards)
    return f"<div class=cards>{shown}</div>"


def _collision(report: Mapping[str, Any]) -> str:
    return f"largest group {report['largest_collision']}, {report['distinct_sids']:,} SIDs"


def _levels(report: Mapping[str, Any]) -> str:
    head = "".join(f"<th>level {level + 1}</th>" for level in range(report["levels"]))
    rows = "".join(
        f"<tr><td>{label}</td>" + "".join(f"<td>{value:.4g}</td>" for value in values) + "</tr>"
        for label, values in _measures(report)
    )
    return (
        f"<h2>Levels</h2><p class=note>The most entropy possible is ln {report['codes']} = "
        f"{report['entropy_max_nats']:.4f} nats.</p><table><tr><th></th>{head}</tr>{rows}</table>"
    )


def _measures(report: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """Rows of the table of levels; drift only where items were appended."""
    drift = report.get("usage_drift") or {}
    return [(label, report[key]) for key, label in _PER_LEVEL.items()] + [
        (label, drift[key]) for key, label in _DRIFT.items() if key in drift
    ]


def _loads(report: Mapping[str, Any]) -> go.Figure:
    figure = go.Figure()
    for level, loads in enumerate(report["loads"]):
        figure.add_trace(go.Scatter(y=loads, name=f"level {level + 1}", mode="lines"))
    figure.add_hline(y=report["items"] / report["codes"], line_dash="dash", line_color="#8b949e")
    figure.update_xaxes(title="code, by rank")
    figure.update_yaxes(title="items", rangemode="tozero")
    return figure


def _errors(report: Mapping[str, Any]) -> go.Figure:
    shares = report["mse_share_of_variance"]
    names = ["mean only"] + [f"level {level + 1}" for level in range(len(shares))]
    figure = go.Figure(go.Bar(x=names, y=[1.0, *shares], marker_color="#1f6feb"))
    figure.update_yaxes(title="share of variance", rangemode="tozero")
    return figure


def _neighbours(report: Mapping[str, Any]) -> go.Figure | None:
    rates = report.get("neighbour_hit_rate") or {}
    lengths = [length for length in range(1, report["levels"]) if f"prefix{length}" in rates]
    if not lengths:
        return None
    names = [f"first {length} code{'s' if length > 1 else ''}" for length in lengths]
    figure = go.Figure()
    figure.add_trace(go.Bar(x=names, y=[rates[f"prefix{n}"] for n in lengths], name="pairs", marker_color="#1f6feb"))
    chance = [rates[f"prefix{n}_chance"] for n in lengths]
    figure.add_trace(go.Bar(x=names, y=chance, name="by chance", marker_color="#8b949e"))
    figure.update_yaxes(title="share of pairs that agree")
    return figure


def _collisions(report: Mapping[str, Any]) -> go.Figure:
    counts = report["items_of_a_sid"]
    figure = go.Figure(go.Bar(x=list(range(1, len(counts) + 1)), y=counts, marker_color="#1f6feb"))
    figure.update_xaxes(title="items that one SID names", dtick=max(1, len(counts) // 20))
    figure.update_yaxes(title="SIDs", type="log")
    return figure


def _examples(report: Mapping[str, Any]) -> str:
    if not report.get("examples"):
        return ""
    rows = "".join(
        f"<tr><td>{each['code']}</td><td>{each['items']}</td>"
        f"<td class=text>{escaping.escape(', '.join(f'{tag} ({count})' for tag, count in each['tags']))}</td>"
        f"<td class=text>{'<br>'.join(escaping.escape(title) for title in each['titles'])}</td></tr>"
        for each in report["examples"]
    )
    return (
        "<h2>What first-level codes hold</h2><p class=note>Fullest to emptiest; the most popular items of each.</p>"
        f"<table><tr><th>code</th><th>items</th><th>commonest tags</th><th>items</th></tr>{rows}</table>"
    )


def _rest(report: Mapping[str, Any]) -> str:
    """Scalars that the page has not shown yet, so that nothing of the report is lost to a reader."""
    known = set(_PER_LEVEL) | _DRAWN
    rows = "".join(
        f"<tr><td>{escaping.escape(str(key))}</td><td>{escaping.escape(_text(value))}</td></tr>"
        for key, value in report.items()
        if key not in known and isinstance(value, int | float | str | bool)
    )
    return f"<h2>All figures</h2><table>{rows}</table>"


def _text(value: int | float | str | bool) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
