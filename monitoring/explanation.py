"""One user's recommendations as a page a person can read: pathways, the beam as a tree, and why items are not shown.

Input is the JSON of ``models.serving.explain`` (``onerec explain --json``). Opens without a network and without
scripts: the tree folds by itself. Left out: pictures of the items.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from monitoring.page import page

Item = Mapping[str, Any]
"""An item of the beam, or an event of a pathway."""
PATHWAYS = {
    "short": ("Short term", "the last things shown to the user"),
    "positive": ("Positive feedback", "what the user liked, shared or watched for long"),
    "lifelong": ("Lifelong", "the long history, compressed"),
}
FLAGS = {
    "cold": "Nothing is known of this user: this is the answer for newcomers.",
    "degraded": "A pathway is older than its time to live and was left out.",
    "features_unavailable": "The feature store does not answer: this is the answer for newcomers.",
}
COLOURS = {
    "shown": "#1a7f37",
    "not among the best": "#8b949e",
    "seen": "#9a6700",
    "excluded": "#8250df",
    "taken down": "#cf222e",
}
OPEN_BRANCHES = 4
"""Of the tree, unfolded at first."""
ROWS = 20
"""Of a table, the others are folded."""
STYLE = """
details{margin:.15rem 0 .15rem 1.1rem}summary{cursor:pointer;padding:.1rem 0}
details.top{margin-left:0}li.leaf{margin:.1rem 0 .1rem 1.1rem;list-style:none}
.bar{display:inline-block;height:.65rem;background:#54aeff;border-radius:2px;margin:0 .5rem;vertical-align:middle}
.code{display:inline-block;min-width:3.6rem;font-family:ui-monospace,monospace}
.badge{color:#fff;border-radius:999px;padding:0 .55rem;font-size:.8rem;white-space:nowrap}
.faint{color:#57606a}.strong{font-weight:600}th.text{text-align:left}code,.whole{white-space:nowrap}
"""


def render(explanation: Mapping[str, Any]) -> str:
    """The whole page."""
    items = {item["item_id"]: item for item in explanation["items"]}
    body = (
        f"<style>{STYLE}</style>{_head(explanation)}{_shown(explanation)}{_filtered(explanation)}"
        f"{_tree(explanation['tree'], items)}{''.join(_pathway(each) for each in explanation['pathways'])}"
    )
    return page(f"Recommendations of {explanation['user']}", body, script=False)


def _head(e: Mapping[str, Any]) -> str:
    flag = FLAGS.get(e["flag"], "")
    events = sum(len(pathway["events"]) for pathway in e["pathways"])
    shown = sum(item["status"] == "shown" for item in e["items"])
    cards = [
        ("behaviours known", f"{events:,}", ", ".join(f"{len(p['events'])} {p['name']}" for p in e["pathways"])),
        ("items shown", str(shown), f"of {e['num_items']} asked for"),
        ("items in the beam", f"{len(e['items']):,}", f"{e['beam_width']} beams"),
        ("shown items' probability", _percent(_mass(e)), "together, before filters"),
    ]
    boxes = "".join(f"<div class=card>{name}<b>{value}</b>{note}</div>" for name, value, note in cards)
    static = f" Attributes hash to buckets {', '.join(map(str, e['static']))}." if e["static"] else ""
    warning = ""
    if flag:
        warning = f"<p><span class=badge style=background:#cf222e>{_text(e['flag'])}</span> {_text(flag)}</p>"
    return (
        f"<h1>What {_text(e['user'])} would see</h1><p class=note>At {_time(e['time_ms'])}, model "
        f"<code>{_text(e['model_version'])}</code>.{static} {_text(e.get('server', ''))}</p>"
        f"{warning}<div class=cards>{boxes}</div>"
    )


def _mass(e: Mapping[str, Any]) -> float:
    return float(sum(item["probability"] for item in e["items"] if item["status"] == "shown"))


def _shown(e: Mapping[str, Any]) -> str:
    rows = sorted((item for item in e["items"] if item["status"] == "shown"), key=lambda item: item["place"])
    return "<h2>Shown</h2>" + _items(rows, lambda item: str(item["place"]), "place")


def _filtered(e: Mapping[str, Any]) -> str:
    """What the model would have named and nobody may see, likeliest first."""
    rows = [item for item in e["items"] if item["status"] not in ("shown", "not among the best")]
    if not rows:
        return "<h2>Filtered</h2><p class=note>Nothing: no item of the beam was seen, excluded or taken down.</p>"
    note = f"<p class=note>{len(rows)} items of the unfiltered beam, likeliest first.</p>"
    return f"<h2>Filtered</h2>{note}" + _folded(rows, lambda part: _items(part, _badge, "why"))


def _items(rows: Sequence[Item], first: Callable[[Item], str], heading: str) -> str:
    cells = "".join(
        f"<tr><td>{first(item)}</td><td class=text>{_name(item)}</td>"
        f"<td class=text><code>{_sid(item['sid'])}</code></td>"
        f"<td class=whole>{' &middot; '.join(_percent(math.exp(p)) for p in item['log_probs'])}</td>"
        f"<td>{_percent(item['share_of_sid'])}</td><td>{_percent(item['probability'])}</td><td>{item['score']:.2f}</td></tr>"
        for item in rows
    )
    return (
        f"<table><tr><th>{heading}</th><th class=text>item</th><th class=text>SID</th><th>each code</th>"
        f"<th>share of its SID</th><th>probability</th><th>log p</th></tr>{cells}</table>"
    )


def _tree(root: Mapping[str, Any], items: Mapping[str, Item]) -> str:
    branches = "".join(
        _branch(child, items, place < OPEN_BRANCHES, "top") for place, child in enumerate(root["children"])
    )
    note = (
        "The unfiltered beam, merged by prefixes: each line is a code, its probability given the codes before it "
        "(the bar), and the probability of the whole prefix."
    )
    return f"<h2>The beam</h2><p class=note>{note}</p>{branches}"


def _branch(node: Mapping[str, Any], items: Mapping[str, Item], unfolded: bool, kind: str = "") -> str:
    line = (
        f"<span class=code>{node['code']}</span><span class=bar style=width:{max(1, round(160 * node['p']))}px></span>"
        f"{_percent(node['p'])} <span class=faint>prefix {_percent(node['path_p'])}</span>"
    )
    leaves = "".join(
        f"<li class=leaf>{_badge(items[item])} {_name(items[item])} "
        f"<span class=faint>{_percent(items[item]['probability'])}</span></li>"
        for item in node["items"]
    )
    inside = leaves + "".join(_branch(child, items, unfolded) for child in node["children"])
    return f"<details class='{kind}'{' open' if unfolded else ''}><summary>{line}</summary>{inside}</details>"


def _pathway(pathway: Mapping[str, Any]) -> str:
    title, what = PATHWAYS[pathway["name"]]
    events = pathway["events"]
    head = f"<h2>{title} <span class=faint>{len(events)}</span></h2><p class=note>{what}; newest first.</p>"
    return head + _folded(events, _events) if events else head + "<p>Empty.</p>"


def _folded(rows: Sequence[Item], table: Callable[[Sequence[Item]], str]) -> str:
    """A table of the first rows, and one of the others behind a fold."""
    more = rows[ROWS:]
    fold = f"<details class=top><summary>{len(more)} more</summary>{table(more)}</details>" if more else ""
    return f"{table(rows[:ROWS])}{fold}"


def _events(events: Sequence[Item]) -> str:
    cells = "".join(
        f"<tr><td>{_time(event['time_ms'])}</td><td class=text>{_name(event)}</td>"
        f"<td>{event['play_ms'] / 1000:.0f} of {event['duration_ms'] / 1000:.0f} s</td>"
        f"<td class=text>{_text(', '.join(event['feedback']))}</td></tr>"
        for event in events
    )
    head = "<tr><th>time</th><th class=text>item</th><th>watched</th><th class=text>feedback</th></tr>"
    return f"<table>{head}{cells}</table>"


def _name(item: Item) -> str:
    title = item["title"] if item["title"] != item["item_id"] else ""
    tags = ", ".join(tag for tag in item["tags"] if tag != title)
    outside = "" if item["in_catalogue"] else " <span class=faint>(not in this version's catalogue)</span>"
    named = f" {_text(title)}" if title else ""
    said = f" <span class=faint>{_text(tags)}</span>" if tags else ""
    return f"<span class=strong>{_text(item['item_id'])}</span>{named}{said}{outside}"


def _badge(item: Item) -> str:
    status = item["status"]
    more = f" {item['place']}" if "place" in item else ""
    where = f": {PATHWAYS[item['detail']][0].lower()}" if item.get("detail") in PATHWAYS else ""
    return f"<span class=badge style=background:{COLOURS[status]}>{status}{more}{where}</span>"


def _sid(sid: list[int]) -> str:
    return "-".join(str(code) for code in sid)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _text(value: object) -> str:
    return html.escape(str(value))
