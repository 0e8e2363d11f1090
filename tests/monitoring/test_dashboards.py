"""The dashboards: the committed JSON is what the code builds, and asks only for what is measured."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.panels import text
from monitoring.metrics import METRICS, series

FOLDER = Path(__file__).parents[2] / "monitoring" / "dashboards"
every = pytest.mark.parametrize("name", BOARDS)


def stored(name: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return board


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in stored(name)["panels"] if panel["type"] != "row"]


def expressions(name: str) -> Iterator[str]:
    return (target["expr"] for panel in panels(name) for target in panel["targets"])


@every
def test_the_file_is_what_the_code_builds(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == text(BOARDS[name]()), "run: python -m monitoring.dashboards"


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(BOARDS)


@every
def test_expressions_use_known_metrics_and_labels_only(name: str) -> None:
    for expression in expressions(name):
        used = set(re.findall(r"\bonerec_\w+", expression))
        assert used, expression
        assert used <= set(series())
        of_used = {label for metric in METRICS.values() if used & {*metric.series} for label in metric.labels}
        named = set(re.findall(r"(\w+)=", expression))
        for group in re.findall(r"(?:by|on|ignoring) \(([^)]*)\)", expression):
            named |= set(group.split(", "))
        assert named - {"le"} <= of_used, expression


def test_all_that_is_measured_of_the_loop_and_the_servers_is_drawn() -> None:
    drawn = {word for name in BOARDS for e in expressions(name) for word in re.findall(r"\bonerec_\w+", e)}
    hidden = {metric.name for metric in METRICS.values() if not drawn & {*metric.series}}
    assert hidden == {
        "onerec_catalogue_moved_total",
        "onerec_collector_batches_committed_total",
        "onerec_collector_commit_seconds",
        "onerec_collector_events_uploaded_total",
        "onerec_collector_queue_records",
        "onerec_log_lines_lost_total",
        "onerec_run_started_timestamp_seconds",
        "onerec_served_sent_total",
        "onerec_state_read_failures_total",
        "onerec_state_read_timestamp_seconds",
        "onerec_updater_batch_seconds",
    }


def test_expressions_are_valid(tmp_path: Path) -> None:
    found = shutil.which("promtool", path=str(Path(sys.executable).parent)) or shutil.which("promtool")
    if found is None:
        pytest.skip("there is no promtool; `make promtool` takes it from Debian's package prometheus")
    plain = [e.replace("$__rate_interval", "5m") for name in BOARDS for e in expressions(name)]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(plain)]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run([found, "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@every
def test_panels_lie_side_by_side_without_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in stored(name)["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@every
def test_the_data_source_is_a_variable(name: str) -> None:
    board = stored(name)
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource"]
    assert board["uid"] == f"onerec-{name}"
    for panel in panels(name):
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
