"""The QFormer's checkpoint: one safetensors file, replaced by rename, so a kill leaves an old or a new one whole.

Weights and optimizer moments; the step and a mark of what the training is made from stand in its header. No random
state: every step seeds itself (``alignment``).
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CHECKPOINT = "alignment.safetensors"


def checkpoint_step(keep: Path) -> int:
    """The step from which an interrupted training in the folder ``keep`` would go on; 0 without a checkpoint."""
    path = keep / CHECKPOINT
    return _header(path)[0] if path.exists() else 0


def save(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, mark: str) -> None:
    """Replaces the checkpoint at ``path``."""
    tensors = {f"model.{name}": value for name, value in network.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    scratch = path.with_name(path.name + ".tmp")
    header = {"step": str(step), "mark": mark}
    save_file({name: value.contiguous() for name, value in tensors.items()}, scratch, header)
    scratch.replace(path)


def restore(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, mark: str) -> int:
    """Loads the checkpoint into ``network`` and ``optimizer``; returns its step. Raises ValueError for another mark."""
    step, theirs = _header(path)
    if theirs != mark:
        raise ValueError(f"{path} is of a training on other data or settings; remove it or give another folder")
    moments: dict[int, dict[str, Tensor]] = {}
    weights = {}
    for key, value in load_file(path).items():
        kind, name = key.split(".", 1)
        if kind == "model":
            weights[name] = value
        else:
            index, name = name.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
    network.load_state_dict(weights)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _header(path: Path) -> tuple[int, str]:
    with safe_open(path, "pt") as file:
        header: dict[str, str] = file.metadata()
    return int(header["step"]), header["mark"]
