import json
import threading
import time

import pytest

from models.training import progress
from models.training.checkpoint import LOG
from models.training.progress import Display, following


def record(step: int) -> dict[str, float]:
    return {"step": step, "steps": 9, "loss": 2.0, "tokens_per_s": 1000.0, "mfu": 0.25}


def test_a_line_names_loss_rate_and_utilisation(capsys) -> None:
    Display().show(record(9))
    assert capsys.readouterr().err == "step 9/9  loss 2.0000  1,000 target tokens/s  MFU 25.0%\n"


def test_following_outlives_a_worker_that_rewrites_its_log(tmp_path, monkeypatch, capsys) -> None:
    """A worker that starts anew cuts the log back to its checkpoint, in the middle of what was read already."""
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    failures: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    lines = [json.dumps(record(step)) + "\n" for step in range(9)]
    with following(tmp_path):
        (tmp_path / LOG).write_text("".join(lines[:8]))
        time.sleep(0.1)
        for cut in range(1, 60):
            (tmp_path / LOG).write_text("".join(lines[:2]) + lines[2] * 8 + "x" * cut + '"}\n' + lines[8][:cut])
            time.sleep(0.002)
        (tmp_path / LOG).write_text("".join(lines))
    assert not failures
    shown = capsys.readouterr().err
    assert "step 7/9" in shown


@pytest.mark.parametrize("text", ["", "{", '"step": 3}\n', '{"step": 3, "lo'])
def test_half_a_record_is_not_shown(tmp_path, monkeypatch, capsys, text: str) -> None:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    with following(tmp_path):
        (tmp_path / LOG).write_text(text)
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
