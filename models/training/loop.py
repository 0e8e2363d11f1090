"""The one fit loop of every stage: AdamW, warm-up and decay, clipping, autocast, metrics, exact resume.

Everything random is a function of (seed, step, rank): batches come by step number and each step seeds torch anew, so
a resumed run continues exactly where the killed one stopped, whatever was in flight. Under Ray Train with several
workers the model is wrapped in DistributedDataParallel; the loop is the same. Left out: gradient accumulation,
weight averaging, model parallelism.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.training.checkpoint import CHECKPOINT, restore, save
from models.training.progress import Log

Example = TypeVar("Example")


class TrainingDiverged(RuntimeError):
    """Loss or gradient is not finite; the last good checkpoint is kept."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """What every stage's optimisation shares; the constants are ours."""

    epochs: int = 1
    batch_requests: int = 64
    """Requests per step, over all workers."""
    shuffle_window: int = 4096
    """Requests shuffled together; windows follow in chronological order."""
    learning_rate: float = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 50
    final_share: float = 0.1
    """Where cosine decay ends, as a share of ``learning_rate``."""
    weight_decay: float = 0.05
    """On matrices of linear layers only."""
    clip_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto``: bf16 autocast where the hardware multiplies bf16 (others emulate it, slowly), else fp32."""
    threads: int = 0
    """CPU threads of one worker; 0 = its share of the cores where OpenMP waits passively, else one."""
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    max_steps: int = 0
    """Stop after this many steps; 0 = run all epochs."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_requests", "shuffle_window", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.schedule not in ("cosine", "constant") or self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(
                f"schedule {self.schedule!r} must be 'cosine' or 'constant', "
                f"precision {self.precision!r} 'auto', 'bf16' or 'fp32'"
            )


@dataclass(frozen=True)
class Loss:
    """What a stage computes per step: the value to descend, its parts, and how much was trained on."""

    value: Tensor
    metrics: Mapping[str, float]
    examples: int
    """Target exposures."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[Example]):
    """A stage as the loop sees it; ``guard`` is asked before every checkpoint and says why to stop, or None."""

    steps: int
    example: Callable[[int], Example]
    """The step's input, a pure function of its number."""
    objective: Callable[[nn.Module, Example], Loss]
    training: Mapping[str, Any]
    """The fingerprint (``checkpoint.fingerprint``)."""
    guard: Callable[[], str | None] | None = None


@dataclass
class _Progress:
    """Counters of a run, and sums since the last record."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, loss: Loss, extra: Mapping[str, float]) -> None:
        self.step += 1
        examples, tokens = total(loss.examples, loss.tokens)
        self.examples += examples
        self.tokens += tokens
        counts = {"steps": 1.0, "examples": examples, "tokens": tokens}
        for name, value in {**loss.metrics, **extra, **counts}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def record(self, learning_rate: float) -> dict[str, float]:
        """Means since the last record, rates per second; starts anew."""
        now = time.perf_counter()
        elapsed, self.started = now - self.started, now
        self.seconds += elapsed
        sums, self.sums = self.sums, {}
        steps = sums.pop("steps")
        rates = {f"{name}_per_s": sums.pop(name) / max(elapsed, 1e-9) for name in ("examples", "tokens")}
        means = {name: value / steps for name, value in sums.items()}
        return {"step": self.step, "lr": learning_rate, **means, **rates, "seconds": round(self.seconds, 3)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in ("step", "examples", "tokens", "seconds")}


def fit(model: nn.Module, plan: Plan[Example], config: FitConfig, output: Path) -> dict[str, Any]:
    """Trains ``model`` in place, resuming from ``output`` when a checkpoint lies there; returns the run's metrics.

    Raises TrainingDiverged on a loss or gradient that is not finite. When the guard objects, the weights go back to the
    last checkpoint it passed and ``stopped`` in the metrics says why.
    """
    output.mkdir(parents=True, exist_ok=True)
    optimizer = adamw(model, config)
    progress = _resume(model, optimizer, plan, output)
    wrapped = distributed(model)
    last: dict[str, Any] = {}
    stopped = None
    with Log(output, plan.steps, progress.step, write=rank() == 0) as log:
        for step, example in prefetch(plan.example, progress.step, plan.steps):
            learning_rate = rate(step, plan.steps, config)
            loss, norm = _step(wrapped, optimizer, plan, example, config, step, learning_rate)
            progress.add(loss, {"loss": float(loss.value.detach()), "grad_norm": norm})
            done = progress.step == plan.steps
            if done or progress.step % config.log_every == 0:
                last = progress.record(learning_rate)
                log.write(last)
            if done or progress.step % config.checkpoint_every == 0:
                stopped = _checkpoint(model, optimizer, plan, progress, output)
                if stopped:
                    break
    summary = {**{k: v for k, v in last.items() if k != "lr"}, **progress.state(), "stopped": stopped}
    summary["examples_per_s"] = progress.examples / max(progress.seconds, 1e-9)
    return summary


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan[Example],
    example: Example,
    config: FitConfig,
    step: int,
    learning_rate: float,
) -> tuple[Loss, float]:
    """One descent step; returns the loss and the gradient's norm before clipping."""
    torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    model.train()
    device = next(model.parameters()).device
    with autocast(config.precision, device):
        loss = plan.objective(model, example)
    optimizer.zero_grad(set_to_none=True)
    loss.value.backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm, foreach=True))
    if not (math.isfinite(norm) and math.isfinite(float(loss.value.detach()))):
        raise TrainingDiverged(
            f"step {step + 1}: loss {float(loss.value.detach())}, gradient norm {norm}; the last good checkpoint is "
            f"kept: lower learning_rate ({config.learning_rate}) or clip_norm ({config.clip_norm}), or look at the data"
        )
    optimizer.step()
    return loss, norm


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan[Example], output: Path) -> _Progress:
    path = output / CHECKPOINT
    if path.exists():
        state = restore(path, model, optimizer, plan.training)
        return _Progress(**{name: state[name] for name in ("step", "examples", "tokens", "seconds")})
    progress = _Progress()
    if plan.guard is not None and rank() == 0:
        # What the guard's first refusal goes back to.
        save(path, model, optimizer, {**progress.state(), "training": plan.training})
    _barrier()
    return progress


