"""P-Score: what a user will do with an item, by objective, and one fused score (OneRec V1, arXiv 2506.13695, 2.4.1).

Each objective has a tower with its own binary cross-entropy on a shared base (models.rewards.base). The towers' hidden
states, the user and the item go into a final MLP whose one output ``p`` is trained on *every* label,
``L = sum_x w_x BCE(y_x, p)``. Its optimum is the weighted mean of the expected labels, so the weights say what ``p``
ranks by; how they are chosen is in models.rewards.fusion. Ours: the final MLP sends no gradient into the towers, so
that other weights need no other towers; ``watch`` is the play time's quantile among exposures of like duration, so that
long videos do not win by being long; a dislike counts as its absence. Left out: the paper's unpublished features.

Shapes: B requests, T items of each, X objectives, H hidden numbers of a tower.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pathways import ContextTensors
from models.rewards.base import BaseConfig, TargetAttention
from models.rewards.inputs import RECORD, TargetItems

OBJECTIVES = RECORD
"""``watch`` (a quantile in [0, 1]) and the flags, in the order of every [.., X]."""
NEGATIVE = ("dislike",)
"""Objectives whose absence is good."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a reward model thinks of items; both are probabilities in (0, 1)."""

    p: Tensor
    """[B, T] fp32, the P-Score."""
    objectives: Tensor
    """[B, T, X] fp32, calibrated; columns as in ``OBJECTIVES``."""


class PScore(nn.Module):
    """Towers over the base, and the fused score."""

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        self.config = config
        self.base = TargetAttention(config)
        x, h, d = len(OBJECTIVES), config.tower, config.d_model
        self.towers = nn.Linear(2 * d, x * h)
        self.logits = nn.Parameter(torch.empty(x, h))
        self.bias = nn.Parameter(torch.zeros(x))
        nn.init.normal_(self.logits, std=h**-0.5)
        self.fuse = fusion_head(self.fused_width, d)
        self.register_buffer("scale", torch.ones(x))
        self.register_buffer("shift", torch.zeros(x))

    @property
    def fused_width(self) -> int:
        """Numbers per item that the final MLP reads: hidden states of all towers, user, item."""
        return len(OBJECTIVES) * self.config.tower + 2 * self.config.d_model

    def forward(self, context: ContextTensors, items: TargetItems) -> tuple[Tensor, Tensor]:
        """Logits [B, T, X] of the towers, before calibration, and [B, T] of ``p``."""
        logits, features = self.features(context, items)
        return logits, self.fuse(features.detach()).squeeze(-1)

    def features(self, context: ContextTensors, items: TargetItems) -> tuple[Tensor, Tensor]:
        """Logits [B, T, X], and what the final MLP reads [B, T, fused_width]."""
        shared, rest = self.base(context, items).split(2 * self.config.d_model, -1)
        hidden = F.leaky_relu(self.towers(shared)).unflatten(-1, self.logits.shape)  # [B, T, X, H]
        logits = (hidden * self.logits).sum(-1) + self.bias
        return logits, torch.cat([hidden.flatten(-2), rest], -1)

    @torch.no_grad()
    def judge(self, context: ContextTensors, items: TargetItems) -> Judgement:
        """Calibrated probabilities and the P-Score."""
        logits, fused = self(context, items)
        return Judgement(p=fused.float().sigmoid(), objectives=self.calibrated(logits.float()).sigmoid())

    def calibrated(self, logits: Tensor) -> Tensor:
        """Platt's ``scale * logit + shift`` of each objective."""
        return logits * self.get_buffer("scale") + self.get_buffer("shift")

    @torch.no_grad()
    def start(self, rates: Tensor) -> None:
        """Towers begin at the average label [X] of the training log, so that rare ones are not learned from 0.5."""
        self.base.set_rates(rates)
        self.bias.copy_(rates.clamp(1e-4, 1 - 1e-4).logit())

    @torch.no_grad()
    def calibrate(self, scale: Tensor, shift: Tensor) -> None:
        """Sets Platt's constants [X]."""
        self.get_buffer("scale").copy_(scale)
        self.get_buffer("shift").copy_(shift)


def fusion_head(width: int, hidden: int) -> nn.Sequential:
    """The final MLP: ``width`` numbers to one logit."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, 1))


def tower_loss(logits_BTX: Tensor, labels_BTX: Tensor, mask_BT: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Sum over objectives of the mean BCE over unmasked items, and each of them; soft labels are allowed."""
    losses = F.binary_cross_entropy_with_logits(logits_BTX.float(), labels_BTX, reduction="none")
    each = (losses * mask_BT[..., None]).sum((0, 1)) / mask_BT.sum().clamp(min=1)
    return each.sum(), dict(zip(OBJECTIVES, each.detach().tolist(), strict=True))


def fused_loss(fused: Tensor, labels: Tensor, weights_X: Tensor, mask: Tensor) -> Tensor:
    """``sum_x w_x BCE(y_x, p)``, mean over unmasked items; ``labels`` [.., X] are turned to good = 1 first.

    ``sum_x w_x BCE(y_x, p) = (sum_x w_x) BCE(y, p)`` with ``y`` the weighted mean label.
    """
    total = weights_X.sum()
    wished = (wanted(labels) * weights_X).sum(-1) / total.clamp(min=1e-9)
    losses = F.binary_cross_entropy_with_logits(fused.float(), wished, reduction="none")
    return total * (losses * mask).sum() / mask.sum().clamp(min=1)


def wanted(labels: Tensor) -> Tensor:
    """Labels [.., X] with 1 = good: those of ``NEGATIVE`` objectives turned around."""
    flip = torch.tensor([name in NEGATIVE for name in OBJECTIVES], device=labels.device)
    return torch.where(flip, 1 - labels, labels)
