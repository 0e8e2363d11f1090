"""The one fit loop of every stage: accumulate, clip, descend, average, balance, record, checkpoint, resume.

Everything random is a function of (seed, step, rank): batches come by number and each seeds torch anew, so a resumed
run continues exactly where the killed one stopped, whatever was in flight. A step's loss is the mean over all that its
parts and workers trained on, weighted as each part's own mean is: one worker, two, or four parts make the same step.
Left out: asynchronous updates.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from models.nn.moe import balance
from models.training.checkpoint import CHECKPOINT, Training, restore, save
from models.training.config import FitConfig
from models.training.device import autocast, peak_flops, rank, total, world
from models.training.optimizer import Average, active_parameters, adamw, base_rate, rate
from models.training.parallel import distributed, gradients_stay, scaled_norm
from models.training.progress import Log, report
from models.training.remote import Remote

Example = TypeVar("Example")


class TrainingDiverged(RuntimeError):
    """Loss or gradient is not finite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Loss:
    """What a stage computes per part of a step: the value to descend, its parts, and how much was trained on."""

    value: Tensor
    metrics: Mapping[str, float]
    examples: int
    """Target exposures."""
    tokens: int
    weight: float = 1.0
    """What ``value`` is a mean over: parts and workers count in proportion to it."""


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[Example]):
    """A stage as the loop sees it; ``guard`` is asked before every checkpoint and says why to stop, or None.

    It meets the model as it would come out: with the mean of the weights where one is kept.
    """

    steps: int
    example: Callable[[int], Example]
    """Input of part number ``step * accumulate + part``: a pure function of that number."""
    objective: Callable[[nn.Module, Example], Loss]
    training: Mapping[str, Any]
    """The fingerprint (``checkpoint.fingerprint``)."""
    guard: Callable[[], str | None] | None = None
    remote: str = ""
    """Key of a copy of the checkpoint in object storage; empty: only the output folder has one."""


