"""What training writes: an atomic checkpoint to resume from, and the finished stage's files.

A checkpoint is *one* safetensors file (weights, optimizer moments; step and fingerprint in its header), replaced by
rename, so a kill at any moment leaves the older or the newer one whole. No random state is stored: every step seeds
itself (``models.training.loop``). A finished stage is model.safetensors, config.json, metrics.jsonl and, written last,
metrics.json. safetensors and JSON only. Left out: sharded checkpoints for models larger than one device.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.onerec_v2 import V2Config

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
LOG = "metrics.jsonl"


class WrongCheckpoint(ValueError):
    """The output folder belongs to a training with other inputs; the message says which differ."""


def fingerprint(
    stage: str, config: Mapping[str, Any], model: V2Config, data: Path, sids: np.ndarray, init: Path | None
) -> dict[str, Any]:
    """Everything that decides a training's outcome, as JSON values: equal fingerprints may resume each other."""
    files = {name: _sha256(data / f"{name}.parquet") for name in ("exposures", "features")}
    weights = _sha256(init / WEIGHTS) if init is not None else ""
    catalogue = hashlib.sha256(sids.tobytes()).hexdigest()
    record = {"stage": stage, "config": dict(config), "model": asdict(model), "catalogue": catalogue, "init": weights}
    decoded: dict[str, Any] = json.loads(json.dumps({**record, **files}))
    return decoded


def finished(output: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metrics of a training that finished in ``output``, or None; raises WrongCheckpoint for another one's."""
    if not (output / METRICS).exists():
        return None
    _check(output, json.loads((output / CONFIG).read_text())["training"], wanted)
    metrics: dict[str, Any] = json.loads((output / METRICS).read_text())
    return metrics


def finish(
    output: Path, model: nn.Module, config: V2Config, training: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """Writes the stage's files, metrics.json last, and removes the checkpoint."""
    _save(output / WEIGHTS, _weights(model), {})
    write_json(output / CONFIG, {"architecture": "onerec_v2", "model": asdict(config), "training": dict(training)})
    write_json(output / METRICS, metrics)
    (output / CHECKPOINT).unlink(missing_ok=True)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Replaces the checkpoint at ``path`` atomically; ``state`` is JSON-able."""
    tensors = {f"model.{name}": value for name, value in _weights(model).items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.detach().cpu() for name, value in values.items()}
    _save(path, tensors, {"state": json.dumps(dict(state))})


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads the checkpoint into ``model`` and ``optimizer``; returns its state. Raises WrongCheckpoint."""
    with safe_open(path, "pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    _check(path, state["training"], wanted)
    moments: dict[int, dict[str, Tensor]] = {}
    weights = {}
    for key, value in load_file(path).items():
        kind, name = key.split(".", 1)
        if kind == "model":
            weights[name] = value
        else:
            index, name = name.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def read_config(folder: Path) -> V2Config:
    """The model configuration of a stage's output or of a bundle."""
    return V2Config(**json.loads((folder / CONFIG).read_text())["model"])


def load_weights(model: nn.Module, folder: Path, config: V2Config) -> None:
    """Loads the weights of a stage's output or of a bundle; raises ValueError when they are of another model."""
    theirs = asdict(read_config(folder))
    wrong = [name for name, value in asdict(config).items() if theirs[name] != value and name != "dropout"]
    if wrong:
        raise ValueError(
            f"the weights in {folder} are of a model with other {', '.join(wrong)}; "
            f"continue with that model's configuration, or train from scratch"
        )
    model.load_state_dict(load_file(folder / WEIGHTS))


def write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` by readable JSON, atomically."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(value, indent=1, sort_keys=True))
    scratch.replace(path)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    scratch = path.with_name(path.name + ".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, scratch, metadata)
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def _check(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if different:
        raise WrongCheckpoint(
            f"{where} was written with other {', '.join(different)}; give another output folder, or remove this one"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
