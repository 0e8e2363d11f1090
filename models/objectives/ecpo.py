"""Early-clipped GRPO (ECPO; OneRec V1, arXiv 2506.13695, 2.4.1).

GRPO leaves the ratio of a sample with a negative advantage unbounded above: when the sampler lags, one such sample can
carry an enormous gradient. ECPO raises its old probability first, so that no ratio exceeds 1 + eps + delta. Everything
else is GRPO, and both agree where nothing is raised. delta = 0.1 is the paper's, eps ours.
"""

import math

import torch
from torch import Tensor

from models.objectives.grpo import ClipConfig, clipped
from models.objectives.policy import check_shapes, token_log_probs


def ecpo_loss(
    logits_BTLC: Tensor,
    targets_BTL: Tensor,
    advantages_BT: Tensor,
    old_log_probs_BTL: Tensor,
    mask_BT: Tensor | None = None,
    config: ClipConfig | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``grpo_loss`` against ``pi'_old``; inputs, metrics (and ``ecpo/raised_share``) and errors are its."""
    check_shapes(logits_BTLC, targets_BTL, advantages_BT, old_log_probs_BTL, mask_BT)
    config = config or ClipConfig()
    log_pi = token_log_probs(logits_BTLC, targets_BTL).sum(-1)
    old = old_log_probs_BTL.float().sum(-1)
    # A < 0: pi'_old = max(sg(pi) / (1 + eps + delta), pi_old);  NaN stays NaN: an unknown pi_old is sg(pi)
    floor = log_pi.detach() - math.log(1 + config.epsilon + config.delta)
    raised = (advantages_BT < 0) & (old < floor)
    loss, metrics = clipped(log_pi, torch.where(raised, floor, old), advantages_BT, mask_BT, config, "ecpo")
    active = (advantages_BT != 0) & advantages_BT.isfinite()
    active = active if mask_BT is None else active & mask_BT.bool()
    share = (raised & active).sum() / active.sum().clamp(min=1)
    return loss, {**metrics, "ecpo/raised_share": float(share)}
