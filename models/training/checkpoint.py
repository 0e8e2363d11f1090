"""What training writes: an atomic checkpoint to resume from, and the finished stage's files.

A checkpoint is *one* safetensors file (weights, their running mean, optimizer moments; step and fingerprint in its
header), replaced by rename, so a kill at any moment leaves the older or the newer one whole. No random state is stored:
every step seeds itself (``models.training.loop``). A finished stage is model.safetensors, config.json, metrics.jsonl
and, written last, metrics.json. safetensors and JSON only. Left out: one file per shard, for models that do not fit in
one machine's memory.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import architectures
from models.generator import Generator, GeneratorConfig
from models.training.device import barrier, rank
from models.training.optimizer import Average
from models.training.parallel import like, whole

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
LOG = "metrics.jsonl"
DATA = ("exposures.parquet", "sequences/features.arrow", "sequences/lifelong_events.arrow")
"""Files of a run's data that decide what is trained on."""


class WrongCheckpoint(ValueError):
    """The output folder belongs to a training with other inputs; the message says which differ."""


def fingerprint(
    stage: str, config: Mapping[str, Any], model: GeneratorConfig, data: Path, sids: np.ndarray, init: Path | None
) -> dict[str, Any]:
    """Everything that decides a training's outcome, as JSON values: equal fingerprints may resume each other."""
    files = {name: sha256(data / name) for name in DATA}
    weights = sha256(init / WEIGHTS) if init is not None else ""
    catalogue = hashlib.sha256(sids.tobytes()).hexdigest()
    record = {"stage": stage, "config": dict(config), "catalogue": catalogue, "init": weights}
    decoded: dict[str, Any] = json.loads(json.dumps({**record, **architectures.to_json(model), **files}))
    return decoded


def finished(output: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metrics of a training that finished in ``output``, or None; raises WrongCheckpoint for another one's."""
    if not (output / METRICS).exists():
        return None
    _check(output, json.loads((output / CONFIG).read_text())["training"], wanted)
    metrics: dict[str, Any] = json.loads((output / METRICS).read_text())
    return metrics


def finish(output: Path, model: Generator, training: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Writes the stage's files, metrics.json last, and removes the checkpoint. Every worker calls it, one writes."""
    weights = _whole(model.state_dict())
    if rank() == 0:
        _write(output / WEIGHTS, weights, {})
        write_json(output / CONFIG, {**architectures.to_json(model), "training": dict(training)})
        write_json(output / METRICS, metrics)
        (output / CHECKPOINT).unlink(missing_ok=True)
    barrier()


@dataclass(frozen=True)
class Training:
    """What a checkpoint holds of a training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average


def save(path: Path, training: Training, state: Mapping[str, Any]) -> None:
    """Replaces the checkpoint at ``path`` atomically; ``state`` is JSON-able. Every worker calls it, one writes."""
    tensors = {f"model.{name}": value for name, value in _whole(training.model.state_dict()).items()}
    tensors |= {f"mean.{name}": value for name, value in _whole(training.average.mean).items()}
    for index, values in training.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in _whole(values).items()}
    if rank() == 0:
        _write(path, tensors, {"state": json.dumps(dict(state))})
    barrier()


def restore(path: Path, training: Training, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the checkpoint into ``training``; returns its state. Raises WrongCheckpoint."""
    with safe_open(path, "pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    _check(path, state["training"], wanted)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "mean": {}, "optimizer": {}}
    for key, value in load_file(path).items():
        kind, name = key.split(".", 1)
        parts[kind][name] = value
    current = training.model.state_dict()
    training.model.load_state_dict({name: like(value, current[name]) for name, value in parts["model"].items()})
    training.average.load({name: like(value, current[name]) for name, value in parts["mean"].items()})
    _load_moments(training.optimizer, parts["optimizer"])
    return state


def _load_moments(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in stored.items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = like(value, parameters[int(index)]) if value.ndim else value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def read_config(folder: Path) -> GeneratorConfig:
    """The model configuration of a stage's output or of a bundle."""
    return architectures.read_config(folder / CONFIG)


def load_weights(model: nn.Module, folder: Path, config: GeneratorConfig) -> None:
    """Loads the weights of a stage's output or of a bundle; raises ValueError when they are of another model."""
    (kind, mine), (their_kind, theirs) = (architectures.describe(c) for c in (config, read_config(folder)))
    if kind != their_kind:
        raise ValueError(f"the weights in {folder} are of a {their_kind} model, not {kind}; use that preset")
    wrong = [name for name, value in mine.items() if theirs[name] != value and name != "dropout"]
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


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    scratch = path.with_name(path.name + ".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, scratch, metadata)
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in tensors.items()}


def _check(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if different:
        raise WrongCheckpoint(
            f"{where} was written with other {', '.join(different)}; give another output folder, or remove this one"
        )


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
