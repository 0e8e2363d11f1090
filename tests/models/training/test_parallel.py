import pytest
import torch
from torch import nn

from models.training.config import FitConfig
from models.training.device import cpu_multiplies_bf16, halves, keep_memory, peak_flops
from models.training.parallel import distributed, like, scaled_norm, whole

CPU = torch.device("cpu")


def with_gradients(scale: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * scale
    return model


@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_scaling_then_clipping_is_torch_s_clipping(scale: float) -> None:
    ours, theirs = with_gradients(scale), with_gradients(scale)
    for p in theirs.parameters():
        p.grad *= 0.5
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    assert scaled_norm(ours, 0.5, 1.0) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4)


def test_a_norm_that_is_not_finite_leaves_the_gradients_alone() -> None:
    model = with_gradients(1.0)
    model[0].weight.grad[0, 0] = torch.nan
    before = model[1].weight.grad.clone()
    assert not torch.isfinite(torch.tensor(scaled_norm(model, 0.5, 1.0)))
    assert torch.equal(model[1].weight.grad, before)
    assert scaled_norm(nn.Linear(2, 2), 1.0, 1.0) == 0.0


def test_one_worker_trains_the_model_itself() -> None:
    model = nn.Linear(2, 2)
    assert distributed(model, FitConfig(parallel="auto")) is model
    assert torch.equal(whole(model.weight), like(model.weight, model.weight))


def test_the_peak_is_measured_in_the_precision_that_trains() -> None:
    keep_memory()
    assert halves("bf16", CPU)
    assert not halves("fp32", CPU)
    assert halves("auto", CPU) == cpu_multiplies_bf16()
    assert peak_flops("fp32", CPU) > 1e9
