"""`onerec runs` and `report` on real object storage: the newest last, and why nothing was published."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from features.intake import exposures as exposure_store
from features.schema import EXPOSURE, FLAGS, conform
from features.storage import connect
from pipelines import stack
from pipelines.__main__ import app

TIME = datetime(2026, 1, 10, 23, 30, tzinfo=UTC)


@pytest.fixture
def onerec(environment, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(stack, "activate", lambda home, services=None: None)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, [*arguments, "--home", str(environment.home)])

    return run


def stored(run_id: str, hour: int, **records: dict[str, Any]) -> None:
    """A run that ended at an hour, with the records given by stage or folder."""
    end = {"pipeline": "retraining", "state": "SUCCEEDED", "recorded_at": f"2026-01-10T{hour:02d}:00:00+00:00"}
    connect().put_json(f"runs/{run_id}/outcome.json", {**end, "cost": {"seconds": 90.0}, **records.pop("outcome", {})})
    for name, record in records.items():
        file = "done.json" if name in ("pretrain", "publish", "drift") else "decision.json"
        connect().put_json(f"runs/{run_id}/{name}/{file}", record)


@pytest.fixture
def lived(onerec) -> None:
    held = {"retrain": False, "reason": "data gate: bot_share = 0.2 [bots]"}
    stored("z-held", 1, drift_decision=held)
    stored("y-refused", 2, gate={"blessed": False, "failed": ["recall@50 = 0.001"]}, pretrain={"summary": {}})
    published = {"summary": {"version": "20260110T000000-abcd"}}
    stored("x-published", 3, gate={"blessed": True, "failed": []}, pretrain={"summary": {}}, publish=published)
    stored("w-failed", 4, outcome={"state": "FAILED", "error": "out of memory"})
    connect().put_json("runs/a-open/data/done.json", {"summary": {}})


def test_runs_come_in_order_with_their_reasons(onerec, lived: None) -> None:
    rows = json.loads(onerec("runs", "--json").stdout)
    assert [row["run_id"] for row in rows] == ["z-held", "y-refused", "x-published", "w-failed", "a-open"]
    assert [row["why"] for row in rows] == [
        "data gate: bot_share = 0.2 [bots]",
        "recall@50 = 0.001",
        "",
        "out of memory",
        "",
    ]
    assert [row["retrained"] for row in rows] == [False, True, True, False, False]
    assert [row["run_id"] for row in json.loads(onerec("runs", "--last", "2", "--json").stdout)] == [
        "w-failed",
        "a-open",
    ]
    assert len(json.loads(onerec("runs", "--last", "0", "--json").stdout)) == 5
    shown = onerec("runs").stdout
    assert "1.5 min" in shown
    assert "open" in shown
    assert "[bots]" in shown, "what is told is text, not markup"


def test_ids_are_whole_and_what_became_of_a_canary_is_told(onerec) -> None:
    """In a terminal of 80 columns: ids that differ in their last letters are there to be copied."""
    names = {f"loop0-20260110000000-night{night}": f"20260110T000000-{night}8afe311" for night in range(3)}
    for number, (run_id, version) in enumerate(names.items()):
        stored(run_id, number, publish={"summary": {"version": version}})
        connect().put_json(f"runs/{run_id}/released.json", {"version": version, "tried": number > 0})
    connect().put_json(f"models/onerec/{version}/records/canary.json", {"status": "rolled back"})
    rows = json.loads(onerec("runs", "--json").stdout)
    assert [row["canary"] for row in rows] == ["", "running", "rolled back"]
    shown = onerec("runs").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert all(each in shown for pair in names.items() for each in pair)
    told = " ".join(shown.replace("│", " ").split())
    assert "canary: running" in told
    assert "canary: rolled back" in told


def test_without_runs_it_says_what_to_do(onerec) -> None:
    assert "onerec train" in onerec("runs").stdout
    assert json.loads(onerec("runs", "--json").stdout) == []


def one_exposure(time: datetime) -> None:
    columns = {"exposure_id": ["e"], "request_id": ["r"], "user_id": ["u"], "item_id": ["i"], "position": [0]}
    columns |= {"source": ["onerec"], "duration_ms": [9000], "play_ms": [3000], **{flag: [False] for flag in FLAGS}}
    exposure_store.write(connect(), conform(pa.table({**columns, "event_time": [time]}), EXPOSURE))


def test_an_interrupted_run_is_not_waited_for(onerec, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    one_exposure(TIME)
    monkeypatch.setattr("pipelines.local.run", interrupted)
    assert onerec("train", "--run-id", "mine").exit_code == 130
    outcome = connect().get_json("runs/mine/outcome.json")
    assert (outcome["state"], outcome["error"]) == ("CANCELLED", "interrupted")


def test_a_report_is_written_for_the_newest_day_or_the_one_given(onerec, environment) -> None:
    nothing = onerec("report")
    assert nothing.exit_code == 1
    assert "no exposures are stored" in nothing.stderr
    one_exposure(TIME)
    told = json.loads(onerec("report", "--json").stdout)
    assert told["day"] == "2026-01-10"
    assert told["report"].endswith("reports/2026-01-10.html")
    assert (environment.home / "reports" / "2026-01-10.html").read_text().count("<h2>") >= 6
    assert onerec("report", "--day", "2026-01-11").exit_code == 0, "the day before is drawn"
    away = onerec("report", "--day", (TIME + timedelta(days=40)).date().isoformat())
    assert (away.exit_code, "no exposure is stored between" in away.stderr.replace("\n", " ")) == (1, True)
    assert "give it as ISO 8601" in onerec("report", "--day", "yesterday").stderr
