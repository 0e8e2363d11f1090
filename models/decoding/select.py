"""Generate, then select: the beams put in order by the decoder and the item head together.

V1 (arXiv 2506.13695, 3.3 and 4.1) lets a reward model choose among what the decoder generated; here it is the item
head of the same model, which reads the same context once (ours; docs/log.md). Log-probabilities stay the decoder's.
"""

from dataclasses import fields

import torch
from torch import Tensor

from models.decoding.beam import Beams
from models.generator import ContextKV, Generator


@torch.no_grad()
def item_log_probs(model: Generator, kv: ContextKV, beams: Beams) -> Tensor:
    """fp32 [B, W]: the item head's log-probability of each beam's SID, -inf on padding and on SIDs it does not know.

    Raises ValueError for a model without an item head.
    """
    memory = model.features.memory
    log_probs = model.item_logits(kv).log_softmax(-1)
    assert memory is not None
    row = memory.rows(beams.sids.clamp(min=0))[-1]
    known = beams.valid & (row > 0)
    return log_probs.gather(1, (row - 1).clamp(min=0)).masked_fill(~known, -torch.inf)


def reordered(beams: Beams, scores_BW: Tensor) -> Beams:
    """The beams by falling ``scores_BW``, padding last."""
    order = scores_BW.masked_fill(~beams.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)

    def moved(part: Tensor) -> Tensor:
        index = order.unsqueeze(-1).expand(part.shape) if part.ndim == 3 else order
        return part.gather(1, index)

    return Beams(**{field.name: moved(getattr(beams, field.name)) for field in fields(beams)})


def select(model: Generator, kv: ContextKV, beams: Beams, weight: float) -> Beams:
    """The beams by ``log p(SID) + weight log p_item``; weight 0 changes nothing."""
    if not weight:
        return beams
    return reordered(beams, beams.scores + weight * item_log_probs(model, kv, beams))
