"""Direct preference optimisation with self-hard negatives: iterative preference alignment (OneRec, 2502.18965, Alg. 2).

The model's own beam is scored by a reward model; the best answer of a request is the winner, the worst ones are the
losers. With several losers it is S-DPO (softmax DPO, arXiv 2406.09215), with one plain DPO. The reference is the model
at the start of the epoch. Left out: IPO, cDPO, rDPO, CPO and SimPO.

Shapes: B requests, G answers of each, N losers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.objectives.policy import LEAST_SPREAD


@dataclass(frozen=True)
class Preferences:
    """Which answers of each request win and lose."""

    winner: Tensor
    """long [B], index into the answers."""
    losers: Tensor
    """long [B, N], worst first."""
    usable: Tensor
    """bool [B, N]: the loser really is worse than the winner."""


def self_hard(rewards_BG: Tensor, mask_BG: Tensor | None = None, *, losers: int = 1) -> Preferences:
    """Best against worst of every request's own answers; masked and not finite rewards take no part.

    A pair of equal rewards is not usable, so a group of equal rewards teaches nothing. Raises ValueError when there are
    fewer than ``losers`` + 1 answers.
    """
    if not 0 < losers < rewards_BG.shape[1]:
        raise ValueError(f"{losers} losers need at least {losers + 1} answers a request; given {rewards_BG.shape[1]}")
    keep = rewards_BG.isfinite() if mask_BG is None else mask_BG.bool() & rewards_BG.isfinite()
    best, winner = torch.where(keep, rewards_BG, -torch.inf).max(1)
    worst, rows = torch.where(keep, rewards_BG, torch.inf).topk(losers, 1, largest=False)
    spread = LEAST_SPREAD * best.abs().clamp(min=1)
    usable = worst.isfinite() & best.isfinite()[:, None] & (best[:, None] - worst > spread[:, None])
    return Preferences(winner, rows, usable)


def dpo_loss(
    winner_B: Tensor,
    losers_BN: Tensor,
    reference_winner_B: Tensor,
    reference_losers_BN: Tensor,
    usable_BN: Tensor | None = None,
    *,
    beta: float = 0.1,
) -> tuple[Tensor, dict[str, float]]:
    """``-log sigmoid(-log sum_n exp(beta (d_n - d_w)))``, ``d = log pi - log pi_ref``: mean over usable requests.

    All inputs are log-probabilities of whole answers. Pairs whose reference is missing (NaN) or that are not
    ``usable_BN`` are left out; without any the loss is 0 with gradient zero. Raises ValueError when shapes disagree or
    ``beta`` is not positive.
    """
    b = len(winner_B)
    pairs = losers_BN.shape if usable_BN is None else usable_BN.shape
    if losers_BN.ndim != 2 or len(losers_BN) != b or reference_losers_BN.shape != losers_BN.shape:
        raise ValueError(f"{b} winners need losers [{b}, N] with references; given {tuple(losers_BN.shape)}")
    if reference_winner_B.shape != winner_B.shape or pairs != losers_BN.shape or beta <= 0:
        raise ValueError(f"references and usable must have the shapes of the answers and beta be positive, not {beta}")
    # d_w = log pi(w) / pi_ref(w),  d_n = log pi(n) / pi_ref(n)
    margin = beta * ((winner_B - reference_winner_B)[:, None] - (losers_BN - reference_losers_BN))
    keep = margin.isfinite() if usable_BN is None else margin.isfinite() & usable_BN.bool()
    # log sum_n exp(-margin_n) over usable losers; a request without any is left out
    some = keep.any(1)
    hardness = torch.where(keep, -torch.where(keep, margin, 0.0), -torch.inf)
    hardness = torch.where(some[:, None], hardness, 0.0).logsumexp(1)
    # -log sigmoid(-x) = softplus(x)
    losses = torch.where(some, F.softplus(hardness), 0.0)
    count = some.sum().clamp(min=1)
    shown = torch.where(keep, margin.detach(), 0.0)
    metrics = {
        "dpo/requests": some.sum(),
        "dpo/margin": shown.sum() / keep.sum().clamp(min=1),
        "dpo/accuracy": (keep & (shown > 0)).sum() / keep.sum().clamp(min=1),
    }
    return losses.sum() / count, {name: float(value) for name, value in metrics.items()}
