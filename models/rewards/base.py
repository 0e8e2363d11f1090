"""The base that both reward models share: target attention over the user's history (SIM; OneRec V1, 2506.13695, 2.4.1).

A candidate item asks the user's behaviours of all pathways what they say about it; beside the answer the towers get the
item, the user, and the hard searches (models.rewards.inputs). Sizes are ours (unpublished). Left out: an index over
very long histories, the lifelong pathway is compressed before.

Shapes: B requests, T items of each, n real behaviours, d model width, D head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from features.schema import FLAGS
from models.behaviours import BehaviourEmbedding, ContextConfig, Packing, Widths, dense, require_positive
from models.nn.attention import CrossAttention
from models.nn.blocks import RMSNorm
from models.pathways import ContextTensors
from models.rewards.inputs import NUMBERS, PLAYED, RECORD, SEARCHES, TargetItems, searches

SEARCH_WIDTH = len(SEARCHES) * (1 + len(FLAGS) + len(PLAYED))


@dataclass(frozen=True, kw_only=True)
class BaseConfig(ContextConfig):
    """Sizes of a reward model."""

    embed: int = 16
    d_model: int = 64
    heads: int = 4
    tower: int = 32
    """Hidden width of one objective's tower."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "d_model", "heads", "tower")
        if self.d_model % self.heads or not 0 <= self.dropout < 1:
            raise ValueError(f"d_model {self.d_model} must divide by heads {self.heads}, dropout be in [0, 1)")


class TargetAttention(nn.Module):
    """(context, items) to what the towers read, [B, T, width]."""

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        self.config = c = config
        self.features = BehaviourEmbedding(c, Widths.alike(c))
        side = Widths.alike(c)
        self.behaviour = nn.Linear(self.features.width, c.d_model)
        self.user = dense(self.features.static_width, c.d_model)
        self.item = dense(c.levels * c.embed + side.author + side.tag + len(NUMBERS), c.d_model)
        self.norm, self.query_norm = RMSNorm(c.d_model), RMSNorm(c.d_model)
        self.keys = nn.Linear(c.d_model, 2 * c.d_model, bias=False)
        self.attention = CrossAttention(c.d_model, c.heads, recency_bias=True)
        self.searched = nn.Linear(SEARCH_WIDTH, c.d_model)
        self.shared = nn.Sequential(
            nn.Linear(5 * c.d_model + len(NUMBERS) + SEARCH_WIDTH, 2 * c.d_model),
            nn.LeakyReLU(),
            nn.Dropout(c.dropout),
        )
        self.register_buffer("rates", torch.full((len(RECORD),), 0.1))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)

    @torch.no_grad()
    def set_rates(self, rates: Tensor) -> None:
        """Average labels [1 + F] of the training log, as in ``RECORD``: what histories are compared with."""
        self.get_buffer("rates").copy_(rates)

    @property
    def width(self) -> int:
        """Numbers per item in the output: the shared layer's, the user's and the item's."""
        return 4 * self.config.d_model

    def forward(self, context: ContextTensors, items: TargetItems) -> Tensor:
        """[B, T, width]."""
        users = self.user(self.features.static(context))
        item = self.item(self._item(items))
        attended = self._attend(context, users, item)
        found = searches(context, items, self.get_buffer("rates")[1:])  # the flags
        spread = users[:, None].expand_as(item)
        everything = [attended, attended * item, item, spread, self.searched(found), items.numbers, found]
        return torch.cat([self.shared(torch.cat(everything, -1)), spread, item], -1)

    def _item(self, items: TargetItems) -> Tensor:
        codes = [table(items.sids[..., level]) for level, table in enumerate(self.features.code)]
        return torch.cat([*codes, self.features.author(items.author), self.features.tag(items.tag), items.numbers], -1)

    def _attend(self, context: ContextTensors, users: Tensor, item: Tensor) -> Tensor:
        """[B, T, d]; the user's attributes are one more token, so that a cold user is attended to as well."""
        packing = Packing.of(context.mask, lead=1)
        request, slot = packing.request, packing.slot
        tokens = torch.cat([users, self.behaviour(self.features(context, request, slot))])
        rows = torch.cat([packing.lead_rows, packing.row])
        packed = packing.spread(self.keys(self.norm(tokens)), rows)  # [B, S, 2 d]
        heads = packed.unflatten(2, (2, self.config.heads, -1)).transpose(1, 3)  # [B, H, 2, S, D]
        keys, values = heads.unbind(2)
        age = packing.spread(context.numeric[request, slot, 0])
        found: Tensor = self.attention(self.query_norm(item), keys, values, packing.bias, age)
        return found
