import re
from html.parser import HTMLParser
from typing import Any

from monitoring.report import render


def stay(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "pairs": 100}


def result() -> dict[str, Any]:
    flags = dict.fromkeys(("like", "follow", "comment", "forward", "collect", "profile_enter", "dislike"), 3)
    arm = {"views": 100, "stay": stay(1.5), "lt7": 1.0, "cold_start_share": 0.1, **flags}
    drift = {"verdict": "drift", "columns": {"play_ratio": {"score": 0.3, "threshold": 0.1, "decides": True}}}
    days = [{"day": d, "arms": dict.fromkeys(("onerec", "frozen", "cascade"), arm), "drift": drift} for d in range(3)]
    evaluation = {"candidate": {"recall@50": 0.2, "ndcg@10": 0.1, "legality": 0.9}, "itemknn": {"recall@50": 0.1}}
    run = {
        "label": "night 0 <script>",
        "drift": "drift",
        "evaluation": evaluation,
        "curves": {"pretrain": {"step": [1, 2], "loss": [4.0, 3.0]}},
    }
    difference = {"mean": 0.2, "low": 0.1, "high": 0.3, "pairs": 100}
    totals = {
        "impressions_acked": 900,
        "exposures_stored": 900,
        "served_versions": 3,
        "retrained": 3,
        "drift_detected": True,
    }
    return {
        "world": "simulator",
        "seed": 0,
        "days": 3,
        "drift_day": 1,
        "select": "stay",
        "hardware": "2 cores",
        "command": "onerec loop",
        "arms": ["onerec", "frozen", "cascade"],
        "daily": days,
        "runs": [run],
        "comparisons": {"onerec_over_frozen": difference, "onerec_over_cascade": difference},
        "totals": totals,
    }


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_fetches_nothing_and_holds_every_plot() -> None:
    page = render(result())
    links = Links()
    links.feed(page)
    assert links.fetched == []
    assert page.count("plotly-graph-div") == 7
    assert "+0.20 min" in page


def test_names_are_escaped() -> None:
    assert "night 0 &lt;script&gt;" in render(result())


def test_a_loop_without_training_or_drift_still_renders() -> None:
    bare = result()
    bare["runs"] = []
    for day in bare["daily"]:
        day["drift"] = {}
    page = render(bare)
    assert "Stay time" in page
    assert not re.search(r"<h2>Drift</h2>", page)
