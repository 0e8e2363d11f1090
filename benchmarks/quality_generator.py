"""OneRec on public sequences: the platform's tokenizer, models, training loop and beam search, set for small data.

One recipe for all data sets. What it adds to V2 as published, each switchable and reported alone: a memory of SID
prefixes, so that a leaf is an item's own vector (models.nn.memory), one self-attention layer over the context, BOS that
starts from the newest behaviour, and an item head that selects among the generated (models.decoding.select). Training
takes every earlier position as a target with a context of its own. Left out: several targets a context.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.leave_one_out import expand
from benchmarks.protocol import Split
from models.architectures import model_of
from models.decoding.beam import beam_search
from models.decoding.select import select
from models.decoding.trie import Trie
from models.generator import Generator, GeneratorConfig
from models.onerec_v2 import V2Config
from models.pathways import ContextTensors, to_tensors
from models.tokenizer.tokenizer import TokenizerConfig
from models.tokenizer.vocabulary import Catalogue
from models.training.loop import Loss, Plan, fit
from models.training.pretrain import PretrainConfig, next_item_loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run depends on beside its data and seed."""

    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(levels=3, codes=256, dim=128))
    model: GeneratorConfig = field(
        default_factory=lambda: V2Config(
            d_model=128,
            heads=4,
            kv_groups=4,
            layers=2,
            embed=128,
            dropout=0.3,
            head="tied",
            memory=True,
            item_head=True,
            context_layers=1,
            start_from_newest=True,
            static_buckets=2,
        )
    )
    training: PretrainConfig = field(
        default_factory=lambda: PretrainConfig(
            epochs=10, batch_requests=512, learning_rate=2e-3, warmup_steps=100, final_share=0.02
        )
    )
    limit: int = 50
    """Latest interactions that a context holds."""
    dates: bool = True
    """Whether the model knows how long ago things were."""
    beam: int = 50
    select_weight: float = 1.0
    """Of the item head's log-probability beside the decoder's."""


@dataclass(frozen=True, kw_only=True)
class _Targets:
    """A batch as ``next_item_loss`` reads it: one target [B, 1, L] for each context."""

    context: ContextTensors
    targets: Tensor


class Examples:
    """Batches by number: every epoch all positions, in random batches of like length."""

    def __init__(self, split: Split, catalogue: Catalogue, recipe: Recipe) -> None:
        self._histories, self._catalogue = split.histories, catalogue
        self._dates = recipe.dates
        self._batch, self._seed = recipe.training.batch_requests, recipe.training.seed
        self._sids = torch.from_numpy(catalogue.sids.astype(np.int64))
        self._positions = split.training
        self._lengths = split.histories.lengths(split.training)
        self._epoch, self._batches = -1, []  # type: tuple[int, list[np.ndarray]]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._positions) // self._batch)

    def __call__(self, number: int) -> _Targets:
        """Batch ``number``, counted over epochs."""
        epoch, place = divmod(number, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            order = np.lexsort((rng.random(len(self._positions)), self._lengths))
            cut = [order[first : first + self._batch] for first in range(0, len(order), self._batch)]
            self._epoch, self._batches = epoch, [cut[k] for k in rng.permutation(len(cut))]
        rows = self._batches[place]
        positions = self._positions[rows]
        histories = replace(self._histories, limit=int(self._lengths[rows].max()), dates=self._dates)
        context = to_tensors(histories.contexts(positions), self._catalogue)
        return _Targets(context=context, targets=self._sids[histories.item[positions]][:, None])


def train(
    split: Split,
    catalogue: Catalogue,
    codebooks: np.ndarray,
    recipe: Recipe,
    output: Path,
    judge: Callable[[Generator], float],
) -> tuple[Generator, dict[str, Any]]:
    """Trains until ``judge`` (validation, more is better; asked every epoch) is worse than before, and goes back to the
    epoch before that. Resumes from ``output``.
    """
    torch.manual_seed(recipe.training.seed)
    config = replace(recipe.model, codes=catalogue.codes, levels=catalogue.levels)
    model = model_of(config)
    model.remember(torch.from_numpy(catalogue.sids.astype(np.int64)))
    model.start_from_codebooks(torch.from_numpy(codebooks))
    examples = Examples(split, catalogue, recipe)
    best = -1.0

    def guard() -> str | None:
        nonlocal best
        value = judge(model)
        model.train()
        if value < best:
            return f"validation fell from {best:.4f} to {value:.4f}"
        best = value
        return None

    def objective(wrapped: nn.Module, example: _Targets) -> Loss:
        weights = torch.ones(example.targets.shape[:2])
        value, parts = next_item_loss(wrapped, model, example, weights, recipe.training.item_weight)
        return Loss(value, parts, len(weights), example.targets.numel())

    plan = Plan(
        steps=len(examples) * recipe.training.epochs,
        example=examples,
        objective=objective,
        training={"recipe": {name: str(value) for name, value in asdict(recipe).items()}},
        guard=guard,
    )
    return model, fit(model, plan, replace(recipe.training, checkpoint_every=len(examples)), output)


@torch.no_grad()
def rank(
    model: Generator, split: Split, positions: np.ndarray, catalogue: Catalogue, recipe: Recipe, count: int = 50
) -> np.ndarray:
    """Item rows int32 [len(positions), count], best first, -1 where the beams ran out; the user's history is masked."""
    trie, histories = Trie.from_sids(catalogue.sids), replace(split.histories, dates=recipe.dates)
    model.eval()
    result = np.full((len(positions), count), -1, np.int32)
    for first in range(0, len(positions), 256):
        part = positions[first : first + 256]
        kv = model.encode(to_tensors(histories.contexts(part), catalogue))
        beams = beam_search(model, kv, trie, recipe.beam)
        if model.config.item_head:
            beams = select(model, kv, beams, recipe.select_weight)
        leaves = torch.where(beams.valid, beams.leaf, -1).numpy()
        for row, position in enumerate(part):
            items = expand(trie, leaves[row], catalogue.popularity)
            items = items[~np.isin(items, histories.seen(int(position)))][:count]
            result[first + row, : len(items)] = items
    return result
