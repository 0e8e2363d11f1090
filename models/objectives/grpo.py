"""Group relative policy optimisation on roll-outs: the baseline that ECPO mends (OneRec V1, arXiv 2506.13695, 2.4.1).

A sample is a whole SID: its probability is the product over the levels. Where a sample's old log-probability is missing
(NaN) pi_old is the current policy. Left out: a KL term, the NTP loss alongside is the anchor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.objectives.policy import check_shapes, log_ratios, token_log_probs


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How far a ratio may go: ``epsilon`` clips it, ``delta`` is ECPO's allowance for samples that did badly."""

    epsilon: float = 0.2
    delta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1 or self.delta < 0:
            raise ValueError(f"epsilon {self.epsilon} must be in (0, 1) and delta {self.delta} at least 0")


def grpo_loss(
    logits_BTLC: Tensor,
    targets_BTL: Tensor,
    advantages_BT: Tensor,
    old_log_probs_BTL: Tensor,
    mask_BT: Tensor | None = None,
    config: ClipConfig | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``-1/G sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)`` over the G unmasked samples, and its metrics.

    Inputs as ``gbpo_loss``. Raises ValueError when shapes disagree.
    """
    check_shapes(logits_BTLC, targets_BTL, advantages_BT, old_log_probs_BTL, mask_BT)
    log_pi = token_log_probs(logits_BTLC, targets_BTL).sum(-1)
    old = old_log_probs_BTL.float().sum(-1)  # one NaN makes the sample's probability unknown
    return clipped(log_pi, old, advantages_BT, mask_BT, config or ClipConfig(), "grpo")


def clipped(
    log_pi_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor | None, config: ClipConfig, name: str
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate's loss and metrics; NaN in ``old_BT`` means pi_old = sg(pi)."""
    keep = advantages_BT.isfinite() if mask_BT is None else mask_BT.bool() & advantages_BT.isfinite()
    advantage = torch.where(keep, advantages_BT.float(), 0.0)
    log_ratio = torch.where(keep, log_ratios(log_pi_BT, old_BT), 0.0)
    # rho_i = pi(o_i | u) / pi_old(o_i | u)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
    # min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    count = keep.sum().clamp(min=1)
    active = keep & (advantage != 0)
    ratio, bounded = ratio.detach(), bounded.detach()
    cut = active & (bounded * advantage < ratio * advantage)
    metrics = {
        f"{name}/clip_fraction": cut.sum() / active.sum().clamp(min=1),
        f"{name}/ratio_mean": torch.where(active, ratio, 0.0).sum() / active.sum().clamp(min=1),
        f"{name}/ratio_max": torch.where(active, ratio, 0.0).max() if ratio.numel() else count.new_zeros(()),
        f"{name}/logged_share": (active & ~old_BT.isnan()).sum() / active.sum().clamp(min=1),
    }
    return -gain.sum() / count, {key: float(value) for key, value in metrics.items()}
