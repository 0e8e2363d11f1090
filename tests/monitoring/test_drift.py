import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from evidently.ui.workspace import RemoteWorkspace, Workspace

from features.schema import EXPOSURE, FLAGS, ITEM, conform
from features.settings import settings
from monitoring import columns, drift
from monitoring.drift import DRIFT, INSUFFICIENT, STABLE, comparable, measure
from monitoring.validation import POSITIVE
from pipelines.processes import free_ports

TAGS = ("music", "sport", "food", "travel")
ITEMS = conform(
    pa.table(
        {
            "item_id": [f"i{i}" for i in range(40)],
            "tags": [[TAGS[i % 4]] for i in range(40)],
            "duration_ms": [20_000] * 40,
        }
    ),
    ITEM,
)


def exposures(
    n: int, *, seed: int, play: float = 0.5, favourite: int | None = None, source: str = "onerec", codes: int = 8
) -> pa.Table:
    rng = np.random.default_rng(seed)
    item = rng.integers(0, 40, n)
    chance = np.full(n, 0.3) if favourite is None else np.where(item % 4 == favourite, 0.6, 0.1)
    long_view = rng.random(n) < chance
    values = {
        "exposure_id": [f"{seed}-{i}" for i in range(n)],
        "request_id": [f"r{i // 8}" for i in range(n)],
        "user_id": [f"u{i % 50}" for i in range(n)],
        "item_id": [f"i{i}" for i in item],
        "sid": [[int(i) % codes, 0, 0] for i in item],
        "position": [0] * n,
        "event_time": [datetime(2026, 1, 1, tzinfo=UTC)] * n,
        "source": [source] * n,
        "log_probs": rng.normal(-2, 0.3, (n, 3)).tolist(),
        "duration_ms": [20_000] * n,
        "play_ms": (20_000 * rng.beta(2, 2 / play - 2, n)).astype(int).tolist(),
        **{flag: (long_view if flag == "long_view" else rng.random(n) < 0.02).tolist() for flag in FLAGS},
    }
    return conform(pa.table(values), EXPOSURE)


def test_two_samples_of_one_world_are_stable() -> None:
    report = measure(exposures(4000, seed=1), exposures(3000, seed=2), ITEMS)
    assert report.verdict == STABLE
    assert report.rows_current == 3000


def test_less_play_is_drift_and_named() -> None:
    report = measure(exposures(4000, seed=1), exposures(3000, seed=2, play=0.25), ITEMS)
    assert report.verdict == DRIFT
    assert "play_ratio" in report.reason


def test_other_tastes_at_equal_play_are_drift() -> None:
    report = measure(exposures(4000, seed=1, favourite=0), exposures(3000, seed=2, favourite=1), ITEMS)
    assert report.columns["engaged_tag"]["drifted"]
    assert not report.columns["play_ratio"]["drifted"]


def test_exposures_features_predictions_and_reward_are_all_measured() -> None:
    before, reference, current = (exposures(n, seed=seed) for seed, n in enumerate((500, 2000, 1500)))
    uploaded = pa.array([datetime(2025, 12, 1, tzinfo=UTC)] * ITEMS.num_rows, pa.timestamp("ms", "UTC"))
    items = ITEMS.set_column(ITEMS.schema.get_field_index("upload_time"), "upload_time", uploaded)
    report = measure(reference, current, items, before=before)
    assert set(report.columns) == {column.name for column in columns.COLUMNS}
    assert report.verdict == STABLE
    assert report.validation.passed
    assert sum(report.rows_by_hour.values()) == 1500


@pytest.mark.parametrize("flag", ["click", "forward", "dislike"])
def test_a_feedback_rate_that_jumps_is_drift_and_named(flag: str) -> None:
    current = exposures(3000, seed=2)
    often = pa.array(np.random.default_rng(0).random(3000) < 0.15)
    current = current.set_column(current.schema.get_field_index(flag), current.schema.field(flag), often)
    report = measure(exposures(4000, seed=1), current, ITEMS)
    assert report.verdict == DRIFT
    assert flag in report.reason


def test_codes_of_every_level_are_compared() -> None:
    report = measure(exposures(4000, seed=1), exposures(3000, seed=2, codes=4), ITEMS)
    assert report.columns["sid_1"]["drifted"]
    assert not report.columns["sid_2"]["drifted"]
    assert report.verdict == STABLE, "predictions are shown and do not decide"


