"""The session model: a V1 encoder and a decoder that writes a list of m = 5 items (OneRec, arXiv 2502.18965, 2.3).

The decoder reads ``BOS s1 s2 s3`` once per item, in order, so that every item sees those already chosen; causal
self-attention runs over the whole session. The target is the list of items of one high-quality session. A learned
embedding per place in the list is added to its tokens (ours).

Shapes: B requests, T sessions of a request, m items of a session, L levels, C codes, P = m (L + 1) positions, of which
the last code is never an input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.behaviours import require_positive
from models.generator import ContextKV, DecoderState
from models.onerec_v1 import OneRecV1, V1Config


@dataclass(frozen=True, kw_only=True)
class SessionConfig(V1Config):
    """V1's sizes and the number of ``items`` in a session."""

    items: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "items")


class OneRecSession(OneRecV1):
    """Generates ``config.items`` items of ``config.levels`` codes, one after the other."""

    config: SessionConfig

    def __init__(self, config: SessionConfig) -> None:
        super().__init__(config)
        self.place = nn.Embedding(config.items, config.d_model)
        nn.init.normal_(self.place.weight, std=0.5)

    @property
    def items(self) -> int:
        """Items of a session."""
        return self.config.items

    def _token_tables(self) -> int:
        """The last code of an item is an input of the next item."""
        return self.config.levels

    def score(self, kv: ContextKV, targets_BmL: Tensor) -> Tensor:
        """Teacher-forced fp32 logits [B, m, L, C] of one session per request; raises ValueError for another m."""
        return self.score_sessions(kv, targets_BmL.unsqueeze(1))[:, 0]

    def score_sessions(self, kv: ContextKV, targets_BTmL: Tensor) -> Tensor:
        """Teacher-forced fp32 logits [B, T, m, L, C] of T sessions per request; negative codes mark padding."""
        b, t, m, levels = targets_BTmL.shape
        if m > self.config.items:
            raise ValueError(f"sessions of {m} items given; this model writes at most {self.config.items}")
        codes = targets_BTmL.clamp(min=0)
        parts = [self.bos.expand(b, t, m, -1)]
        parts += [table(codes[..., level]) for level, table in enumerate(self.token)]
        h = torch.stack(parts, 3) + self.place.weight[:m, None]  # [B, T, m, L + 1, d]
        real = (targets_BTmL[..., :1] >= 0).expand(-1, -1, -1, levels + 1)
        h, _ = self._advance(kv, h.flatten(2, 3)[:, :, :-1], None, real.flatten(2)[:, :, :-1])
        h = nn.functional.pad(h, (0, 0, 0, 1)).unflatten(2, (m, levels + 1))
        return torch.stack([self._logits(h[:, :, :, level], level) for level in range(levels)], 3)

    def step(self, kv: ContextKV, code_BT: Tensor | None, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """One code further, through all items: fp32 logits [B, T, C] of the next level, and the state.

        Called m * L times: with None, then with each code chosen. An item's last code is read together with the next
        item's BOS, and the logits are of that item's first level. Raises ValueError after the last item.
        """
        if code_BT is None or state is None:
            level, h = 0, self._bos_of(0).expand(len(kv), 1, 1, -1)
        else:
            item, read = divmod(len(state), self.config.levels + 1)
            level = read % self.config.levels
            code = self.token[read - 1](code_BT) + self.place.weight[item]
            tokens = [code]
            if level == 0:
                tokens.append(self._bos_of(item + 1).expand_as(code))
            h = torch.stack(tokens, 2)
        h, state = self._advance(kv, h, state)
        return self._logits(h[:, :, -1], level), state

    def _bos_of(self, item: int) -> Tensor:
        if item >= self.config.items:
            raise ValueError(f"the session has its {self.config.items} items; there is no next code")
        return self.bos + self.place.weight[item]
