"""Paths that cannot be used are refused before anything starts, with what is in the way; no service runs here."""

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pipelines.__main__ import app

NOWHERE = "/proc/onerec"
"""Where nobody can make anything, not even root."""


def onerec(*arguments: str, home: Path | str) -> Result:
    """Runs a command that must refuse what it is given."""
    result = CliRunner().invoke(app, [*arguments, "--home", str(home)], env={"COLUMNS": "500"})
    assert result.exit_code == 2, result.output
    assert "Errno" not in result.stderr
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def log(tmp_path: Path) -> str:
    """A log that can be ingested."""
    (tmp_path / "log.csv").write_text("u,i,t\na,x,2026-01-01\nb,x,2026-01-01\n")
    return str(tmp_path / "log.csv")


WRITING = [
    ["up"],
    ["up", "--only", "valkey"],
    ["loop", "--days", "1"],
    ["ingest", "LOG", "--map", "user_id=u,item_id=i,event_time=t"],
    ["train"],
    ["retrain"],
    ["report"],
    ["explain", "--user", "u1"],
    ["schedule", "apply", "SCHEDULES"],
]


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_a_home_that_cannot_be_made(command: list[str], log: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("schedules: []\n")
    given = {"LOG": log, "SCHEDULES": str(tmp_path / "s.yaml")}
    arguments = [given.get(part, part) for part in command]
    said = onerec(*arguments, home=NOWHERE).stderr
    assert f"--home {NOWHERE}: nothing can be made in /proc" in said
    assert "hint: give a path that this user can write to; nothing was started" in said
    long = tmp_path / ("x" * 300)
    assert (
        f"--home {long}: nothing can be made in {tmp_path} (File name too long)" in onerec(*arguments, home=long).stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "s.yaml"], "what tries it out leaves nothing"


@pytest.mark.parametrize(
    "command", [["up"], ["status"], ["doctor"], ["logs", "s3"], ["down"], ["runs"], ["schedule", "list"]], ids=" ".join
)
def test_a_home_below_a_file_is_refused_by_every_command(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for home in (file, file / "home", file / "home" / "deep"):
        assert f"{file} is a file; give a folder, such as .onerec" in onerec(*command, home=home).stderr
    assert f"{tmp_path / 'link'} is a file" in onerec(*command, home=tmp_path / "link").stderr
    assert file.read_text() == "mine"


@pytest.mark.parametrize("command", [["compile"], ["compile", "--gitops"]], ids=" ".join)
def test_compile_wants_a_folder(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output, words in {
        tmp_path / "file": f"{tmp_path / 'file'} is a file, not a folder",
        tmp_path / "file" / "deep": f"{tmp_path / 'file'} is a file, not a folder",
        Path(NOWHERE): "nothing can be made in /proc",
    }.items():
        result = CliRunner().invoke(app, [*command, "--output", str(output)], env={"COLUMNS": "500"})
        assert result.exit_code == 2
        assert f"--output {output}: {words}" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", [["report"], ["explain", "--user", "u1"]], ids=" ".join)
def test_a_page_wants_a_file(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output, words in {
        tmp_path: f" is a folder\nhint: give a file, such as --output {tmp_path}/page.html",
        tmp_path / "file" / "page.html": f": {tmp_path / 'file'} is a file, not a folder",
        Path(NOWHERE) / "page.html": ": nothing can be made in /proc",
    }.items():
        assert f"--output {output}{words}" in onerec(*command, "--output", str(output), home=tmp_path / "home").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_logs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    unreadable = tmp_path / "log.csv"
    unreadable.symlink_to("/proc/self/mem")  # a file whose reading fails, whoever reads
    columns = "user_id=u,item_id=i,event_time=t"
    for path in (unreadable, tmp_path):
        said = onerec("ingest", str(path), "--check", "--map", columns, home=tmp_path / "home").stderr
        assert f"{unreadable} cannot be read: Input/output error; give a CSV file that this user can read" in said
    unreadable.unlink()
    unreadable.symlink_to(tmp_path / "gone")
    said = onerec("ingest", str(tmp_path), "--check", "--map", columns, home=tmp_path / "home").stderr
    assert f"{unreadable} cannot be read: No such file or directory" in said
    unreadable.unlink()
    unreadable.mkdir()
    said = onerec("ingest", str(tmp_path), "--check", "--map", columns, home=tmp_path / "home").stderr
    assert f"{unreadable} cannot be read: Is a directory" in said
    assert not (tmp_path / "home").exists()
