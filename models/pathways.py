"""From a request's behaviour (item rows, ages, labels) to the tensors the model reads.

OneRec V1 2.2.1 (pathways and their seven fields) and V2 2.2 (all of them concatenated as context items). Items enter as
semantic IDs, so a new item needs no row in any table. Continuous fields are log-scaled and roughly centred by the
constants below (ours). Left out: compressing the lifelong pathway, which V1's model does itself (models.nn.qformer).

Shapes: B requests, S = short + positive + lifelong behaviours, L SID levels, N numeric features, F static fields.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from features.histories.context import Context, Pathway
from features.schema import FLAGS

PATHWAYS = ("short", "positive", "lifelong")
NUMERIC = ("age", "duration", "play_ratio", "play", "rank", "finished")
"""Numeric features in column order; ``age`` (column 0) also drives the recency bias."""
MAX_PLAY_RATIO = 3.0
AGE_CENTRE, AGE_SCALE = 9.0, 4.0
NOW = -AGE_CENTRE / AGE_SCALE
"""The normalised age of what happens at this moment."""


class ItemFeatures(Protocol):
    """What the context needs to know of the items (models.tokenizer.vocabulary.Catalogue has it)."""

    @property
    def sids(self) -> np.ndarray:
        """int [items, L], codes from 0."""

    @property
    def author(self) -> np.ndarray:
        """int [items], buckets of authors, 0 = unknown."""

    @property
    def tag(self) -> np.ndarray:
        """int [items], buckets of tags, 0 = unknown."""


@dataclass(frozen=True, kw_only=True)
class ContextTensors:
    """The context of B requests; every SID, author, tag, label and number of a masked-out slot is 0."""

    static: Tensor
    """[B, F] long: hashed attributes, 0 = absent."""
    sids: Tensor
    """[B, S, L] long: code + 1, 0 = padding."""
    author: Tensor
    """[B, S] long."""
    tag: Tensor
    """[B, S] long."""
    numeric: Tensor
    """[B, S, N] float32, columns as in ``NUMERIC``."""
    labels: Tensor
    """[B, S, 9] float32, columns as in ``features.schema.FLAGS``."""
    kind: Tensor
    """[S] long: index into ``PATHWAYS``."""
    mask: Tensor
    """[B, S] bool: True where there is a behaviour."""

    def __len__(self) -> int:
        return len(self.static)

    def to(self, device: torch.device | str) -> "ContextTensors":
        """The same tensors on ``device``."""
        return ContextTensors(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def to_tensors(context: Context, catalogue: ItemFeatures, device: torch.device | str = "cpu") -> ContextTensors:
    """Gather the items' SIDs and features for every behaviour of ``context``.

    Raises ValueError when a behaviour's row lies outside the catalogue (context and catalogue of different bundles).
    """
    parts = [getattr(context, name) for name in PATHWAYS]
    item = np.concatenate([part.item for part in parts], 1)
    if item.size and item.max() >= len(catalogue.sids):
        raise ValueError(
            f"context refers to item row {item.max()} but the catalogue has {len(catalogue.sids)} items; "
            "build the context with this catalogue's index"
        )
    mask = item >= 0
    rows = np.where(mask, item, 0)
    hidden = ~mask
    sids = catalogue.sids.astype(np.int64)[rows] + 1
    author, tag = catalogue.author.astype(np.int64)[rows], catalogue.tag.astype(np.int64)[rows]
    bits = np.concatenate([part.labels for part in parts], 1)
    labels = (bits[..., None] >> np.arange(len(FLAGS)) & 1).astype(np.float32)
    numeric = np.concatenate([_numeric(part) for part in parts], 1)
    for array in (sids, author, tag, labels, numeric):
        array[hidden] = 0
    kind = np.repeat(np.arange(len(PATHWAYS)), [part.item.shape[1] for part in parts])
    arrays = {"sids": sids, "author": author, "tag": tag, "numeric": numeric, "labels": labels, "mask": mask}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    static = torch.from_numpy(np.ascontiguousarray(context.static, dtype=np.int64))
    return ContextTensors(static=static, kind=torch.from_numpy(kind), **tensors).to(device)


def _numeric(part: Pathway) -> np.ndarray:
    """[B, l, N] float32."""
    age = (np.log1p(np.maximum(part.age_s, 0)) - AGE_CENTRE) / AGE_SCALE
    duration = np.maximum(part.duration_ms, 0) / 1000
    play = np.maximum(part.play_ms, 0) / 1000
    ratio = np.minimum(play / np.maximum(duration, 1e-3), MAX_PLAY_RATIO)
    length = part.item.shape[1]
    # Newest last: rank 0 is the newest behaviour of its pathway, whatever the padding.
    rank = np.broadcast_to((np.log1p(np.arange(length)[::-1]) - 2.0) / 1.5, part.item.shape)
    columns = [age, (np.log1p(duration) - 3.0) / 1.5, ratio, (np.log1p(play) - 2.0) / 1.5, rank, ratio >= 1]
    return np.stack(columns, -1).astype(np.float32)
