"""Ancestral sampling of semantic IDs, inside the trie (serving, roll-outs) or free (the legality health metric).

Spec of decoding: temperature and top-k shape the draw only; the log-probabilities returned are the model's own at
temperature 1 over all codes, as everywhere. Samples are independent, so a SID may come twice. Left out: top-p,
sampling without replacement.
"""

import torch
from torch import Tensor

from models.decoding.beam import Beams
from models.decoding.trie import Trie
from models.onerec_v2 import ContextKV, DecoderState, OneRecV2


@torch.no_grad()
def sample(
    model: OneRecV2,
    kv: ContextKV,
    trie: Trie | None,
    num_samples: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    allowed_leaves: Tensor | None = None,
) -> Beams:
    """``num_samples`` independent SIDs per request, in drawing order; ``trie`` None leaves them unconstrained.

    Unconstrained samples are all valid and have leaf -1 (``Trie.locate`` finds the legal ones). Raises ValueError for
    a temperature or count that is not positive, and for ``allowed_leaves`` without a trie.
    """
    if temperature <= 0 or num_samples < 1 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"temperature {temperature}, num_samples {num_samples}, top_k {top_k}: each must be positive "
            "(for the most probable items use beam search)"
        )
    if trie is None and allowed_leaves is not None:
        raise ValueError("allowed_leaves needs a trie; pass the trie or drop the filter")
    b = len(kv)
    sums = trie.allowed_sums(allowed_leaves, b) if trie else None
    node = torch.zeros(b, num_samples, dtype=torch.long, device=kv.mask.device)
    empty = kv.bias.new_zeros(b, num_samples, 0)
    beams = Beams(empty.long(), empty, node, node == 0)
    code: Tensor | None = None
    state: DecoderState | None = None
    stay = torch.arange(num_samples, device=node.device).expand(b, -1)
    for level in range(model.config.levels):
        logits, state = model.step(kv, code, state)
        log_probs = logits.log_softmax(-1).expand(-1, num_samples, -1)
        child, codes, reachable = _candidates(trie, level, node, log_probs)
        if trie and sums is not None:
            reachable = reachable & trie.servable(level, child, sums)
        pick = _draw(log_probs.gather(-1, codes), reachable, temperature, top_k, generator)
        code, node = (part.gather(-1, pick.unsqueeze(-1)).squeeze(-1) for part in (codes, child))
        valid = beams.valid & reachable.gather(-1, pick.unsqueeze(-1)).squeeze(-1)
        drawn = log_probs.gather(-1, code.unsqueeze(-1)).squeeze(-1)
        beams = beams.extend(stay, code, drawn, node, valid)
    if trie is None:
        beams = Beams(beams.sids, beams.log_probs, torch.full_like(node, -1), beams.valid)
    return beams.padded(num_samples)


def _candidates(trie: Trie | None, level: int, node: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Next nodes, their codes and which exist, each [B, N, candidates]."""
    if trie is not None:
        return trie.children(level, node)
    codes = torch.arange(log_probs.shape[-1], device=node.device).expand(log_probs.shape)
    return codes, codes, torch.ones_like(codes, dtype=torch.bool)


def _draw(
    log_probs: Tensor, reachable: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Index [B, N] of one candidate each, by the Gumbel-max trick (no host synchronisation, unlike multinomial)."""
    scores = (log_probs / temperature).masked_fill(~reachable, -torch.inf)
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, -1).values[..., -1:], -torch.inf)
    uniform = torch.rand(scores.shape, generator=generator, device=scores.device).clamp(1e-20, 1 - 1e-7)
    return (scores - (-uniform.log()).log()).argmax(-1)
