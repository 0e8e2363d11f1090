"""What the policy objectives share: log-probabilities of what was generated, group advantages, and the guards' metrics.

OneRec V1 (arXiv 2506.13695) 2.4.1 normalises a reward inside the group of samples of one user; a group whose rewards
are equal teaches nothing and is skipped. The bounds below are ours (unpublished). Left out: a value network, a KL
penalty (the NTP loss trained alongside is the anchor).

Shapes: B requests, T samples or exposures of each, L SID levels, C codes.
"""

import torch
from torch import Tensor

LEAST_SPREAD = 1e-6
"""A group whose rewards spread less than this (relative to their size, if above 1) counts as equal."""
MOST_ADVANTAGE = 5.0
MOST_LOG_RATIO = 10.0


def check_shapes(logits: Tensor, targets: Tensor, advantages: Tensor, old: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError naming the shapes when the inputs of an objective do not belong together."""
    expected = logits.shape[:3]
    masks = expected[:2] if mask is None else mask.shape
    if targets.shape != expected or old.shape != expected or advantages.shape != expected[:2] or masks != expected[:2]:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets and old_log_probs {tuple(expected)}, advantages and mask "
            f"{tuple(expected[:2])}; given {tuple(targets.shape)}, {tuple(old.shape)}, {tuple(advantages.shape)}, "
            f"{tuple(masks)}"
        )


def token_log_probs(logits_BTLC: Tensor, targets_BTL: Tensor) -> Tensor:
    """fp32 log-softmax [B, T, L] of the codes taken; negative codes (padding) score garbage."""
    codes = targets_BTL.clamp(min=0).unsqueeze(-1)
    found: Tensor = logits_BTLC.float().log_softmax(-1).gather(-1, codes).squeeze(-1)
    return found


def group_advantages(rewards_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """``A_i = (r_i - mean r) / std r`` over each row's unmasked finite rewards, float32 in [-5, 5].

    0 where masked or not finite, and for the whole group when its rewards are equal or fewer than two.
    """
    keep = rewards_BT.isfinite() if mask_BT is None else mask_BT.bool() & rewards_BT.isfinite()
    rewards = torch.where(keep, rewards_BT.double(), 0.0)
    count = keep.sum(-1, keepdim=True).clamp(min=1)
    mean = rewards.sum(-1, keepdim=True) / count
    centred = torch.where(keep, rewards - mean, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    flat = std <= LEAST_SPREAD * mean.abs().clamp(min=1)
    advantages = torch.where(flat, 0.0, centred / std.clamp(min=torch.finfo(std.dtype).tiny))
    return advantages.clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE).float()


def log_ratios(log_pi_BT: Tensor, old_BT: Tensor) -> Tensor:
    """``log pi - log pi_old`` in [-10, 10]; 0 with pi's gradient where ``old_BT`` is NaN: then pi_old = sg(pi)."""
    known = torch.where(old_BT.isnan(), log_pi_BT.detach(), old_BT).clamp(max=0.0)
    return (log_pi_BT - known).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)


@torch.no_grad()
def guards(
    logits_BTLC: Tensor,
    targets_BTL: Tensor,
    advantages_BT: Tensor,
    old_log_probs_BTL: Tensor,
    mask_BT: Tensor | None = None,
) -> dict[str, float]:
    """Health of a policy step: how far the policy moved, how certain it is, how much the advantages say.

    ``policy/kl`` estimates KL(pi_old || pi) in nats a token (``r - 1 - log r``, never negative) where old
    log-probabilities are known; ``policy/entropy`` is the mean over tokens in nats; ``policy/advantage_std`` is taken
    over unmasked samples, ``policy/active_share`` of which have an advantage other than 0. All are 0 when nothing is
    unmasked.
    """
    check_shapes(logits_BTLC, targets_BTL, advantages_BT, old_log_probs_BTL, mask_BT)
    keep = advantages_BT.isfinite() if mask_BT is None else mask_BT.bool() & advantages_BT.isfinite()
    log_p = logits_BTLC.float().log_softmax(-1)
    log_pi = token_log_probs(logits_BTLC, targets_BTL)
    known = keep.unsqueeze(-1) & old_log_probs_BTL.isfinite()
    gap = torch.where(known, log_ratios(log_pi, old_log_probs_BTL), 0.0)
    advantages = advantages_BT.float()[keep]
    values = {
        "policy/kl": (gap.exp() - 1 - gap).sum() / known.sum().clamp(min=1),
        "policy/log_ratio_max": gap.abs().max() if gap.numel() else gap.sum(),
        "policy/entropy": -(log_p.exp() * log_p).sum(-1).mean(-1)[keep].sum() / keep.sum().clamp(min=1),
        "policy/advantage_std": advantages.std(correction=0) if len(advantages) else gap.sum(),
        "policy/active_share": (advantages != 0).sum() / keep.sum().clamp(min=1),
    }
    return {name: float(value) for name, value in values.items()}


@torch.no_grad()
def divergence(logits_BTLC: Tensor, before_BTLC: Tensor, mask_BT: Tensor) -> float:
    """Mean ``KL(pi || pi_pretrained)`` in nats a token, exactly, over the prefixes of unmasked targets."""
    log_p, log_q = logits_BTLC.float().log_softmax(-1), before_BTLC.float().log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    return float((each * mask_BT).sum() / mask_BT.sum().clamp(min=1))


@torch.no_grad()
def entropy(logits_BTLC: Tensor, mask_BT: Tensor) -> float:
    """Mean entropy in nats of the first code's distribution over requests: falls when the policy collapses."""
    log_p = logits_BTLC[:, 0, 0].float().log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1)[mask_BT.any(1)].mean())
