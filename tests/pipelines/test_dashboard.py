"""The status page: what is known is told, what is not says why, and nothing hides the rest."""

from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from features.storage import Storage, StorageUnavailable
from monitoring import trial
from monitoring.trigger import decide_once, parse
from pipelines.dashboard import Loop, read_loop, render
from pipelines.stack import Health, ServedModel

END = datetime(2026, 1, 10, tzinfo=UTC)
HEALTHY = Health(
    service="s3", state="healthy", address="127.0.0.1:1", pid=7, uptime_s=4000, memory_bytes=2**21, log="s3.log"
)
DEAD = Health(
    service="server", state="dead", address="127.0.0.1:2", pid=8, uptime_s=0, memory_bytes=0, log="server.log"
)
SERVED = {"onerec": ServedModel(ready=True, version="v2", alias="production", reason="keeps v2: v3 is [corrupt]")}


def text_of(loop: Loop) -> str:
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render([HEALTHY, DEAD], SERVED, loop))
    return console.export_text()


def test_a_loop_with_everything_is_told(s3: Storage) -> None:
    columns = {"like": {"score": 0.03, "threshold": 0.02, "decides": True}}
    drift: dict[str, Any] = {"verdict": "drift", "reason": "drifted: like", "rows_current": 900, "columns": columns}
    summary = {**drift, "window_end": END.isoformat(), "validation": {"failed": []}, "rows_by_hour": {}}
    decide_once(s3, "night-1", parse("nightly"), summary)
    s3.put_json("runs/night-1/drift/done.json", {"summary": drift})
    s3.put_json("runs/night-1/gate/decision.json", {"blessed": False})
    s3.put_json("runs/night-1/evaluate/done.json", {"summary": {"candidate": {"recall@50": 0.1234}}})
    s3.put_json("models/onerec/v2/manifest.json", {"data_time": END.isoformat()})
    s3.put_json("models/onerec/aliases/production.json", {"version": "v2", "set_at": "2026-01-10T06:00:00+00:00"})
    config = trial.TrialConfig(share=0.2)
    opened = trial.Trial(version="v3", stable="v2", started=END.isoformat(), unit="user", config=config)
    s3.put_json(trial.OPEN, {**vars(opened), "config": vars(config)})
    loop = read_loop(s3)
    assert loop.missing == ""
    text = text_of(loop)
    for told in (
        "keeps v2: v3 is [corrupt]",
        "v2, since 2026-01-10T06:00, learned until 2026-01-10T00:00",
        "night-1: ended",
        "drift: drifted: like (of their thresholds: like 150%)",
        "2026-01-10T00:00 no retraining: 0 new exposures",
        "refused, recall@50 0.123",
        "v3 on 20% of the users since 2026-01-10T00:00, 0 of 3 looks",
        "server is dead",
        "no impression of the last days",
    ):
        assert told in text, text
    assert loop.told()["canary"]["version"] == "v3"
    assert loop.told()["drift"] == {"verdict": "drift", "reason": "drifted: like"}


def test_an_empty_platform_has_a_page(s3: Storage) -> None:
    assert "no impression" in text_of(read_loop(s3))
    assert read_loop(s3).told()["run"] is None


def test_what_cannot_be_read_says_why_and_hides_nothing(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("models/onerec/aliases/production.json", b"no json")
    broken = text_of(read_loop(s3))
    assert "a stored record cannot be read" in broken
    assert "healthy" in broken

    def away(*_: object) -> None:
        raise StorageUnavailable("S3 at x does not answer")

    monkeypatch.setattr("pipelines.dashboard.read_state", away)
    assert "S3 at x does not answer" in text_of(read_loop(s3))
