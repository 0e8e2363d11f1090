"""Ancestral sampling of semantic IDs, inside the trie (serving, roll-outs) or free (the legality health metric).

OneRec Technical Report (arXiv 2506.13695), 2.4 (roll-outs). Temperature, top-k and top-p shape the draw only; the
log-probabilities returned are the model's own at temperature 1 over all codes, as everywhere. Samples are independent,
so a SID may come twice; all samples of a request draw their first code from one distribution. Left out: sampling
without replacement.

Shapes: B requests, T rows (1 until the samples differ, then N), N samples, K candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoding.beam import Beams, check_fit
from models.decoding.filter import LeafFilter
from models.decoding.trie import Trie
from models.generator import ContextKV, Generator


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How codes are drawn: ``top_k`` and ``top_p`` (nucleus) narrow the candidates of every step."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or (self.top_k is not None and self.top_k < 1) or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: temperature and top_k must "
                "be positive and top_p in (0, 1] (for the most probable items use beam search)"
            )


@torch.no_grad()
def sample(
    model: Generator,
    kv: ContextKV,
    trie: Trie | None,
    num_samples: int,
    *,
    draw: Draw | None = None,
    generator: torch.Generator | None = None,
    allowed: LeafFilter | None = None,
) -> Beams:
    """``num_samples`` independent SIDs per request, in drawing order; ``trie`` None leaves them unconstrained.

    Unconstrained samples are all valid and have leaf -1 (``Trie.locate`` finds the legal ones). Raises ValueError for
    a count below 1, a filter without a trie or for other requests, a trie of another model; NotFinite.
    """
    draw = draw or Draw()
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    check_fit(model, trie, allowed, len(kv))
    logits, state = model.step(kv, None, None)
    beams = Beams.start(len(kv), num_samples, logits.device)
    stay = torch.arange(num_samples, device=logits.device).expand(len(kv), -1)
    for level in range(model.config.levels):
        if level:
            logits, state = model.step(kv, beams.sids[..., -1], state)
        log_probs = logits.log_softmax(-1)
        rows = log_probs.shape[1]
        child, codes, open_ = _candidates(trie, level, beams.leaf[:, :rows], log_probs)
        if allowed is not None:
            open_ = open_ & (allowed.below(level, child.flatten(1)).view_as(child) > 0)
        pick = _drawn(log_probs.gather(-1, codes), open_, draw, num_samples, generator)
        code, node, chosen = (_at(part, pick) for part in (codes, child, open_))
        log_prob = _at(log_probs, code)
        valid = beams.valid & (chosen | log_prob.isnan())  # NaN stays visible for the check below
        beams = beams.extend(stay, code, log_prob, node, valid)
    if trie is None:
        beams = Beams(beams.sids, beams.log_probs, torch.full_like(beams.leaf, -1), beams.valid)
    return beams.padded(num_samples).checked()


def _candidates(trie: Trie | None, level: int, node: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Next nodes, their codes and which exist, each [B, T, K]."""
    if trie is not None:
        return trie.children(level, node)
    codes = torch.arange(log_probs.shape[-1], device=node.device).expand(log_probs.shape)
    return codes, codes, torch.ones_like(codes, dtype=torch.bool)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """[B, N] of ``values`` [B, T, K]: of row n (or the only one) the entry ``index`` [B, N]."""
    if values.shape[1] == 1:
        return values[:, 0].gather(1, index)
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _drawn(log_probs: Tensor, open_: Tensor, draw: Draw, count: int, generator: torch.Generator | None) -> Tensor:
    """Index [B, N] of one open candidate each by inverting the cumulative probabilities; any one where none is open."""
    scores = (log_probs / draw.temperature).masked_fill(~open_, -torch.inf)
    scores = _narrowed(scores, draw)
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)).exp()
    cumulative = weights.double().cumsum(-1)  # in fp32 the tail of 8192 codes would be rounded away
    shape = (len(scores), count) if scores.shape[1] == 1 else scores.shape[:2]
    uniform = torch.rand(shape, generator=generator, device=scores.device, dtype=torch.float64)
    wanted = (uniform * cumulative[..., -1].expand(shape)).view(*scores.shape[:2], -1)
    pick = torch.searchsorted(cumulative, wanted, right=True).view(shape)
    return pick.clamp(max=scores.shape[-1] - 1)


def _narrowed(scores: Tensor, draw: Draw) -> Tensor:
    """``scores`` with -inf outside the top-k and outside the smallest set of probability ``top_p``."""
    if draw.top_k is not None and draw.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(draw.top_k, -1).values[..., -1:], -torch.inf)
    if draw.top_p < 1:
        ordered = scores.sort(-1, descending=True).values
        mass = ordered.softmax(-1)
        kept = (mass.cumsum(-1) - mass < draw.top_p).sum(-1, keepdim=True).clamp(min=1)  # the first is always kept
        scores = scores.masked_fill(scores < ordered.gather(-1, kept - 1), -torch.inf)
    return scores
