import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.nn.fused import attend, rms_norm, silu_gate


def attend_by_hand(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    scores = (query @ keys.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    scores = (scores.unflatten(2, (bias.shape[2], -1)) + bias).flatten(2, 3)
    return scores.softmax(-1).to(values.dtype) @ values


def silu_gate_by_hand(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rms_norm_by_hand(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight, 1e-6).to(x.dtype)


CASES = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-6), rms_norm_by_hand, [(3, 4, 8), (8,)]),
    "gate": (silu_gate, silu_gate_by_hand, [(5, 12)]),
    "attend": (attend, attend_by_hand, [(2, 2, 6, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 3, 1, 5)]),
    "one bias for all heads": (attend, attend_by_hand, [(2, 2, 6, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 1, 1, 1, 5)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_derivatives(name: str) -> None:
    ours, _, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_equal_autograd_s_own(name: str, dtype: torch.dtype) -> None:
    ours, by_hand, shapes = CASES[name]
    torch.manual_seed(0)
    made = [torch.randn(*shape) for shape in shapes]
    # What stays fp32 under autocast: the norm's weight and the attention's bias.
    made = [x if index and index == len(made) - 1 else x.to(dtype) for index, x in enumerate(made)]
    results = []
    for work in (ours, by_hand):
        inputs = [x.clone().requires_grad_() for x in made]
        out = work(*inputs)
        out.backward(torch.ones_like(out))
        results.append((out, *(x.grad for x in inputs)))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, atol=tolerance, rtol=tolerance)


def test_padding_gets_no_weight_and_no_gradient() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf, -torch.inf])[None, None, None, None]
    out = attend(query, keys, keys, bias)
    out.sum().backward()
    assert torch.allclose(out, attend(query, keys[:, :, :3], keys[:, :, :3], bias[..., :3]))
    assert keys.grad[:, :, 3:].abs().max() == 0
    assert out.isfinite().all()
