"""Forward and backward of the model's memory-bound parts, written by hand: RMSNorm, the SwiGLU gate, cross-attention.

On a CPU the matrix products of a training step run near the peak; what remains is passes over memory. Autograd's own
chain for these parts makes two to three times as many as these do, and keeps twice the bytes for the backward pass.
Plain torch operations throughout, so that they run on any device, under autocast and under the FLOP counter; second
derivatives are left out.

Shapes: N rows, d width, B requests, G KV groups, M = queries of a group (repeated heads x tokens), S context tokens,
D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, computed in fp32, in the dtype of ``x``."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def silu_gate(x: Tensor) -> Tensor:
    """``silu(gate) * up`` where ``x`` [..., 2h] holds gate and up side by side; [..., h]."""
    gated: Tensor = _SiluGate.apply(x)
    return gated


def attend(query_BGMD: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor, bias: Tensor) -> Tensor:
    """``softmax(query keys^T / sqrt(D) + bias) values``, the softmax in fp32.

    ``bias`` is [B, G, R, 1, S] (any axis but the last may be 1), R dividing M: it is never written out for all queries.
    """
    mixed: Tensor = _Attend.apply(query_BGMD, keys_BGSD, values_BGSD, bias)
    return mixed


def wide(dtype: torch.dtype) -> torch.dtype:
    """What reductions over values of ``dtype`` are computed in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        high = x.to(wide(x.dtype))
        mean = torch.linalg.vector_norm(high, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (high * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # y = x r w, r = (mean x^2 + eps)^-1/2: dx = r (w dy) - x r^3 mean(x w dy), dw = sum over rows of x r dy
        x, weight, inverse = ctx.saved_tensors
        d = x.shape[-1]
        high, grad = x.to(inverse.dtype), grad.to(inverse.dtype)
        product = (high * grad).reshape(-1, d)
        mean = (product @ weight).view_as(inverse).div_(d)
        grad_weight = inverse.reshape(-1) @ product
        grad_x = (grad * weight).mul_(inverse).addcmul_(high, mean.mul_(inverse.pow(3)), value=-1)
        return grad_x.to(x.dtype), grad_weight, None


class _SiluGate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        result = torch.empty_like(x)
        into_gate, into_up = result.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=into_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=into_gate)
        return result


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        weights = (scores.unflatten(2, (bias.shape[2], -1)) + bias).softmax(-1).to(values.dtype).flatten(2, 3)
        ctx.save_for_backward(query, keys, values, weights)
        ctx.bias = bias.shape, bias.dtype
        return weights @ values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        query, keys, values, weights = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        # softmax: dscores = weights (dweights - sum(weights dweights)); the sum over S equals grad . output
        high = weights.to(wide(weights.dtype))
        of_scores = torch._softmax_backward_data((grad @ values.transpose(-1, -2)).to(high.dtype), high, -1, high.dtype)
        shape, dtype = ctx.bias
        of_bias = None
        if ctx.needs_input_grad[3]:
            of_bias = of_scores.unflatten(2, (shape[2], -1)).sum_to_size(shape).to(dtype)
        of_scores = of_scores.to(query.dtype)
        of_values = weights.transpose(-1, -2) @ grad
        of_query = (of_scores @ keys).mul_(scale)
        return of_query, of_scores.transpose(-1, -2) @ (query * scale), of_values, of_bias
