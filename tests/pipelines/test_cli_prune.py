"""`onerec prune` against a running object store: dry first, then for good."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from features.intake import partitions
from features.intake.retention import ROOTS
from features.storage import connect
from pipelines import stack
from pipelines.__main__ import app


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    with stack.running(tmp_path / "home", ["s3"]):
        yield tmp_path / "home"


def onerec(*arguments: str, home: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["prune", "--home", str(home), *arguments])
    return result.exit_code, result.stdout


def _store(hour: datetime) -> None:
    """One empty impression segment of ``hour``: enough to be listed, and to be too old."""
    schema, _ = ROOTS["events/kind=impression"]
    key, data = partitions.encode("events/kind=impression", hour, schema.empty_table())
    connect().put(key, data, "application/vnd.apache.parquet")


def test_old_segments_go_only_without_dry_run(home: Path) -> None:
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    _store(now - timedelta(hours=2))
    _store(now - timedelta(days=200))
    code, said = onerec("--dry-run", "--json", home=home)
    assert code == 0
    assert json.loads(said)["expired"] == 1
    assert len(partitions.parts(connect(), "events/kind=impression", None, None)) == 2
    code, said = onerec(home=home)
    assert code == 0
    assert "1 segments" in said
    assert len(partitions.parts(connect(), "events/kind=impression", None, None)) == 1


@pytest.mark.parametrize("days", ["0", "-1", "nan", "inf", "1e300"])
def test_days_are_a_length_of_time(home: Path, days: str) -> None:
    assert onerec("--days", days, home=home)[0] == 2
