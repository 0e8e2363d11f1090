"""The caption loss: an item's words, predicted from its compressed tokens (V1, arXiv 2506.13695, 2.1.1).

It keeps content from being washed out by the collaborative signal. The technical report decodes with LLaMA3; here a
decoder of one layer, trained along and thrown away afterwards: it is not needed to give an item its SID. The caption is
the title, or the tags of an item without one, in words of the catalogue's own vocabulary.
"""

import re
from collections import Counter

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WORDS = 2000  # ours: the commonest words; the rest are "unknown"
_LENGTH = 12  # ours: words of a caption
_PADDING, _START, _END, _UNKNOWN = range(4)


def captions(items: pa.Table) -> tuple[np.ndarray, int]:
    """Word numbers int64 [n, _LENGTH + 1], ending in 2 and padded by 0, and how many different ones there are."""
    texts = [
        title or " ".join(tags or ())
        for title, tags in zip(items.column("title").to_pylist(), items.column("tags").to_pylist(), strict=True)
    ]
    words = [re.findall(r"\w+", text.lower())[:_LENGTH] for text in texts]
    counts = Counter(word for caption in words for word in caption)
    common = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    numbers = {word: number for number, word in enumerate(common[:_WORDS], start=_UNKNOWN + 1)}
    encoded = np.full((len(words), _LENGTH + 1), _PADDING, np.int64)
    for row, caption in enumerate(words):
        if caption:
            encoded[row, : len(caption) + 1] = [*(numbers.get(word, _UNKNOWN) for word in caption), _END]
    return encoded, _UNKNOWN + 1 + len(numbers)


class CaptionDecoder(nn.Module):
    """One causal layer over the caption, reading the QFormer's latent queries by cross-attention."""

    def __init__(self, words: int, width: int, heads: int) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width)
        self.place = nn.Parameter(0.02 * torch.randn(_LENGTH + 1, width))
        self.layer = nn.TransformerDecoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        nn.init.normal_(self.word.weight, std=width**-0.5)

    def forward(self, latent: Tensor, captions_NW: Tensor) -> Tensor:
        """Mean cross-entropy of the words of ``captions_NW`` (0 = padding) given latent queries [N, Q, width]."""
        start = torch.full_like(captions_NW[:, :1], _START)
        seen = self.word(torch.cat([start, captions_NW[:, :-1]], 1)) + self.place
        causal = nn.Transformer.generate_square_subsequent_mask(captions_NW.shape[1], device=latent.device)
        hidden = self.layer(seen, latent, tgt_mask=causal, tgt_is_causal=True)
        wanted = captions_NW != _PADDING
        if not wanted.any():
            return latent.sum() * 0
        logits = hidden[wanted] @ self.word.weight.T
        return F.cross_entropy(logits.float(), captions_NW[wanted])
