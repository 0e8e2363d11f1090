"""The daily report on real object storage: every part is there, nothing is fetched, and a day without data says so."""

from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.intake import exposures as exposure_store
from features.schema import EXPOSURE, FLAGS, conform
from features.storage import Storage
from monitoring.daily import NothingStored, gather, render, write_day
from monitoring.trigger import decide_once, parse

DAY = date(2026, 1, 10)
MIDNIGHT = datetime(2026, 1, 10, tzinfo=UTC)


def exposures(n: int, start: datetime, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    own = rng.random(n) < 0.5
    columns = {
        "exposure_id": [f"{seed}-{i}" for i in range(n)],
        "request_id": ["r"] * n,
        "user_id": [f"u{i % 10}" for i in range(n)],
        "item_id": ["i"] * n,
        "position": [0] * n,
        "event_time": [start + timedelta(minutes=int(m)) for m in rng.integers(0, 1440, n)],
        "source": np.where(own, "onerec", "cascade").tolist(),
        "model_version": [f"v{seed}" if each else "cascade-1" for each in own],
        "duration_ms": [20_000] * n,
        "play_ms": [6_000] * n,
        **{flag: (rng.random(n) < 0.1).tolist() for flag in FLAGS},
    }
    return conform(pa.table(columns), EXPOSURE)


@pytest.fixture
def lived(s3: Storage) -> Storage:
    """Two days of users, a night that was refused and one that published."""
    for back, seed in ((1, 1), (0, 2)):
        exposure_store.write(s3, exposures(200, MIDNIGHT - timedelta(days=back), seed))
    for hours, run_id, blessed in ((0, "night-a", False), (24, "night-b", True)):
        end = MIDNIGHT + timedelta(hours=hours)
        drift: dict[str, Any] = {"verdict": "drift", "reason": "drifted: like <b>", "rows_current": 900}
        drift |= {"columns": {"like": {"score": 0.03, "threshold": 0.02, "decides": True}}}
        told = {**drift, "window_end": end.isoformat(), "validation": {"failed": []}}
        decide_once(s3, run_id, parse("nightly"), {**told, "rows_by_hour": {end.isoformat(): 900}})
        s3.put_json(f"runs/{run_id}/drift/done.json", {"summary": drift})
        failed = [] if blessed else ["recall@50 = 0.001, must be >= 0.01"]
        s3.put_json(f"runs/{run_id}/gate/decision.json", {"blessed": blessed, "passed": ["a", "b"], "failed": failed})
        s3.put_json(f"runs/{run_id}/outcome.json", {"state": "SUCCEEDED"})
    s3.put_json("runs/night-b/publish/done.json", {"summary": {"version": "20260111T000000-abcd"}})
    return s3


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self.headings.append(data)
            self._inside = ""


def test_the_page_holds_every_part_and_fetches_nothing(lived: Storage, tmp_path: Path) -> None:
    path = write_day(lived, DAY, tmp_path / "deep" / "day.html")
    text, found = path.read_text(), Page()
    found.feed(text)
    assert found.fetched == []
    assert found.headings == [
        "Users",
        "Stay time",
        "Share of the exposures",
        "Feedback",
        "Drift",
        "Gate",
        "Intake",
        "Decisions",
    ]
    assert "<b>10</b>" in text, "ten users came"
    assert "2.00" in text, "200 views of 6 s are 20 minutes of ten users"
    assert "drifted: like &lt;b&gt;" in text
    assert "refused: recall@50 = 0.001, must be &gt;= 0.01" in text
    assert "20260111T000000-abcd" in text


def test_a_day_without_decisions_is_drawn_too(s3: Storage) -> None:
    exposure_store.write(s3, exposures(50, MIDNIGHT, 1))
    text = render(gather(s3, DAY))
    assert "nothing the day before" in text
    assert "<h2>Drift</h2>" not in text
    with pytest.raises(NothingStored, match="between 2025-01-02 and 2025-01-04"):
        gather(s3, date(2025, 1, 3), 2)
