import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.training.checkpoint import CHECKPOINT, LOG, WrongCheckpoint
from models.training.loop import FitConfig, Loss, Plan, TrainingDiverged, adamw, fit, prefetch, rate

CONFIG = FitConfig(learning_rate=1e-2, warmup_steps=3, log_every=4, checkpoint_every=5, threads=1)
STEPS = 17


class Killed(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.LayerNorm(16), nn.Linear(16, 1))


def example(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def plan(steps: int = STEPS, die_at: int = -1, nan_at: int = -1, **options) -> Plan:
    calls = iter(range(10_000))
    first = options.pop("first", 0)

    def objective(model: nn.Module, x: torch.Tensor) -> Loss:
        step = first + next(calls)
        if step == die_at:
            raise Killed
        value = (model(x).squeeze(1) - x.sum(1)).square().mean()
        return Loss(value * math.nan if step == nan_at else value, {"part": 1.0}, 8, 24)

    return Plan(steps=steps, example=example, objective=objective, training={"name": "test"}, **options)


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("die_at", [3, 5, 12])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, die_at: int) -> None:
    whole = network()
    expected = fit(whole, plan(), CONFIG, tmp_path / "whole")
    with pytest.raises(Killed):
        fit(network(), plan(die_at=die_at), CONFIG, tmp_path / "killed")
    resumed = network()
    got = fit(resumed, plan(), CONFIG, tmp_path / "killed")
    assert torch.equal(weights(resumed), weights(whole))
    assert (got["step"], got["examples"], got["tokens"]) == (expected["step"], expected["examples"], expected["tokens"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / LOG).read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


def test_records_say_what_happened(tmp_path) -> None:
    fit(network(), plan(), CONFIG, tmp_path)
    records = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12, 16, 17]
    assert all(
        {"loss", "lr", "grad_norm", "examples_per_s", "tokens_per_s", "part"} <= set(record) for record in records
    )
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(record["part"] == 1.0 for record in records)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path) -> None:
    with pytest.raises(TrainingDiverged, match="step 13: loss nan"):
        fit(network(), plan(nan_at=12), CONFIG, tmp_path)
    kept = load_file(tmp_path / CHECKPOINT)
    assert all(tensor.isfinite().all() for tensor in kept.values())
    at_ten = network()
    fit(at_ten, replace(plan(), steps=STEPS), replace(CONFIG, checkpoint_every=10), tmp_path / "other")
    resumed = network()
    assert fit(resumed, plan(), CONFIG, tmp_path)["step"] == STEPS


def test_a_refusing_guard_takes_the_weights_back(tmp_path) -> None:
    answers = iter([None, "worse"])
    model, before = network(), weights(network())
    result = fit(model, plan(guard=lambda: next(answers)), CONFIG, tmp_path / "second")
    assert result["step"] == 5
    assert "at step 10: worse; went back to step 5" in result["stopped"]
    assert not torch.equal(weights(model), before)
    model = network()
    assert fit(model, plan(guard=lambda: "worse"), CONFIG, tmp_path / "first")["step"] == 0
    assert torch.equal(weights(model), before)


def test_another_training_s_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(Killed):
        fit(network(), plan(die_at=8), CONFIG, tmp_path)
    with pytest.raises(WrongCheckpoint, match="other name"):
        fit(network(), replace(plan(), training={"name": "else"}), CONFIG, tmp_path)


def test_a_kill_while_writing_leaves_the_checkpoint_whole(tmp_path) -> None:
    with pytest.raises(Killed):
        fit(network(), plan(die_at=8), CONFIG, tmp_path)
    (tmp_path / (CHECKPOINT + ".tmp")).write_bytes(b"half a file")
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 6, "lo')
    assert fit(network(), plan(), CONFIG, tmp_path)["step"] == STEPS


def test_rate_warms_up_and_decays() -> None:
    config = FitConfig(learning_rate=1.0, warmup_steps=10, final_share=0.1)
    rates = [rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(rates) == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert {rate(step, 100, replace(config, schedule="constant")) for step in range(10, 100)} == {1.0}


def test_only_matrices_of_linear_layers_decay() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(4, 8), "l": nn.Linear(8, 8), "n": nn.LayerNorm(8)})
    decayed, plain = adamw(model, CONFIG).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model["l"].weight)]
    assert len(plain["params"]) == 4
    assert plain["weight_decay"] == 0


def test_prefetch_yields_in_order_and_passes_errors_on() -> None:
    assert list(prefetch(lambda step: step * 2, 3, 6)) == [(3, 6), (4, 8), (5, 10)]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: 1 // (2 - step), 0, 5))


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"schedule": "linear"}, {"precision": "fp8"}, {"batch_requests": 0}])
def test_impossible_settings_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FitConfig(**wrong)
