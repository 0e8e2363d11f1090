"""The `onerec` command from outside: exit codes, clean errors, JSON for machines, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import stack


def onerec(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ONEREC_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_help_names_the_commands(tmp_path: Path) -> None:
    result = onerec("--help", home=tmp_path)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("up", "status", "logs", "doctor", "down"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["status"], 1, ["nothing was started", "onerec up"]),
        (["status", "--watch", "--json"], 2, ["do not go together", "give one of them"]),
        (["logs", "nonsense"], 2, ["unknown service 'nonsense'", "valkey"]),
        (["logs", "s3"], 1, ["never started"]),
        (["up", "--only", "nonsense"], 2, ["nonsense", "collector"]),
        (["up", "--port", "s3=many"], 2, ["SERVICE=PORT"]),
        (["nonsense"], 2, ["No such command"]),
        (["up", "--home", ""], 2, ["--home", "it is empty"]),
        (["status", "--home", __file__], 2, ["--home", "is a file"]),
    ],
)
def test_errors_are_clean(tmp_path: Path, arguments: list[str], code: int, words: list[str]) -> None:
    result = onerec(*arguments, home=tmp_path / "home")
    assert result.returncode == code
    assert all(word in result.stderr for word in words)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("[]")
    assert "Traceback" not in onerec("status", home=tmp_path).stderr
    assert "Traceback" in onerec("--debug", "status", home=tmp_path).stderr


def test_a_day_in_the_life(tmp_path: Path) -> None:
    home = tmp_path / "home"
    started = onerec("up", "--only", "valkey", "--json", home=home)
    assert started.returncode == 0, started.stderr
    shown: dict[str, Any] = json.loads(started.stdout)
    assert shown["started"] == ["valkey"]
    assert json.loads(onerec("up", "--only", "valkey", "--json", home=home).stdout)["started"] == []
    status = json.loads(onerec("status", "--json", home=home).stdout)
    assert status["ok"] is True
    assert "valkey" in onerec("status", home=home).stdout
    assert "Ready to accept connections" in onerec("logs", "valkey", "-n", "5", home=home).stdout

    os.kill(shown["services"][0]["pid"], signal.SIGKILL)
    dead = onerec("status", home=home)
    assert dead.returncode == 1
    assert "dead" in dead.stdout
    checks = {check["name"]: check for check in json.loads(onerec("doctor", "--json", home=home).stdout)}
    assert checks["service valkey"]["verdict"] == "failed"
    assert checks["python"]["verdict"] == "ok"

    onerec("up", "--only", "valkey", home=home)
    assert json.loads(onerec("down", "--json", home=home).stdout)["stopped"] == ["valkey"]
    assert "nothing runs" in onerec("down", home=home).stdout


def test_port_in_use_fails_cleanly(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = onerec("up", "--only", "valkey", "--port", f"valkey={port}", home=tmp_path / "home")
    assert result.returncode == 1
    assert f"127.0.0.1:{port}: the port is in use" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_up_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    home = (tmp_path / "home").resolve()
    command = [sys.executable, "-m", "pipelines", "up", "--only", "valkey,ray", "--home", str(home)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        while "ray" not in stack.entries(home) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(how)
        _, errors = child.communicate(timeout=60)
    assert child.returncode not in (0, None)
    assert "Traceback" not in errors
    assert stack.entries(home) == {}
    assert stack.strays(home) == []


def test_follow_prints_what_is_added(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "s3.log"
    log.write_text("old\n")
    command = [sys.executable, "-m", "pipelines", "logs", "s3", "-f", "--home", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "old\n"
        time.sleep(0.3)
        with log.open("a") as file:
            file.write("new\n")
        assert child.stdout.readline() == "new\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 0
