"""bf16 weights for decoding under autocast: cast once instead of at every call.

Autocast rounds the weights of matrix products to bf16 whenever they are used; a model that only serves can keep them
rounded, and half as many bytes are read per step. The results are those of autocast, bit for bit. Output heads and the
routers of experts stay fp32, because log-probabilities and routes are computed in fp32. Left out: rounding the experts.
"""

import copy
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

FP32 = ("heads", "item_head", "router")
"""Submodules that compute outside autocast."""

_COPIES: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""A new catalogue around the same model does not copy it again."""


def for_serving(model: Model) -> Model:
    """A copy of ``model`` to run under bf16 autocast: the weights of its linear layers in bf16, but for the heads."""
    made = _COPIES.get(model)
    if made is None:
        made = _COPIES[model] = _rounded(model)
    assert isinstance(made, type(model))
    return made


def _rounded(model: nn.Module) -> nn.Module:
    rounded = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Linear) and not set(name.split(".")) & set(FP32):
            module.to(torch.bfloat16)
    return rounded
