"""What every stage's optimisation shares: a frozen dataclass, so that a recipe is a value and a fingerprint."""

from dataclasses import dataclass
from typing import Literal

LAW = 0.0
"""``learning_rate`` of this value means V2's law (``models.training.optimizer.law``)."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Optimisation of a stage; the constants are ours unless a paper is named."""

    epochs: int = 1
    batch_requests: int = 64
    """Requests per optimizer step, over all workers."""
    accumulate: int = 1
    """Parts a step's requests are computed in, one after the other: less memory, the same step."""
    shuffle_window: int = 4096
    """Requests shuffled together; windows follow in chronological order."""
    learning_rate: float = 2e-3
    """0 = V2's law for the model's size (Table 5), the default of the large presets."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 50
    final_share: float = 0.1
    """Where cosine decay ends, as a share of ``learning_rate``."""
    weight_decay: float = 0.05
    """On matrices of linear layers only."""
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    """The outcome is a running mean of the weights with this decay; 0 = the last weights."""
    balance_rate: float = 1e-3
    """How far the routing bias of a mixture of experts moves after each step (V1 2.2.3, DeepSeek-V3's u)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto``: bf16 autocast where the hardware multiplies bf16 (others emulate it, slowly), else fp32."""
    parallel: Literal["ddp", "fsdp", "auto"] = "ddp"
    """How several workers share a model: a copy each, or parameters, gradients and moments sharded; ``auto``: sharded
    where there is CUDA."""
    compile: bool = False
    """torch.compile; CUDA only."""
    threads: int = 0
    """CPU threads of one worker; 0 = its share of the cores where OpenMP waits passively, else one."""
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    max_steps: int = 0
    """Stop after this many steps; 0 = run all epochs."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_requests", "accumulate", "shuffle_window", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_requests % self.accumulate:
            raise ValueError(
                f"batch_requests {self.batch_requests} cannot be computed in accumulate {self.accumulate} equal parts"
            )
        if self.learning_rate < 0 or not 0 <= self.ema_decay < 1 or self.balance_rate < 0:
            raise ValueError(
                f"learning_rate {self.learning_rate} and balance_rate {self.balance_rate} must be at least 0, "
                f"ema_decay {self.ema_decay} in [0, 1)"
            )
        if self.schedule not in ("cosine", "constant") or self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(
                f"schedule {self.schedule!r} must be 'cosine' or 'constant', "
                f"precision {self.precision!r} 'auto', 'bf16' or 'fp32'"
            )
        if self.parallel not in ("ddp", "fsdp", "auto"):
            raise ValueError(f"parallel {self.parallel!r} must be 'ddp', 'fsdp' or 'auto'")
