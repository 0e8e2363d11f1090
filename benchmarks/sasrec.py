"""SASRec with a full softmax (Kang and McAuley 2018; cross-entropy over all items as in Klenitskiy and Vasilev 2023).

The strongest simple baseline on public sequences: one vector per item, causal self-attention over the history, every
position a target, scored in fp32. ``dates`` adds the time from each behaviour to the next one's request, so that a
rival which knows the request's time is not better for that reason alone. Left out: negative sampling.

Shapes: B users, T positions, n items, d width.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.leave_one_out import Histories
from benchmarks.protocol import Split

GAP_DAYS = np.array([0, 1, 3, 7, 14, 30, 60, 120, 240, 480, 960])
DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True)
class SASRecConfig:
    """Sizes and training; what is tuned by validation is ``dropout`` and the number of epochs."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    limit: int = 50
    """Latest interactions that are read."""
    dates: bool = False
    epochs: int = 40
    every: int = 4
    """Epochs between two looks at the validation; training ends after ``patience`` looks without a better one."""
    least_steps: int = 200
    """Between two looks: where an epoch has few steps, ``every`` and ``epochs`` grow (``looks``), or the looks at a
    small set would end the training of a model that has hardly begun."""
    patience: int = 2
    learning_rate: float = 1e-3
    positions: int = 2560
    """Positions of a batch, padding included."""
    seed: int = 0


class SASRec(nn.Module):
    """Items [B, T] (row + 1, 0 = padding) and gaps [B, T] to hidden states [B, T, d]."""

    def __init__(self, items: int, config: SASRecConfig) -> None:
        super().__init__()
        c = config
        self.item = nn.Embedding(items + 1, c.width, padding_idx=0)
        self.place = nn.Embedding(c.limit, c.width)
        self.gap = nn.Embedding(len(GAP_DAYS) + 1, c.width) if c.dates else None
        for table in (self.item, self.place, *([self.gap] if self.gap is not None else [])):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                c.width, c.heads, c.width, c.dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(c.layers)
        )
        self.norm = nn.LayerNorm(c.width)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, items_BT: Tensor, gaps_BT: Tensor) -> Tensor:
        """[B, T, d]; position t sees 0 .. t."""
        t = items_BT.shape[1]
        x = self.item(items_BT) * self.item.embedding_dim**0.5 + self.place.weight[:t]
        if self.gap is not None:
            x = x + self.gap(gaps_BT)
        x = self.dropout(x)
        ahead = torch.full((t, t), -torch.inf, dtype=x.dtype).triu(1)
        for layer in self.layers:
            x = layer(x, src_mask=ahead, is_causal=True)
        hidden: Tensor = self.norm(x)
        return hidden

    def scores(self, hidden: Tensor) -> Tensor:
        """fp32 [.., n] of hidden states [.., d]."""
        return F.linear(hidden.float(), self.item.weight[1:].float())


@dataclass(frozen=True)
class _Batch:
    items: Tensor
    gaps: Tensor
    targets: Tensor
    """long [B, T], item rows, -1 is padding."""


class _Sequences:
    """Of some users the interactions ``first .. last`` (positions), each one's successor as its target."""

    def __init__(self, histories: Histories, first: np.ndarray, last: np.ndarray, limit: int) -> None:
        self._histories, self._last = histories, last
        self.lengths = np.minimum(last - first, limit)

    def batch(self, rows: np.ndarray) -> _Batch:
        """Inputs and targets of the sequences ``rows``."""
        width = int(self.lengths[rows].max())
        place = np.arange(width)
        there = place < self.lengths[rows][:, None]
        index = np.where(there, (self._last[rows] - self.lengths[rows])[:, None] + place, 0)
        after = np.where(there, index + 1, 0)
        h = self._histories
        days = np.maximum(h.time_ms[after] - h.time_ms[index], 0) // DAY_MS
        arrays = (
            np.where(there, h.item[index] + 1, 0),
            np.where(there, np.searchsorted(GAP_DAYS, days, side="right"), 0),
            np.where(there, h.item[after], -1),
        )
        return _Batch(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))

    def epoch(self, positions: int, rng: np.random.Generator) -> Iterator[_Batch]:
        """All users with a target in random batches of like length."""
        users = np.flatnonzero(self.lengths > 0)
        users = users[np.argsort(self.lengths[users] + 1.5 * rng.random(len(users)), kind="stable")]
        padded = np.maximum.accumulate(self.lengths[users])
        batches, first = [], 0
        while first < len(users):
            size = max(int(np.sum(padded[first:] * (np.arange(len(users) - first) + 1) <= positions)), 1)
            batches.append(users[first : first + size])
            first += size
        for number in rng.permutation(len(batches)):
            yield self.batch(batches[number])


def train(
    split: Split,
    items: int,
    config: SASRecConfig,
    judge: Callable[[SASRec], float],
    progress: Callable[[str], None],
) -> SASRec:
    """The model at the epoch that ``judge`` (validation, more is better) likes best."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    model = SASRec(items, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    first = split.histories.first(split.training)
    users, place = np.unique(first, return_index=True)
    last = split.training[np.append(place[1:], len(first)) - 1]
    sequences = _Sequences(split.histories, users, last, config.limit)
    best, waited, kept = -1.0, 0, model.state_dict()
    every, epochs = looks(config, sum(1 for _ in sequences.epoch(config.positions, np.random.default_rng(0))))
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in sequences.epoch(config.positions, rng):
            loss = _descend(model, optimizer, batch)
        if epoch % every and epoch != epochs:
            continue
        value = judge(model)
        progress(f"SASRec epoch {epoch}: loss {loss:.3f}, validation {value:.4f}")
        if value > best:
            best, waited, kept = value, 0, {name: each.clone() for name, each in model.state_dict().items()}
        else:
            waited += 1
        if waited >= config.patience:
            break
    model.load_state_dict(kept)
    return model


def looks(config: SASRecConfig, steps: int) -> tuple[int, int]:
    """Epochs between two looks at the validation, and in all, when an epoch has so many ``steps``."""
    every = max(config.every, math.ceil(config.least_steps / max(steps, 1)))
    return every, config.epochs * every // config.every


def _descend(model: SASRec, optimizer: torch.optim.Optimizer, batch: _Batch) -> float:
    there = batch.targets >= 0
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch.items, batch.gaps)[there]
        logits = F.linear(hidden, model.item.weight[1:])
    loss = F.cross_entropy(logits.float(), batch.targets[there])
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def rank(model: SASRec, split: Split, positions: np.ndarray, config: SASRecConfig, count: int = 50) -> np.ndarray:
    """Item rows int32 [len(positions), count], best first; the user's history is masked."""
    model.eval()
    histories = split.histories
    sequences = _Sequences(histories, histories.first(positions), positions, config.limit)
    result = np.full((len(positions), count), -1, np.int32)
    order = np.argsort(sequences.lengths, kind="stable")
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        batch = sequences.batch(rows)
        last = torch.from_numpy(sequences.lengths[rows] - 1)
        scores = model.scores(model(batch.items, batch.gaps)[torch.arange(len(rows)), last])
        for row, position in enumerate(positions[rows]):
            scores[row, torch.from_numpy(histories.seen(int(position)).astype(np.int64))] = -torch.inf
        found = scores.topk(min(count, scores.shape[1]))
        found.indices[found.values == -torch.inf] = -1
        result[rows, : found.indices.shape[1]] = found.indices.numpy()
    return result
