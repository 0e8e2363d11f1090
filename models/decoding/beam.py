"""Trie-constrained beam search (OneRec-V2 serving; spec of decoding): batched, one context KV per request.

All beams of a request are queries against its one KV; the trie node travels with the beam, so a step is a gather, never
a prefix look-up. Filters act inside the search: a prefix below which nothing may be served is never entered, so a
filtered leaf cannot displace a servable one. The only Python loop is over SID levels and shapes depend on sizes alone,
so nothing synchronises with the device. Left out: length penalties (all SIDs are equally long), diverse beams.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoding.trie import Trie
from models.onerec_v2 import ContextKV, DecoderState, OneRecV2


@dataclass(frozen=True)
class Beams:
    """W generated SIDs per request; entries with ``valid`` False are padding (sids and leaf -1, log_probs -inf)."""

    sids: Tensor
    """[B, W, L] long."""
    log_probs: Tensor
    """[B, W, L] fp32: the model's log-softmax over all codes at temperature 1, before masks."""
    leaf: Tensor
    """[B, W] long: leaf of the trie, -1 when illegal (unconstrained sampling) or padding."""
    valid: Tensor
    """[B, W] bool."""

    @property
    def scores(self) -> Tensor:
        """[B, W] total log-probability."""
        return self.log_probs.sum(-1)

    def extend(self, parent: Tensor, code: Tensor, log_prob: Tensor, node: Tensor, valid: Tensor) -> "Beams":
        """These beams reordered by ``parent`` [B, W], with one more token each."""
        index = parent.unsqueeze(-1).expand(-1, -1, self.sids.shape[-1])
        sids = torch.cat([self.sids.gather(1, index), code.unsqueeze(-1)], -1)
        log_probs = torch.cat([self.log_probs.gather(1, index), log_prob.unsqueeze(-1)], -1)
        return Beams(sids, log_probs, node, valid)

    def padded(self, width: int) -> "Beams":
        """Exactly ``width`` >= W entries, with padding values wherever ``valid`` is False."""
        missing = width - self.leaf.shape[1]
        valid = F.pad(self.valid, (0, missing))
        hidden, wide = ~valid, (0, 0, 0, missing)
        return Beams(
            F.pad(self.sids, wide).masked_fill(hidden.unsqueeze(-1), -1),
            F.pad(self.log_probs, wide).masked_fill(hidden.unsqueeze(-1), -torch.inf),
            F.pad(self.leaf, (0, missing)).masked_fill(hidden, -1),
            valid,
        )


@torch.no_grad()
def beam_search(model: OneRecV2, kv: ContextKV, trie: Trie, width: int, allowed_leaves: Tensor | None = None) -> Beams:
    """The ``width`` best SIDs of the trie per request, best first.

    ``allowed_leaves`` is bool [B, leaves]; None allows all. Raises ValueError for a wrong shape or width.
    """
    b = len(kv)
    if width < 1:
        raise ValueError(f"width is {width}; it must be at least 1")
    sums = trie.allowed_sums(allowed_leaves, b)
    node = torch.zeros(b, 1, dtype=torch.long, device=kv.mask.device)
    total = torch.zeros(b, 1, device=node.device)
    beams = Beams(node.new_zeros(b, 1, 0), total.new_zeros(b, 1, 0), node, node == 0)
    code: Tensor | None = None
    state: DecoderState | None = None
    for level in range(model.config.levels):
        logits, state = model.step(kv, code, state)
        log_probs = logits.log_softmax(-1)
        child, codes, reachable = trie.children(level, node)
        reachable = reachable & beams.valid.unsqueeze(-1)
        if sums is not None:
            reachable = reachable & trie.servable(level, child, sums)
        step_log_prob = log_probs.gather(-1, codes)
        scores = (total.unsqueeze(-1) + step_log_prob).masked_fill(~reachable, -torch.inf).flatten(1)
        total, pick = scores.topk(min(width, scores.shape[1]))
        parent = pick // child.shape[-1]
        state = state.select(parent)
        node, code = child.flatten(1).gather(1, pick), codes.flatten(1).gather(1, pick)
        valid = reachable.flatten(1).gather(1, pick)
        beams = beams.extend(parent, code, step_log_prob.flatten(1).gather(1, pick), node, valid)
    return beams.padded(width)
