"""A planted loss of quality: a trained candidate's weights are blurred until it recalls so much less.

The run of the model in production is copied under another id without what came after training, and its aligned model
is spoilt there: the pipeline, asked to go on with that id, evaluates, gates and tries what it finds. It is compared
with the model it was copied from, so that the planted loss is all that tells the two apart.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from features.runs import Run, folder_digest
from features.storage import Storage
from models.bundle import Bundle
from models.evaluation import accuracy, recommend
from models.release import TRAINED, assemble
from models.serving.recommender import Recommender
from models.training.data import Holdout, RunData

COPIED = ("data", "drift", *TRAINED)
MADE_FROM_BASE = ("tokenizer", "pretrain")
MODEL = "model.safetensors"
STEPS = 7


@dataclass(frozen=True, kw_only=True)
class Tampered:
    """A spoilt run: by what share it recalls less, and how much noise that took."""

    run_id: str
    loss: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class Blur:
    """How a model is spoilt: by so much noise, or by as much as costs a share ``loss`` of its recall@50."""

    seed: int
    loss: float = 0.1
    noise: float = 0.0
    """In deviations of each tensor; 0: it is searched for."""


def spoil(storage: Storage, source: str, run_id: str, *, base: str, blur: Blur) -> Tampered:
    """Stores run ``source`` as ``run_id`` with a blurred model; recall is that on the run's held-out requests.

    ``base`` is the version that the run is to be asked to go on from: its stages are recorded as made from that one.
    """
    for stage in COPIED:
        for key in storage.keys(f"runs/{source}/{stage}/"):
            storage.put(key.replace(f"runs/{source}/", f"runs/{run_id}/", 1), storage.get(key))
    run = Run(storage, run_id)
    for stage in MADE_FROM_BASE:
        _record(run, stage, inputs=lambda inputs: {**inputs, "base": base})
    with tempfile.TemporaryDirectory(prefix="onerec-spoil-") as scratch:
        folder = Path(scratch)
        for stage in ("data", *TRAINED):
            run.fetch(stage, folder)
        candidate = assemble(folder, folder / "bundle")
        holdout = RunData.load(folder / "data").holdout(candidate.catalogue)
        weights = load((folder / "align" / MODEL).read_bytes())
        whole = _recall(candidate, holdout)

        def lost(noise: float) -> float:
            candidate.model.load_state_dict(_blurred(weights, noise, blur.seed))
            return 1 - _recall(candidate, holdout) / whole

        noise, found = (blur.noise, lost(blur.noise)) if blur.noise else _search(lost, blur.loss)
        (folder / "align" / MODEL).write_bytes(save(_blurred(weights, noise, blur.seed)))
        (folder / "align" / "done.json").unlink(missing_ok=True)
        storage.put(f"{run.prefix('align')}/{MODEL}", (folder / "align" / MODEL).read_bytes())
        digest = folder_digest(folder / "align")
        _record(run, "align", digest=lambda _: digest)
    return Tampered(run_id=run_id, loss=found, noise=noise)


def _record(run: Run, stage: str, **changes: Callable[[Any], Any]) -> None:
    """Changes fields of what a finished stage recorded."""
    record = run.done(stage)
    assert record is not None, "the copied run had finished its training"
    changed = {name: change(record[name]) for name, change in changes.items()}
    run.storage.put_json(f"{run.prefix(stage)}/done.json", {**record, **changed})


def _search(lost: Callable[[float], float], loss: float) -> tuple[float, float]:
    """(noise, loss) nearest to the wanted loss, by bisection on the noise; ``lost`` tells what a noise costs."""
    low, high = 0.0, 1.0
    tried: list[tuple[float, float, float]] = []
    for _ in range(STEPS):
        noise = (low + high) / 2
        found = lost(noise)
        tried.append((abs(found - loss), noise, found))
        low, high = (noise, high) if found < loss else (low, noise)
    _, noise, found = min(tried)
    return noise, found


def _recall(candidate: Bundle, holdout: Holdout) -> float:
    return float(accuracy(recommend(Recommender(candidate), holdout), holdout.relevant)["recall@50"].mean())


def _blurred(weights: dict[str, torch.Tensor], noise: float, seed: int) -> dict[str, torch.Tensor]:
    """The weights with normal noise of ``noise`` times each tensor's own deviation."""
    generator = torch.Generator().manual_seed(seed)
    blurred = {}
    for name in sorted(weights):
        value = weights[name]
        if value.is_floating_point() and value.numel() > 1:
            blur = torch.randn(value.shape, generator=generator) * float(value.float().std()) * noise
            blurred[name] = (value.float() + blur).to(value.dtype)
        else:
            blurred[name] = value
    return blurred
