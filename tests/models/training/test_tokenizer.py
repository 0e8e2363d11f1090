import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from features.runs import folder_digest
from models.tokenizer.checkpoint import CHECKPOINT
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.training import tokenizer as module
from models.training.checkpoint import WrongCheckpoint
from models.training.progress import Log
from models.training.tokenizer import fit_tokenizer, read_tokens

CONFIG = TokenizerConfig(codes=8, dim=8, width=16, layers=1, batch=16, epochs=2, max_steps=24, checkpoint_every=4)


def test_writes_what_later_stages_need(log, tmp_path: Path) -> None:
    metrics = fit_tokenizer(log.folder, CONFIG, tmp_path)
    tokenizer, catalogue = Tokenizer.load(tmp_path / "tokenizer.safetensors"), read_tokens(tmp_path)
    assert len(catalogue) == metrics["items"]
    assert catalogue.codebook == tokenizer.quantizer.version == metrics["codebook"]
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert {"alignment/loss", "alignment/u2i", "alignment/caption", "unique_sid_share"} <= set(metrics)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == records[-1]["steps"] == 24
    assert "plotly" in (tmp_path / "card.html").read_text()
    assert not (tmp_path / CHECKPOINT).exists()


def test_equal_runs_have_equal_digests(log, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit_tokenizer(log.folder, CONFIG, tmp_path / name)
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b")


def test_a_finished_run_answers_at_once_and_another_config_is_refused(log, tmp_path: Path, monkeypatch) -> None:
    metrics = fit_tokenizer(log.folder, CONFIG, tmp_path)
    monkeypatch.setattr(module.Tokenizer, "fit", lambda *_, **__: pytest.fail("it was fitted again"))
    assert fit_tokenizer(log.folder, CONFIG, tmp_path) == metrics
    with pytest.raises(WrongCheckpoint, match="other config"):
        fit_tokenizer(log.folder, replace(CONFIG, seed=1), tmp_path)


def test_a_killed_run_goes_on_to_the_same_files(log, tmp_path: Path, monkeypatch) -> None:
    fit_tokenizer(log.folder, CONFIG, tmp_path / "whole")
    write = Log.write

    def dies(self: Log, record: Mapping[str, Any]) -> None:
        write(self, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Log, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        fit_tokenizer(log.folder, CONFIG, tmp_path / "killed")
    monkeypatch.undo()
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    fit_tokenizer(log.folder, CONFIG, tmp_path / "killed")
    assert folder_digest(tmp_path / "whole") == folder_digest(tmp_path / "killed")
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
