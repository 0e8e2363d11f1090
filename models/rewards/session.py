"""The session reward model ``R(u, S)``: how good a whole list is for a user (OneRec, arXiv 2502.18965, 2.4).

Target attention per item, self-attention between the items of the session, their mean, and a tower for each of session
watch time (swt), view (vtr), follow (wtr) and like (ltr). Ours: swt is the session's seconds over a cap, vtr the share
of long views, wtr and ltr whether there was any; ``R`` is their weighted mean. The paper sums over five items; logged
sessions differ in length, so it is the mean and the length here. Left out: the paper's weights (unpublished).

Shapes: B requests, T items of each session, X objectives.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from features.schema import FLAGS
from models.pathways import ContextTensors
from models.rewards.base import BaseConfig, TargetAttention
from models.rewards.inputs import TargetItems
from models.rewards.pscore import OBJECTIVES

SESSION_OBJECTIVES = ("swt", "vtr", "wtr", "ltr")
SECONDS_AN_ITEM = 60.0
"""Cap of the watch time, for every item of the session."""
WEIGHTS: Mapping[str, float] = {"swt": 1.0, "vtr": 1.0, "wtr": 0.5, "ltr": 0.5}


class SessionReward(nn.Module):
    """Towers over a session."""

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        self.config = config
        self.base = TargetAttention(config)
        d = config.d_model
        self.item = nn.Linear(self.base.width, d)
        self.between = nn.MultiheadAttention(d, config.heads, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.towers = nn.Sequential(nn.Linear(d + 1, d), nn.LeakyReLU())
        self.logits = nn.Linear(d, len(SESSION_OBJECTIVES))

    def forward(self, context: ContextTensors, items: TargetItems, mask_BT: Tensor) -> Tensor:
        """Logits [B, X]; a session without items gets those of nothing."""
        x = self.item(self.base(context, items))
        empty = ~mask_BT.any(1, keepdim=True)
        normed = self.norm(x)
        # A row without a key is not a number: an empty session attends to its padding, which the mean leaves out.
        mixed, _ = self.between(normed, normed, normed, key_padding_mask=~(mask_BT | empty), need_weights=False)
        count = mask_BT.sum(1, keepdim=True)
        together = ((x + mixed) * mask_BT[..., None]).sum(1) / count.clamp(min=1)
        logits: Tensor = self.logits(self.towers(torch.cat([together, count.float().log1p()], -1)))
        return logits

    @torch.no_grad()
    def start(self, rates: Tensor, labels: Tensor) -> None:
        """``rates`` as ``PScore.start``; towers begin at the average session label [X], since some are rare."""
        self.base.set_rates(rates)
        self.logits.bias.copy_(labels.clamp(1e-3, 1 - 1e-3).logit())

    @torch.no_grad()
    def judge(self, context: ContextTensors, items: TargetItems, mask_BT: Tensor) -> Tensor:
        """``R`` in (0, 1), [B] fp32."""
        return session_reward(self(context, items, mask_BT).float().sigmoid())


def session_reward(objectives_BX: Tensor, weights: Mapping[str, float] = WEIGHTS) -> Tensor:
    """[B], the weighted mean of the objectives."""
    factor = torch.tensor([weights[name] for name in SESSION_OBJECTIVES], device=objectives_BX.device)
    return (objectives_BX * factor).sum(-1) / factor.sum()


def session_labels(labels_BTX: Tensor, seconds_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """float32 [B, X] of logged sessions; ``labels_BTX`` are those of P-Score, ``seconds_BT`` play times."""
    real = mask_BT[..., None] * labels_BTX
    count = mask_BT.sum(1).clamp(min=1)
    watched = (seconds_BT * mask_BT).sum(1) / (SECONDS_AN_ITEM * count)

    def of(flag: str) -> Tensor:
        assert flag in FLAGS
        return real[..., OBJECTIVES.index(flag)]

    columns = [watched.clamp(max=1), of("long_view").sum(1) / count, of("follow").amax(1), of("like").amax(1)]
    return torch.stack(columns, -1).float()


def session_loss(logits_BX: Tensor, labels_BX: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over objectives of the mean BCE over sessions that have items."""
    some = mask_BT.any(1).float()
    losses = F.binary_cross_entropy_with_logits(logits_BX.float(), labels_BX, reduction="none").sum(-1)
    return (losses * some).sum() / some.sum().clamp(min=1)
