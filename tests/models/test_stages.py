"""A stage is repeated when anything that decides its outcome is another, and only then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.runs import Run
from features.storage import connect
from models.generator import GeneratorConfig
from models.stages import pretrain_run


def test_every_override_of_the_recipe_trains_again(
    environment, write_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trained = write_bundle(tmp_path / "made"), []

    def copied(folder: Path) -> dict:
        for name in ("tokenizer.safetensors", "sids.parquet", "items.parquet"):
            (folder / name).write_bytes((made / name).read_bytes())
        return {}

    def pretend(data: Path, catalogue: object, model: GeneratorConfig, config: Any, folder: Path, **_: object) -> dict:
        trained.append((model.dropout, config.epochs))
        return {}

    run = Run(connect(), "run")
    for stage in ("data", "tokenizer"):
        run.stage(stage, {}, copied)
    monkeypatch.setattr("models.stages.pretrain", pretend)
    for overrides in ("{}", "{}", '{"dropout": 0.3}', '{"pretrain.epochs": 2}'):
        pretrain_run("run", tokens="digest", preset="tiny", overrides=overrides, base="")
    assert trained == [(0.1, 5), (0.3, 5), (0.1, 2)]
