"""One model on several workers: DistributedDataParallel through Ray Train, or FSDP2.

FSDP2 shards every block's parameters, gradients and moments over the workers and gathers a block's weights while it
computes. It is meant for GPUs and has been run on CPU workers only. What shards is imported by who has several workers:
it takes a second. Left out: tensor and pipeline parallelism.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.generator import Generator
from models.training.config import FitConfig
from models.training.device import world

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def distributed(model: nn.Module, config: FitConfig) -> nn.Module:
    """What to call for a forward pass: ``model``, compiled and shared with the other workers as configured.

    FSDP shards ``model`` itself, so optimizers are to be made afterwards. Raises ValueError when the configuration asks
    to compile and there is no CUDA.
    """
    device = next(model.parameters()).device.type
    if config.compile and device != "cuda":
        raise ValueError(f"compile needs CUDA, and this worker computes on {device}; set compile to false")
    if not sharded(model, config) and world() > 1:
        from ray.train.torch import prepare_model

        model = prepare_model(model)
    if config.compile:
        model.compile()
    return model


def shards(model: nn.Module, config: FitConfig) -> bool:
    """Whether it is configured that ``model`` is sharded over the workers."""
    device = next(model.parameters()).device.type
    return world() > 1 and (config.parallel == "fsdp" or (config.parallel == "auto" and device == "cuda"))


def sharded(model: nn.Module, config: FitConfig) -> bool:
    """Shards ``model`` when it is so configured, and says whether."""
    if not shards(model, config):
        return False
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world(),))
    for block in model.blocks if isinstance(model, Generator) else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return True


@contextmanager
def gradients_stay(model: nn.Module, here: bool) -> Iterator[None]:
    """While ``here`` holds, backward passes add up on this worker and are not averaged over the others yet."""
    if here and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def whole(value: Tensor) -> Tensor:
    """A parameter or moment gathered from its shards, on the CPU; every worker must ask."""
    return (value.full_tensor() if _shared(value) else value).detach().cpu()


def _shared(value: Tensor) -> TypeGuard["DTensor"]:
    """Whether the workers hold a part of it each."""
    if world() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def like(value: Tensor, other: Tensor) -> Tensor:
    """``value`` sharded as ``other`` is."""
    if _shared(other):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return value


def scaled_norm(model: nn.Module, factor: float, limit: float) -> float:
    """Multiplies the gradients by ``factor``, clips them at norm ``limit``; returns the norm before clipping.

    A norm that is not finite is returned and the gradients are left as they are.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return 0.0
    found = nn.utils.get_total_norm(grads, foreach=True)
    norm = float(found.full_tensor() if _shared(found) else found) * factor
    if math.isfinite(norm):
        torch._foreach_mul_(grads, factor * min(1.0, limit / (norm + 1e-6)))
    return norm
