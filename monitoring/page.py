"""The frame of an HTML page that opens without a network: style, head and plots; plotly's script is put in once.

Used by the loop's report, the tokenizer's quality card, benchmarks and the explanation of a user's recommendations.
"""

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1f2328}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}p.note{color:#57606a}
table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #d0d7de;text-align:right;vertical-align:top}
td:first-child,th:first-child,td.text{text-align:left}.cards{display:flex;gap:1rem;flex-wrap:wrap}
.card{border:1px solid #d0d7de;border-radius:8px;padding:.7rem 1rem;min-width:10rem}
.card b{font-size:1.3rem;display:block}
"""


def page(title: str, body: str, *, script: bool = True) -> str:
    """The whole page; ``title`` is text, ``body`` is HTML; without plots it needs no ``script``."""
    plotly = f"<script>{get_plotlyjs()}</script>" if script else ""
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style>{plotly}</head><body>{body}</body></html>"
    )


def plots(sections: Iterable[tuple[str, go.Figure | None, str]], layout: Mapping[str, Any]) -> str:
    """HTML of each (heading, figure or None to leave it out, note), headings all different; ``layout`` is plotly's."""
    return "".join(
        f"<h2>{html.escape(title)}</h2><p class=note>{html.escape(note)}</p>{_div(figure, title, layout)}"
        for title, figure, note in sections
        if figure is not None
    )


def _div(figure: go.Figure, title: str, layout: Mapping[str, Any]) -> str:
    # The tool bar stands upright, or it would cover the legend.
    style: dict[str, Any] = {"margin": {"l": 60, "r": 40, "t": 20, "b": 45}, "modebar": {"orientation": "v"}}
    figure.update_layout(template="plotly_white", **style, **layout)
    # Named, because plotly's own names are random and a stage is known by the digest of its files.
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=re.sub(r"\W+", "-", title)))