def test_the_reward_is_of_the_longest_watched_quarter_and_against_dislikes() -> None:
    frame = columns.frame(exposures(4000, seed=1), ITEMS)
    reward = columns.rewarded(frame, frame)
    disliked = frame["dislike"].to_numpy() > 0
    assert (reward[disliked] == -1).all()
    assert np.isin(reward[~disliked], (0, 1)).all()
    assert (reward[~disliked] == 1).mean() == pytest.approx(0.25, abs=0.02)


def test_contexts_count_what_came_earlier_and_nothing_else() -> None:
    table = exposures(300, seed=4).take(pa.array(np.random.default_rng(1).permutation(300)))
    times = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=int(s)) for s in range(300)]
    field = table.schema.field("event_time")
    table = table.set_column(table.schema.get_field_index("event_time"), field, pa.array(times, field.type))
    found, rows = columns.contexts(table), table.to_pylist()
    for i, row in enumerate(rows):
        earlier = [r for r in rows if r["user_id"] == row["user_id"] and r["event_time"] < row["event_time"]]
        assert found["history_views"][i] == len(earlier)
        if earlier:
            liked = [r["long_view"] or r["play_ms"] >= 18_000 or any(r[f] for f in POSITIVE) for r in earlier]
            kept = [each and not r["dislike"] for each, r in zip(liked, earlier, strict=True)]
            assert found["history_positive"][i] == pytest.approx(np.mean(kept))
        else:
            assert np.isnan(found["history_positive"][i])


@pytest.mark.parametrize("rows", [0, 3, 400])
def test_few_rows_are_insufficient_not_guessed(rows: int) -> None:
    report = measure(exposures(4000, seed=1), exposures(rows, seed=2, play=0.1), ITEMS)
    assert report.verdict == INSUFFICIENT
    assert str(rows) in report.reason


def test_a_change_of_the_traffic_mix_is_not_drift() -> None:
    reference = pa.concat_tables([exposures(2000, seed=1), exposures(2000, seed=2, play=0.2, source="organic")])
    current = exposures(3000, seed=3)
    assert measure(reference, current, ITEMS).verdict == STABLE
    assert comparable(exposures(900, seed=1, source="organic"), current, 500)[0].num_rows == 0


def test_a_snapshot_lands_in_the_workspace(tmp_path: Path) -> None:
    for _ in range(2):
        measure(exposures(1000, seed=1), exposures(1000, seed=2), ITEMS, workspace=tmp_path)
    assert len(list(tmp_path.glob("*/snapshots/*.json"))) == 2


@pytest.fixture
def evidently(tmp_path: Path) -> Iterator[str]:
    """The URL of Evidently's real server on an empty workspace."""
    port = next(free_ports(1))
    program = [str(Path(sys.executable).parent / "evidently"), "ui", "--workspace", str(tmp_path / "served")]
    process = subprocess.Popen(
        [*program, "--host", "127.0.0.1", "--port", str(port)], env={**os.environ, "DO_NOT_TRACK": "1"}
    )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=1).close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_a_pod_sends_its_snapshot_to_the_server(
    evidently: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no folder of history: only the machine that runs the interface does."""
    monkeypatch.setenv("ONEREC_HOME", str(tmp_path / "pod"))
    monkeypatch.setenv("ONEREC_EVIDENTLY_URL", evidently)
    settings.cache_clear()
    try:
        for seed in (2, 3):
            measure(exposures(1000, seed=1), exposures(1000, seed=seed), ITEMS, workspace=drift._workspace())
    finally:
        settings.cache_clear()
    (project,) = RemoteWorkspace(evidently).list_projects()
    assert project.name == "exposures"
    assert len(Workspace(str(tmp_path / "served")).list_runs(project.id)) == 2


def test_a_server_that_is_away_costs_the_history_alone(caplog: pytest.LogCaptureFixture) -> None:
    report = measure(exposures(1000, seed=1), exposures(1000, seed=2), ITEMS, workspace="http://127.0.0.1:9")
    assert report.verdict == STABLE
    assert "history at http://127.0.0.1:9 misses this run" in caplog.text
