"""Gradient-bounded policy optimisation on logged exposures (GBPO; OneRec-V2, arXiv 2508.20900, 3.1.2).

No clipping: the denominator of the ratio is raised instead, so that every sample keeps a gradient and none explodes.
Applied per token: at sequence level 1 - pi is about 1 and negatives would vanish. Left out: roll-out groups (ECPO).

Why it is bounded: d pi / d logit_k = pi (delta_k - p_k), at most pi (1 - pi) in size. With A >= 0 it is divided by at
least pi, with A < 0 by at least 1 - pi: one token moves a logit by at most |A| in either case.
"""

import torch
from torch import Tensor

from models.objectives.policy import check_shapes, token_log_probs

FLOOR = 1e-6
"""Smallest denominator: keeps the ratio of an almost certain, disliked token finite (its gradient already is)."""


def gbpo_loss(
    logits_BTLC: Tensor,
    targets_BTL: Tensor,
    advantages_BT: Tensor,
    old_log_probs_BTL: Tensor,
    mask_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``-1/G sum_i A_i pi_i / pi'_old,i`` over the G tokens of unmasked targets, and metrics of the step.

    ``old_log_probs`` are those logged at exposure, NaN where the exposure is not ours (then pi_old = sg(pi)). Masked
    targets may hold any code and advantage. Raises ValueError when shapes disagree.
    """
    check_shapes(logits_BTLC, targets_BTL, advantages_BT, old_log_probs_BTL, mask_BT)
    keep = torch.ones_like(advantages_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    keep = keep & advantages_BT.isfinite()
    log_pi = token_log_probs(logits_BTLC, targets_BTL)
    current = log_pi.detach()
    known = ~old_log_probs_BTL.isnan()
    old = torch.where(known, old_log_probs_BTL.float(), current).clamp(max=0.0)
    advantage = torch.where(keep, advantages_BT.float(), 0.0).unsqueeze(-1)
    # A >= 0: pi'_old = max(pi_old, sg(pi));  A < 0: pi'_old = max(pi_old, 1 - sg(pi)), 1 - pi = -expm1(log pi)
    log_rest = (-torch.expm1(current)).clamp(min=FLOOR).log()
    bound = torch.where(advantage >= 0, current, log_rest)
    log_ratio = log_pi - torch.maximum(old, bound)
    ratio = log_ratio.exp()
    tokens = keep.unsqueeze(-1).expand_as(ratio)
    count = tokens.sum().clamp(min=1)
    loss = -(advantage * torch.where(tokens, ratio, 0.0)).sum() / count
    return loss, _metrics(ratio.detach(), advantage, tokens, tokens & known & (bound > old), known)


def _metrics(ratio: Tensor, advantage: Tensor, tokens: Tensor, bounded: Tensor, known: Tensor) -> dict[str, float]:
    """Over active tokens (A != 0): the size of the ratios, how often the bound replaced the logged probability."""
    active = tokens & (advantage != 0)
    count = active.sum().clamp(min=1)
    kept = tokens[..., 0]
    values = {
        "gbpo/ratio_mean": torch.where(active, ratio, 0.0).sum() / count,
        "gbpo/ratio_max": torch.where(active, ratio, 0.0).max() if ratio.numel() else count.new_zeros(()),
        "gbpo/bounded_share": (bounded & active).sum() / count,
        "gbpo/logged_share": (known & active).sum() / count,
        "gbpo/positives": ((advantage[..., 0] > 0) & kept).sum(),
        "gbpo/negatives": ((advantage[..., 0] < 0) & kept).sum(),
    }
    return {name: float(value) for name, value in values.items()}
