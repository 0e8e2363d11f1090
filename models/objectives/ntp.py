"""Next-token prediction over the SID levels of the target item (OneRec-V2, arXiv 2508.20900, 2.3).

``L = -1/L sum_l log p(s_l | BOS, s_<l, context)``, only on the exposure itself. V1 (2506.13695, 2.3) sums over the
levels where V2 averages: ``levels`` says which (``Generator.level_loss``).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def ntp_loss(
    logits_BTLC: Tensor, targets_BTL: Tensor, weights_BT: Tensor, levels: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Weighted mean over targets of the levels' mean or summed cross-entropy; zero-weight targets may hold any code.

    Returns 0 (with gradient zero) when every weight is 0. Raises ValueError when shapes disagree.
    """
    if logits_BTLC.shape[:3] != targets_BTL.shape or weights_BT.shape != targets_BTL.shape[:2]:
        raise ValueError(
            f"logits {tuple(logits_BTLC.shape)}, targets {tuple(targets_BTL.shape)}, weights {tuple(weights_BT.shape)}:"
            " expected [B, T, L, C], [B, T, L] and [B, T]"
        )
    codes = targets_BTL.clamp(min=0)
    loss = F.cross_entropy(logits_BTLC.float().flatten(0, 2), codes.flatten(), reduction="none")
    per_level = loss.view(codes.shape)
    per_target = per_level.mean(-1) if levels == "mean" else per_level.sum(-1)
    weights = weights_BT.to(per_target.dtype)
    return (per_target * weights).sum() / weights.sum().clamp(min=1e-8)
