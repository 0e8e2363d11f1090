"""Beam search over whole sessions: m items one after the other, each from the trie (OneRec, arXiv 2502.18965, 2.3).

A beam is a list in the making: its probability is that of all its tokens so far, so a weak first item may stay for what
can follow. The trie is entered anew for every item; a leaf already in a beam's list, and any prefix with nothing else
below it, is closed to that beam alone. When fewer items may be served than a session has, all lists of that request
end together and the rest is padding. Log-probabilities are as everywhere (``models.decoding.beam``). Left out: diverse
beams, sampling of sessions.

Shapes: B requests, W beams, N candidates, m items, L levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoding.beam import Beams, check_fit, continuations, gather_codes, likeliest
from models.decoding.filter import LeafFilter
from models.decoding.trie import Children, Trie
from models.generator import ContextKV
from models.onerec_session import OneRecSession


@dataclass(frozen=True)
class Sessions:
    """W lists of m items per request, best first; padding is -1 (log_probs 0, so that totals stand)."""

    sids: Tensor
    """[B, W, m, L] long."""
    log_probs: Tensor
    """[B, W, m, L] fp32: each token's log-softmax given all before it, over all codes, before masks."""
    leaf: Tensor
    """[B, W, m] long."""
    valid: Tensor
    """[B, W, m] bool: items that are there; a beam without a first item is no beam."""

    @property
    def scores(self) -> Tensor:
        """[B, W] total log-probability, -inf for what is no beam."""
        return self.log_probs.sum((-1, -2)).masked_fill(~self.valid[..., 0], -torch.inf)

    def best(self) -> Beams:
        """The likeliest list of each request, its items in order as beams [B, m]."""
        return Beams(self.sids[:, 0], self.log_probs[:, 0], self.leaf[:, 0], self.valid[:, 0])


@torch.no_grad()
def session_search(
    model: OneRecSession, kv: ContextKV, trie: Trie, width: int, allowed: LeafFilter | None = None
) -> Sessions:
    """The ``width`` best sessions of ``model.items`` different SIDs per request.

    Raises ValueError for a width below 1, a filter for other requests or a trie of another model, and NotFinite.
    """
    if width < 1:
        raise ValueError(f"width is {width}; it must be at least 1")
    check_fit(model, trie, allowed, len(kv))
    logits, state = model.step(kv, None, None)
    lists = _Lists.start(len(kv), logits.device)
    for step in range(model.items * trie.levels):
        if step:
            logits, state = model.step(kv, lists.beams.sids[..., -1].clamp(min=0), state)
        level = step % trie.levels
        if level == 0:
            lists = lists.next_item()
        children = lists.open_children(trie, level, allowed)
        lists, parent = lists.grown(children, gather_codes(logits.log_softmax(-1), children), width)
        state = state.select(parent)
    return lists.sessions(trie, model.items, width)


@dataclass(frozen=True)
class _Lists:
    """The beams and what their lists hold; ``beams`` has the tokens of all items in one row."""

    beams: Beams
    chosen: Tensor
    """[B, W, k] long: leaves of the items that are complete, -1 where the list had ended."""
    total: Tensor
    """[B, W] log-probability."""
    alive: Tensor
    """[B] bool: the request's lists go on."""

    @classmethod
    def start(cls, requests: int, device: torch.device) -> "_Lists":
        beams = Beams.start(requests, 1, device)
        alive = torch.ones(requests, dtype=torch.bool, device=device)
        return cls(beams, beams.leaf.new_empty(requests, 1, 0), beams.scores, alive)

    def next_item(self) -> "_Lists":
        """Back at the root; the leaf just reached is the list's newest item."""
        beams = self.beams
        if not beams.sids.shape[-1]:
            return self
        chosen = torch.cat([self.chosen, beams.leaf.masked_fill(~self.alive[:, None], -1).unsqueeze(-1)], -1)
        root = Beams(beams.sids, beams.log_probs, torch.zeros_like(beams.leaf), beams.valid)
        return _Lists(root, chosen, self.total, self.alive)

    def open_children(self, trie: Trie, level: int, allowed: LeafFilter | None) -> Children:
        """Where each list can go: something may be served there that the list does not hold yet."""
        children = continuations(trie, level, self.beams, allowed, repeated=True)
        room = trie.room[level][children.node] if allowed is None else allowed.below(level, children.node)
        taken = torch.zeros_like(room)
        for item in self.chosen.unbind(-1):
            node = item.clamp(min=0)
            for above in range(trie.levels - 1, level, -1):
                node = trie.parents[above][node]
            node = node.masked_fill(item < 0, -1)
            taken += (node.gather(1, children.beam) == children.node).to(taken.dtype)
        return children.only(room > taken)

    def grown(self, children: Children, log_prob: Tensor, width: int) -> tuple["_Lists", Tensor]:
        """The best continuations and the beams they come from; lists that cannot go on stay as they are."""
        alive = self.alive & children.exists.any(1)
        best, log_prob, total = likeliest(children, log_prob, self.total, width)
        own = torch.arange(total.shape[1], device=total.device)
        there = own < self.total.shape[1]
        own = own.clamp(max=self.total.shape[1] - 1).expand_as(total)
        going = alive[:, None]
        beam = torch.where(going, best.beam, own)
        code = best.code.masked_fill(~going, -1)
        valid = torch.where(going, best.exists, self.beams.valid.gather(1, own) & there)
        total = torch.where(going, total, self.total.gather(1, own).masked_fill(~there, -torch.inf))
        beams = self.beams.extend(beam, code, log_prob.masked_fill(~going, 0.0), best.node, valid)
        held = self.chosen.gather(1, beam.unsqueeze(-1).expand(-1, -1, self.chosen.shape[-1]))
        return _Lists(beams, held, total, alive), beam

    def sessions(self, trie: Trie, items: int, width: int) -> Sessions:
        """The finished lists, ``width`` a request."""
        done = self.next_item()
        beams = done.beams.padded(width).checked()
        shape = (*beams.valid.shape, items, trie.levels)
        leaf = torch.nn.functional.pad(done.chosen, (0, 0, 0, width - done.chosen.shape[1]), value=-1)
        valid = (leaf >= 0) & beams.valid.unsqueeze(-1)
        return Sessions(
            beams.sids.view(shape).masked_fill(~valid.unsqueeze(-1), -1),
            beams.log_probs.view(shape).masked_fill(~valid.unsqueeze(-1), 0.0),
            leaf.masked_fill(~valid, -1),
            valid,
        )
