"""Trie-constrained beam search (OneRec-V2, arXiv 2508.20900, serving): batched, one context KV per request.

All beams of a request are queries against its one KV; the trie node travels with the beam. Only children that exist
are scored: the model's log-softmax over all codes is gathered at them, so no mask over the vocabulary is built. Filters
act inside the search: a prefix below which nothing may be served is never entered. The only Python loop is over SID
levels; shapes depend on sizes alone, and the device is waited for once, at the end, to refuse NaN. Left out: length
penalties (all SIDs are equally long), diverse beams.

Shapes: B requests, W beams, N candidates, L levels, C codes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoding.filter import LeafFilter
from models.decoding.trie import Children, Trie
from models.generator import ContextKV, Generator


class NotFinite(ValueError):
    """The model's logits contain NaN or infinity."""


@dataclass(frozen=True)
class Beams:
    """W generated SIDs per request; entries with ``valid`` False are padding (sids and leaf -1, log_probs -inf)."""

    sids: Tensor
    """[B, W, L] long."""
    log_probs: Tensor
    """[B, W, L] fp32: the model's log-softmax over all codes at temperature 1, before masks."""
    leaf: Tensor
    """[B, W] long: leaf of the trie (while searching, the node), -1 when illegal (unconstrained) or padding."""
    valid: Tensor
    """[B, W] bool."""

    @property
    def scores(self) -> Tensor:
        """[B, W] total log-probability."""
        return self.log_probs.sum(-1)

    @classmethod
    def start(cls, requests: int, width: int, device: torch.device) -> "Beams":
        """``width`` beams a request at the root, without tokens."""
        root = torch.zeros(requests, width, dtype=torch.long, device=device)
        empty = torch.zeros(requests, width, 0, device=device)
        return cls(empty.long(), empty, root, root == 0)

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

    def checked(self) -> "Beams":
        """These beams; raises NotFinite when a log-probability is NaN (NaN outranks every number, so it gets here)."""
        broken = (self.log_probs.isnan().any(-1) & self.valid).any(-1)
        if broken.any():
            rows = broken.nonzero().flatten().tolist()
            raise NotFinite(
                f"the model's logits are NaN or infinite for {len(rows)} of {len(broken)} requests (first: row "
                f"{rows[0]}); check its weights and the context's numbers, and go back to the last good bundle"
            )
        return self


@torch.no_grad()
def beam_search(
    model: Generator, kv: ContextKV, trie: Trie | None, width: int, allowed: LeafFilter | None = None
) -> Beams:
    """The ``width`` best SIDs of the trie per request, best first; ``allowed`` None allows every leaf.

    ``trie`` None searches all codes (the share of legal beams is a health metric): every leaf is -1 then. Raises
    ValueError for a width below 1, a filter for other requests or a trie of another model, and NotFinite.
    """
    if width < 1:
        raise ValueError(f"width is {width}; it must be at least 1")
    check_fit(model, trie, allowed, len(kv))
    return search_unchecked(model, kv, trie, width, allowed).checked()


def search_unchecked(
    model: Generator, kv: ContextKV, trie: Trie | None, width: int, allowed: LeafFilter | None
) -> Beams:
    """``beam_search`` without its checks: nothing here waits for the device."""
    levels = model.config.levels
    logits, state = model.step(kv, None, None)
    beams = Beams.start(len(kv), 1, logits.device)
    total = beams.log_probs.sum(-1)
    for level in range(levels):
        if level:
            logits, state = model.step(kv, beams.sids[..., -1], state)
        children = continuations(trie, level, beams, allowed) if trie else _every_code(beams, logits)
        log_prob = gather_codes(logits.log_softmax(-1), children)
        children, log_prob, total = likeliest(children, log_prob, total, width)
        beams = beams.extend(children.beam, children.code, log_prob, children.node, children.exists)
        if 0 < level < levels - 1:  # before, all beams share one state; afterwards nobody needs it
            state = state.select(children.beam)
    return beams.padded(width)


def continuations(
    trie: Trie, level: int, beams: Beams, allowed: LeafFilter | None, *, repeated: bool = False
) -> Children:
    """The children of all beams below which something may be served: all that the constraint costs."""
    children = trie.expand(level, beams.leaf, beams.valid, repeated=repeated)
    return children if allowed is None else children.only(allowed.below(level, children.node) > 0)


def gather_codes(log_probs_BWC: Tensor, children: Children) -> Tensor:
    """[B, N] log-probability of each child's code, given its beam."""
    return log_probs_BWC.flatten(1).gather(1, children.beam * log_probs_BWC.shape[-1] + children.code)


def likeliest(children: Children, log_prob_BN: Tensor, total_BW: Tensor, width: int) -> tuple[Children, Tensor, Tensor]:
    """The ``width`` best children of beams whose tokens so far have ``total_BW``, best first.

    With their own log-probabilities and their new totals, both [B, min(width, N)].
    """
    scores = (total_BW.gather(1, children.beam) + log_prob_BN).masked_fill_(~children.exists, -torch.inf)
    total, pick = scores.topk(min(width, scores.shape[1]))
    node, code, beam, exists, log_prob = (
        part.gather(1, pick) for part in (children.node, children.code, children.beam, children.exists, log_prob_BN)
    )
    return Children(node, code, beam, exists), log_prob, total


def _every_code(beams: Beams, logits: Tensor) -> Children:
    """All codes after all beams."""
    b, w, codes = logits.shape
    slot = torch.arange(w * codes, device=logits.device).expand(b, -1)
    beam = slot // codes
    return Children(torch.full_like(slot, -1), slot % codes, beam, beams.valid.gather(1, beam))


def check_fit(model: Generator, trie: Trie | None, allowed: LeafFilter | None, requests: int) -> None:
    """Raises ValueError for a trie of another model, or a filter without a trie or for other requests."""
    if trie is not None:
        trie.fits(model.config.codes, model.config.levels)
    elif allowed is not None:
        raise ValueError("a filter needs a trie; pass the trie or drop the filter")
    if allowed is not None and len(allowed) != requests:
        raise ValueError(f"the filter is for {len(allowed)} requests; there are {requests}")
