"""The optimizer: AdamW, V2's learning-rate law, warm-up and decay, and a running mean of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.generator import Generator
from models.training.config import LAW, FitConfig


def adamw(model: nn.Module, config: FitConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.98: ours) that decays only the matrices of linear layers."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def law(parameters: float) -> float:
    """V2 Table 5 (arXiv 2508.20900): ``5e-4 sqrt(0.1e9 / N)``, N the active parameters beside embeddings and heads."""
    return 5e-4 * math.sqrt(0.1e9 / parameters)


def base_rate(config: FitConfig, model: nn.Module) -> float:
    """The configured learning rate, or the law's for this model."""
    return config.learning_rate if config.learning_rate != LAW else law(max(active_parameters(model), 1))


def active_parameters(model: nn.Module) -> float:
    """Parameters a target token passes through, embeddings and heads left out (for V2's models: V2 2.3).

    Of a mixture of experts only the share that is active counts.
    """
    if not isinstance(model, Generator):
        return float(sum(p.numel() for p in model.parameters()))
    config = model.config
    share = config.active_experts / config.experts if config.experts else 1.0
    return sum(p.numel() * (share if p.ndim == 3 else 1.0) for p in model.blocks.parameters())


def rate(step: int, steps: int, config: FitConfig) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then constant, or a half cosine down to ``final_share``."""
    warmup = min(config.warmup_steps, max(steps // 5, 1))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(steps - warmup, 1)
    return config.learning_rate * (config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * done)))


class Average:
    """Exponential running mean of a model's parameters: ``mean += (1 - decay) (weights - mean)``.

    Early steps use a smaller decay, ``(1 + step) / (10 + step)``, so that the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.mean = (
            {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        )

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after ``step`` (from 0)."""
        if self.mean:
            weights = dict(model.named_parameters())
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.mean.values()), [weights[name] for name in self.mean], 1 - decay)

    @torch.no_grad()
    def load(self, mean: dict[str, Tensor]) -> None:
        """Continues from a checkpoint's mean."""
        for name, value in self.mean.items():
            value.copy_(mean[name])

    @contextmanager
    def lent(self, model: nn.Module) -> Iterator[None]:
        """The mean in place of the weights for a while; they come back unchanged."""
        weights = dict(model.named_parameters())
        kept = {name: weights[name].detach().clone() for name in self.mean}
        self.replace(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    weights[name].copy_(value)

    @torch.no_grad()
    def replace(self, model: nn.Module) -> None:
        """Puts the mean in place of the weights."""
        weights = dict(model.named_parameters())
        for name, value in self.mean.items():
            weights[name].copy_(value)
