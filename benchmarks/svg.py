"""Bar charts with intervals as SVG text: pictures that a README shows, without a browser to draw them.

Left out: axes other than a line at zero, and everything that plotly does better on a page of its own.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, LABEL, ROW, TOP, NUMBER = 780, 230, 26, 40, 180
"""Pixels: of the picture, the labels and a row, above the first row, and of the numbers on the right."""
INK, PALE, STRONG = "#1f2328", "#9aa7b4", "#2563eb"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value with the ends of its interval (both equal to it when there is none)."""

    label: str
    value: float
    low: float
    high: float
    strong: bool = False
    """Drawn in colour: what the picture is about."""


def bars(title: str, rows: Sequence[Bar]) -> str:
    """A picture of ``rows`` from top to bottom, all on one scale that includes 0; raises ValueError without rows."""
    if not rows:
        raise ValueError(f"no bars to draw for {title!r}")
    low, high = min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows))
    scale = (WIDTH - LABEL - NUMBER) / max(high - low, 1e-12)

    def x(value: float) -> float:
        return round(LABEL + (value - low) * scale, 1)

    height = TOP + ROW * len(rows) + 12
    drawn = "".join(
        _row(row, TOP + ROW * place, x(0.0), (x(row.value), x(row.low), x(row.high))) for place, row in enumerate(rows)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui,sans-serif" font-size="13" role="img"><title>{html.escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
        f'<text x="12" y="24" font-size="15" font-weight="600" fill="{INK}">{html.escape(title)}</text>{drawn}'
        f'<line x1="{x(0.0)}" y1="{TOP - 4}" x2="{x(0.0)}" y2="{height - 8}" stroke="{INK}"/></svg>\n'
    )


def _row(row: Bar, y: int, zero: float, ends: tuple[float, float, float]) -> str:
    value, low, high = ends
    middle = y + ROW / 2
    digits = 4 if max(abs(row.value), abs(row.low), abs(row.high)) < 1 else 1  # a share, or seconds
    number = f"{row.value:.{digits}f}"
    if row.low != row.high:
        number += f" [{row.low:.{digits}f}, {row.high:.{digits}f}]"
    return (
        f'<text x="{LABEL - 10}" y="{middle + 4}" text-anchor="end" fill="{INK}">{html.escape(row.label)}</text>'
        f'<rect x="{min(zero, value)}" y="{y + 5}" width="{abs(value - zero):.1f}" height="{ROW - 10}" '
        f'fill="{STRONG if row.strong else PALE}"/>'
        f'<line x1="{low}" y1="{middle}" x2="{high}" y2="{middle}" stroke="{INK}" stroke-width="1.5"/>'
        f'<text x="{WIDTH - 8}" y="{middle + 4}" text-anchor="end" font-size="11" fill="{INK}">{number}</text>'
    )
