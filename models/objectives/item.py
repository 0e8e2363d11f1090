"""A softmax over whole items beside the one over codes: what the item head learns (ours; see ``models.nn.memory``)."""

import torch
from torch import Tensor


def item_loss(logits_Bn: Tensor, items_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Weighted mean over the targets of ``-log p(item | context)``; ``items`` (long, columns of ``logits``) of weight 0
    may be anything. Returns 0 when every weight is 0.
    """
    items = items_BT.clamp(min=0)
    loss = torch.logsumexp(logits_Bn.float(), 1, keepdim=True) - logits_Bn.float().gather(1, items)
    return (loss * weights_BT).sum() / weights_BT.sum().clamp(min=1e-8)
