import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from models.nn.moe import MoE
from models.training.checkpoint import CHECKPOINT, LOG, WrongCheckpoint
from models.training.config import FitConfig
from models.training.loop import Loss, Plan, TrainingDiverged, fit, prefetch
from models.training.progress import EVENTS, reporting

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


@pytest.mark.parametrize(("die_at", "options"), [(3, {}), (5, {}), (12, {}), (12, {"ema_decay": 0.8, "accumulate": 2})])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, die_at: int, options: dict[str, float]) -> None:
    config = replace(CONFIG, **options)
    whole = network()
    expected = fit(whole, plan(), config, tmp_path / "whole")
    with pytest.raises(Killed):
        fit(network(), plan(die_at=die_at), config, tmp_path / "killed")
    resumed = network()
    got = fit(resumed, plan(), config, tmp_path / "killed")
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
        {"loss", "lr", "grad_norm", "examples_per_s", "tokens_per_s", "mfu", "part"} <= set(record)
        for record in records
    )
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(record["part"] == 1.0 and 0 < record["mfu"] < 1 for record in records)


def test_tensorboard_sees_the_records_and_a_sink_those_at_checkpoints(tmp_path) -> None:
    seen: list[dict[str, float]] = []
    with reporting(seen.append):
        fit(network(), plan(), CONFIG, tmp_path)
    events = EventAccumulator(str(tmp_path / EVENTS)).Reload().Scalars("loss")
    records = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [event.step for event in events] == [record["step"] for record in records] == [4, 8, 12, 16, 17]
    assert [event.value for event in events] == pytest.approx([record["loss"] for record in records], rel=1e-4)
    assert [record["step"] for record in seen] == [4, 8, 12, 17]  # after steps 5, 10, 15 and 17


def test_parts_of_a_step_add_up_to_it(tmp_path) -> None:
    """Four parts of unequal weight make the same step as one batch: their loss is a weighted mean."""

    def objective(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Loss:
        x, weight = batch
        value = ((model(x).squeeze(1) - x.sum(1)).square() * weight).sum() / weight.sum()
        return Loss(value, {"mean": float(x.mean())}, len(x), len(x), weight=float(weight.sum()))

    def rows(number: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        step, part = divmod(number, parts)
        g = torch.Generator().manual_seed(step)
        x, weight = torch.randn(8, 6, generator=g), torch.rand(8, generator=g)
        return x.chunk(parts)[part], weight.chunk(parts)[part]

    outcomes = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        made = Plan(steps=6, example=lambda number, p=parts: rows(number, p), objective=objective, training={})
        metrics = fit(model, made, replace(CONFIG, accumulate=parts, precision="fp32"), tmp_path / str(parts))
        outcomes.append((weights(model), metrics))
    (whole, one), (added, four) = outcomes
    assert torch.allclose(whole, added, atol=1e-5)
    assert one["examples"] == four["examples"] == 48
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-3)


def test_the_outcome_is_the_mean_of_the_weights_when_asked_for(tmp_path) -> None:
    last, mean = network(), network()
    fit(last, plan(), CONFIG, tmp_path / "last")
    fit(mean, plan(), replace(CONFIG, ema_decay=0.9), tmp_path / "mean")
    start = weights(network())
    assert 0 < (weights(mean) - start).norm() < (weights(last) - start).norm()


def test_the_guard_judges_the_mean_and_the_training_goes_on_from_the_weights(tmp_path) -> None:
    config = replace(CONFIG, ema_decay=0.9)
    judged, asked, plain = [], network(), network()
    made = plan()

    def guard() -> str | None:
        judged.append(weights(asked).clone())

    fit(asked, replace(made, guard=guard), config, tmp_path / "asked")
    fit(plain, made, config, tmp_path / "plain")
    assert torch.equal(judged[-1], weights(asked))
    assert torch.equal(weights(asked), weights(plain))


def test_the_routing_bias_moves_after_every_step(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), MoE(8, 8, experts=4, active=1, shared=0), nn.Linear(8, 1))
    fit(model, plan(steps=5), replace(CONFIG, balance_rate=0.5, log_every=1), tmp_path)
    steps = model[1].bias.abs() / 0.5
    assert steps.max() > 0
    assert torch.allclose(steps, steps.round())
    assert "moe/max_over_mean" in json.loads((tmp_path / LOG).read_text().splitlines()[0])


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path) -> None:
    with pytest.raises(TrainingDiverged, match=r"step 13: loss nan.*gradient of 0\.weight"):
        fit(network(), plan(nan_at=12), CONFIG, tmp_path)
    kept = load_file(tmp_path / CHECKPOINT)
    assert all(tensor.isfinite().all() for tensor in kept.values())
    healthy, resumed = network(), network()
    fit(healthy, plan(), CONFIG, tmp_path / "healthy")
    assert fit(resumed, plan(), CONFIG, tmp_path)["step"] == STEPS
    assert torch.equal(weights(resumed), weights(healthy))


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


def test_prefetch_yields_in_order_and_passes_errors_on() -> None:
    assert list(prefetch(lambda step: step * 2, 3, 6)) == [6, 8, 10]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: 1 // (2 - step), 0, 5))


def test_compiling_needs_cuda(tmp_path) -> None:
    with pytest.raises(ValueError, match="compile needs CUDA, and this worker computes on cpu"):
        fit(network(), plan(), replace(CONFIG, compile=True), tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"schedule": "linear"},
        {"precision": "fp8"},
        {"batch_requests": 0},
        {"accumulate": 3},
        {"ema_decay": 1.0},
        {"learning_rate": -1.0},
        {"parallel": "tensor"},
    ],
)
def test_impossible_settings_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FitConfig(**wrong)
