"""A stage is repeated when anything that decides its outcome is another, and only then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.runs import Run
from features.storage import connect
from models.generator import GeneratorConfig
from models.stages import align_run, pretrain_run
from models.training.reward import RewardConfig, RewardTooWeak


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


def test_reinforcement_learning_does_not_start_on_a_weak_reward_model(
    environment, write_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, rewarded, aligned = write_bundle(tmp_path / "made"), [], []

    def copied(folder: Path) -> dict:
        for name in ("tokenizer.safetensors", "sids.parquet", "items.parquet"):
            (folder / name).write_bytes((made / name).read_bytes())
        return {}

    def weak(data: Path, catalogue: object, config: RewardConfig, folder: Path, **_: object) -> dict:
        rewarded.append(config)
        return {"reward/auc": {config.gate: {"value": 0.52, "positives": 500, "rows": 2000}}}

    run = Run(connect(), "run")
    for stage in ("data", "tokenizer", "pretrain"):
        run.stage(stage, {}, copied)
    monkeypatch.setattr("models.stages.train_reward", weak)
    monkeypatch.setattr("models.stages.align", lambda *_, **__: aligned.append(1) or {})
    with pytest.raises(RewardTooWeak, match=r"AUC of long_view is 0\.520 .*below 0\.55"):
        align_run("run", pretrained="digest", preset="tiny", overrides="{}")
    assert not aligned
    align_run("run", pretrained="digest", preset="tiny", overrides='{"align.objective": "rsft"}')  # RSFT alone may
    assert len(aligned) == len(rewarded) == 1
    align_run("run", pretrained="digest", preset="tiny", overrides='{"reward.least_auc": 0.5}')
    assert len(aligned) == 2
    assert [config.sessions for config in rewarded] == [False, False]
