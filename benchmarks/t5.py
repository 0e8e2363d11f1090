"""The rival of ``benchmarks.decoding``: a T5 of transformers, constrained to the catalogue as others constrain theirs.

Two constraints: ``prefix_allowed_tokens_fn`` (a Python callback for every beam, looking the prefix up in a dict), and
a vectorised LogitsProcessor over the very CSR trie that our own search uses. Everything else is ``generate``: the
encoder runs once, then its output is repeated for every beam. Random weights: only speed is compared.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration

from models.decoding.trie import Trie

START = 0
"""Decoder start and padding; level l's code c is token 1 + l * codes + c."""


def build(codes: int, levels: int, d_model: int, heads: int, layers: int) -> Any:
    """``layers`` in all, half of them in the encoder; the FFN is gated and four times as wide, as ours is."""
    config = T5Config(
        vocab_size=1 + codes * levels,
        d_model=d_model,
        d_kv=d_model // heads,
        d_ff=4 * d_model,
        num_heads=heads,
        num_layers=layers // 2,
        num_decoder_layers=layers - layers // 2,
        feed_forward_proj="gated-silu",
        pad_token_id=START,
        eos_token_id=None,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).eval()


def parameters(model: Any) -> int:
    """Without embeddings and head."""
    return sum(p.numel() for stack in (model.encoder, model.decoder) for p in stack.block.parameters())


def prefix_callback(sids: np.ndarray, codes: int) -> Callable[[int, Tensor], list[int]]:
    """Allowed next tokens by prefix, from a dict built once."""
    allowed: dict[tuple[int, ...], set[int]] = defaultdict(set)
    tokens = sids + 1 + np.arange(sids.shape[1]) * codes
    for row in tokens.tolist():
        for length, token in enumerate(row):
            allowed[tuple(row[:length])].add(token)
    lists = {prefix: sorted(following) for prefix, following in allowed.items()}
    return lambda _, sentence: lists.get(tuple(sentence[1:].tolist()), [START])


class TrieProcessor(LogitsProcessor):  # type: ignore[misc]
    """Masks every token but the children of each beam's prefix, for all beams at once."""

    def __init__(self, trie: Trie, codes: int) -> None:
        self.trie, self.codes = trie, codes

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [beams, vocabulary] with -inf at illegal tokens."""
        level = input_ids.shape[1] - 1
        code = input_ids[:, 1:] - 1 - torch.arange(level) * self.codes
        node = self.trie.locate(code)
        _, following, exists = self.trie.children(level, node.clamp(min=0))
        row, column = (exists & (node >= 0)[:, None]).nonzero(as_tuple=True)
        token = following[row, column] + 1 + level * self.codes
        masked = torch.full_like(scores, -torch.inf)
        masked[row, token] = scores[row, token]
        return masked


def recommend(model: Any, history: Tensor, trie: Trie, width: int, constraint: object) -> Tensor:
    """[B, width, L] codes; ``constraint`` is a TrieProcessor or what ``prefix_callback`` made."""
    codes = (model.config.vocab_size - 1) // trie.levels
    vectorised = isinstance(constraint, TrieProcessor)
    tokens: Tensor = model.generate(
        input_ids=history,
        attention_mask=torch.ones_like(history),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=trie.levels,
        decoder_start_token_id=START,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        prefix_allowed_tokens_fn=None if vectorised else constraint,
        logits_processor=LogitsProcessorList([constraint]) if vectorised else None,
    )
    return (tokens[:, 1:] - 1 - torch.arange(trie.levels) * codes).view(len(history), width, trie.levels)