def _checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan[Example], progress: _Progress, output: Path
) -> str | None:
    """Saves when the guard agrees; else goes back to the last checkpoint and returns the reason."""
    reason = plan.guard() if plan.guard is not None else None
    if total(int(reason is not None))[0]:
        state = restore(output / CHECKPOINT, model, optimizer, plan.training)
        reason = f"at step {progress.step}: {reason or 'another worker objected'}; went back to step {state['step']}"
        progress.step = state["step"]
        return reason
    if rank() == 0:
        save(output / CHECKPOINT, model, optimizer, {**progress.state(), "training": plan.training})
    _barrier()
    return None


def adamw(model: nn.Module, config: FitConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.98: ours) that decays only the matrices of linear layers."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def rate(step: int, steps: int, config: FitConfig) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then constant, or a half cosine down to ``final_share``."""
    warmup = min(config.warmup_steps, max(steps // 5, 1))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(steps - warmup, 1)
    return config.learning_rate * (config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * done)))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast when asked for, or when ``auto`` finds hardware for it."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_multiplies_bf16()
    if precision == "bf16" or (precision == "auto" and fast):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def prefetch(example: Callable[[int], Example], start: int, steps: int) -> Iterator[tuple[int, Example]]:
    """(step, example) for ``start`` .. ``steps - 1``, the next one built in a thread meanwhile."""
    if start >= steps:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        following = pool.submit(example, start)
        for step in range(start, steps):
            ready = following.result()
            if step + 1 < steps:
                following = pool.submit(example, step + 1)
            yield step, ready


def prepare_device(threads: int, workers_here: int = 1) -> torch.device:
    """This worker's device: CUDA when there is one, else the CPU with ``threads`` threads (0: see ``FitConfig``)."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    # OpenMP threads spin at every barrier by default: with the other core busy, two of them trained 27 times slower
    # than one. With OMP_WAIT_POLICY=PASSIVE in the environment they sleep instead.
    passive = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    share = len(os.sched_getaffinity(0)) // workers_here if passive else 1
    torch.set_num_threads(threads or max(share, 1))
    return torch.device("cpu")


def distributed(model: nn.Module) -> nn.Module:
    """``model``, wrapped for gradient averaging when several workers train together."""
    if world() == 1:
        return model
    from ray.train.torch import prepare_model

    wrapped: nn.Module = prepare_model(model)
    return wrapped


def rank() -> int:
    """This worker's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many workers train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(*values: int) -> list[int]:
    """Each value summed over the workers."""
    if world() == 1:
        return list(values)
    sums = torch.tensor(values, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(sums)
    return [int(value) for value in sums.tolist()]


def _barrier() -> None:
    if world() > 1:
        dist.barrier()