@dataclass
class _Progress:
    """Counters of a run, and sums since the last record."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, metrics: Mapping[str, float]) -> None:
        """``metrics`` of one step over all workers; ``examples`` and ``tokens`` among them are counts."""
        self.step += 1
        self.examples += int(metrics["examples"])
        self.tokens += int(metrics["tokens"])
        for name, value in {**metrics, "steps": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def record(self, learning_rate: float, token_flops: float) -> dict[str, float]:
        """Means since the last record, rates per second and MFU; starts anew."""
        now = time.perf_counter()
        elapsed, self.started = now - self.started, now
        self.seconds += elapsed
        sums, self.sums = self.sums, {}
        steps = sums.pop("steps")
        rates = {f"{name}_per_s": sums.pop(name) / max(elapsed, 1e-9) for name in ("examples", "tokens")}
        means = {name: value / steps for name, value in sums.items()}
        mfu = rates["tokens_per_s"] * token_flops
        return {"step": self.step, "lr": learning_rate, **means, **rates, "mfu": mfu, "seconds": round(self.seconds, 3)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in ("step", "examples", "tokens", "seconds")}


def fit(model: nn.Module, plan: Plan[Example], config: FitConfig, output: Path) -> dict[str, Any]:
    """Trains ``model`` in place, resuming from ``output`` when a checkpoint lies there; returns the run's metrics.

    Raises TrainingDiverged on a loss or gradient that is not finite. When the guard objects, the weights go back to the
    last checkpoint it passed and ``stopped`` in the metrics says why.
    """
    output.mkdir(parents=True, exist_ok=True)
    config = replace(config, learning_rate=base_rate(config, model))
    per_token = 6 * active_parameters(model) / (world() * peak_flops(config.precision, _device(model)))
    run = _Run(model, plan, config, output)
    progress = run.resume()
    last: dict[str, Any] = {}
    stopped = None
    start, parts = progress.step, config.accumulate
    with Log(output, plan.steps, start, write=rank() == 0) as log:
        examples = prefetch(plan.example, start * parts, plan.steps * parts)
        for step in range(start, plan.steps):
            learning_rate = rate(step, plan.steps, config)
            progress.add(run.step(step, (next(examples) for _ in range(parts)), learning_rate))
            done = progress.step == plan.steps
            if done or progress.step % config.log_every == 0:
                last = progress.record(learning_rate, per_token)
                log.write(last)
            if done or progress.step % config.checkpoint_every == 0:
                stopped = run.checkpoint(progress)
                report(last)
                if stopped:
                    break
    run.average.replace(model)
    summary = {**{k: v for k, v in last.items() if k != "lr"}, **progress.state(), "stopped": stopped}
    summary |= {"examples_per_s": progress.examples / max(progress.seconds, 1e-9), **run.remote.close(run.path)}
    return summary


class _Run(Generic[Example]):
    """A model in training: the optimizer, the mean of its weights, and where both are kept."""

    def __init__(self, model: nn.Module, plan: Plan[Example], config: FitConfig, output: Path) -> None:
        self.plan, self.config, self.path = plan, config, output / CHECKPOINT
        self.model, self.device = model, _device(model)
        self.wrapped = distributed(model, config)
        self.optimizer = adamw(model, config)
        self.average = Average(model, config.ema_decay)
        self.remote = Remote(plan.remote)

    @property
    def training(self) -> Training:
        return Training(self.model, self.optimizer, self.average)

    def resume(self) -> _Progress:
        """Loads the checkpoint, from object storage when this machine has none; raises WrongCheckpoint."""
        self.remote.fetch(self.path)
        state = restore(self.path, self.training, self.plan.training) if self.path.exists() else None
        found = state["step"] if state else -1
        if total(found)[0] != found * world():
            raise RuntimeError(
                f"worker {rank()} found a checkpoint of step {found} (-1: none) at {self.path}, others found another; "
                "let all workers see one folder, or remove the older checkpoints"
            )
        if state:
            return _Progress(**{name: state[name] for name in ("step", "examples", "tokens", "seconds")})
        progress = _Progress()
        if self.plan.guard is not None:  # what the guard's first refusal goes back to
            save(self.path, self.training, {**progress.state(), "training": self.plan.training})
        return progress

    def checkpoint(self, progress: _Progress) -> str | None:
        """Saves when the guard agrees; else goes back to the last checkpoint and returns the reason."""
        reason = None
        if self.plan.guard is not None:
            with self.average.lent(self.model):
                reason = self.plan.guard()
        if total(float(reason is not None))[0]:
            state = restore(self.path, self.training, self.plan.training)
            reason = (
                f"at step {progress.step}: {reason or 'another worker objected'}; went back to step {state['step']}"
            )
            progress.step = state["step"]
            return reason
        save(self.path, self.training, {**progress.state(), "training": self.plan.training})
        if rank() == 0:
            self.remote.send(self.path)
        return None

    def step(self, step: int, examples: Iterator[Example], learning_rate: float) -> dict[str, float]:
        """One descent step; returns its metrics over all parts and workers. Raises TrainingDiverged."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self._backward(step, examples)
        weight = metrics.pop("weight")
        norm = scaled_norm(self.model, world() / max(weight, 1e-8), self.config.clip_norm)
        if not math.isfinite(norm) or not math.isfinite(metrics["loss"]):
            raise TrainingDiverged(self._diverged(step, metrics["loss"], norm, learning_rate))
        self.optimizer.step()
        self.average.update(self.model, step)
        return {**metrics, "grad_norm": norm, **balance(self.model, self.config.balance_rate)}

    def _backward(self, step: int, examples: Iterator[Example]) -> dict[str, float]:
        """Adds up the gradients of every part; returns weighted means over parts and workers, and the counts."""
        parts = self.config.accumulate
        sums: dict[str, float] = {}
        for part, example in enumerate(examples):
            number = step * parts + part
            torch.manual_seed((self.config.seed * 1_000_003 + number) * 1_009 + rank())
            with gradients_stay(self.wrapped, part < parts - 1):
                with autocast(self.config.precision, self.device):
                    loss = self.plan.objective(self.wrapped, example)
                (loss.value * loss.weight).backward()
            means = {"loss": float(loss.value.detach()), **loss.metrics}
            added = {name: value * loss.weight for name, value in means.items()}
            added |= {"examples": loss.examples, "tokens": loss.tokens, "weight": loss.weight}
            sums = {name: sums.get(name, 0.0) + value for name, value in added.items()}
        sums = dict(zip(sums, total(*sums.values()), strict=True))
        weight, counts = sums["weight"], ("examples", "tokens", "weight")
        return {name: value if name in counts else value / max(weight, 1e-8) for name, value in sums.items()}

    def _diverged(self, step: int, loss: float, norm: float, learning_rate: float) -> str:
        bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
        where = f"; not finite first in the gradient of {bad[0]} ({len(bad)} tensors)" if bad else ""
        return (
            f"step {step + 1}: loss {loss}, gradient norm {norm}, learning rate {learning_rate:.3g}{where}; the last "
            f"good checkpoint is kept in {self.path.parent}: lower learning_rate ({self.config.learning_rate:.3g}) or "
            f"clip_norm ({self.config.clip_norm}), or look at the data"
        )


def prefetch(example: Callable[[int], Example], start: int, stop: int) -> Iterator[Example]:
    """The examples numbered ``start`` .. ``stop - 1``, the next one built in a thread meanwhile."""
    if start >= stop:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        following = pool.submit(example, start)
        for number in range(start, stop):
            ready = following.result()
            if number + 1 < stop:
                following = pool.submit(example, number + 1)
            yield ready


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
