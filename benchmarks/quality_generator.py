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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.leave_one_out import expand
from benchmarks.protocol import Split
from models.architectures import model_of
from models.decoding.beam import beam_search
from models.decoding.select import select
from models.decoding.trie import Trie
from models.generator import Generator, GeneratorConfig
from models.onerec_session import SessionConfig
from models.onerec_v2 import V2Config
from models.pathways import ContextTensors, to_tensors
from models.tokenizer.tokenizer import TokenizerConfig
from models.tokenizer.vocabulary import Catalogue
from models.training.loop import Loss, Plan, fit
from models.training.pretrain import PretrainConfig, next_item_loss

PATIENCE = 3
"""Epochs without a better validation after which training ends."""


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
            epochs=10, batch_requests=512, learning_rate=2e-3, warmup_steps=100, final_share=0.02, ema_decay=0.99
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
    """A batch as ``next_item_loss`` reads it: one target [B, 1, L] for each context, or a list [B, m, L] of them."""

    context: ContextTensors
    targets: Tensor


class Examples:
    """Batches by number: every epoch all positions, in random batches of like length.

    A session model's target is the list of the next interactions, as far as they may be learned from.
    """

    def __init__(self, split: Split, catalogue: Catalogue, recipe: Recipe) -> None:
        self._histories, self._catalogue = split.histories, catalogue
        self._dates = recipe.dates
        self._batch, self._seed = recipe.training.batch_requests, recipe.training.seed
        self._sids = torch.from_numpy(catalogue.sids.astype(np.int64))
        self._items = recipe.model.items if isinstance(recipe.model, SessionConfig) else 1
        self._last = split.last()
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
        return _Targets(context=context, targets=self._targets(positions))

    def _targets(self, positions: np.ndarray) -> Tensor:
        """long [B, m, L], -1 where the user has no more to learn from."""
        place = positions[:, None] + np.arange(self._items)
        user = np.searchsorted(self._histories.starts, positions, side="right") - 1
        there = place <= self._last[user][:, None]
        sids = self._sids[self._histories.item[np.where(there, place, 0)]]
        return torch.where(torch.from_numpy(there)[..., None], sids, -1)


class _Best:
    """The weights that validation likes best, in a file beside the checkpoint, so that a resumed run knows them."""

    def __init__(self, model: Generator, path: Path) -> None:
        self._model, self._path = model, path
        self._value, self._missed = -1.0, 0
        if path.exists():
            with safe_open(path, "pt") as file:
                self._value = float(file.metadata()["value"])

    def offer(self, value: float) -> str | None:
        """Keeps the model's weights when ``value`` is the best so far; else says why to stop, once it is time to."""
        if value >= self._value:
            self._value, self._missed = value, 0
            weights = {name: each.contiguous() for name, each in self._model.state_dict().items()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, self._path, {"value": repr(value)})
            return None
        self._missed += 1
        if self._missed < PATIENCE:
            return None
        return f"no better validation than {self._value:.4f} for {PATIENCE} epochs"

    def restore(self) -> None:
        """Gives the model those weights."""
        self._model.load_state_dict(load_file(self._path))


def train(
    split: Split,
    catalogue: Catalogue,
    codebooks: np.ndarray,
    recipe: Recipe,
    output: Path,
    judge: Callable[[Generator], float],
) -> tuple[Generator, dict[str, Any]]:
    """The model at the epoch that ``judge`` (validation, more is better; asked every epoch) likes best.

    Ends after ``PATIENCE`` epochs without a better one: where few can be asked, one worse look is chance. Resumes from
    ``output``.
    """
    torch.manual_seed(recipe.training.seed)
    config = replace(recipe.model, codes=catalogue.codes, levels=catalogue.levels)
    model = model_of(config)
    model.remember(torch.from_numpy(catalogue.sids.astype(np.int64)))
    model.start_from_codebooks(torch.from_numpy(codebooks))
    examples = Examples(split, catalogue, recipe)
    best = _Best(model, output / "best.safetensors")

    def guard() -> str | None:
        value = judge(model)
        model.train()
        return best.offer(value)

    def objective(wrapped: nn.Module, example: _Targets) -> Loss:
        weights = (example.targets[..., 0] >= 0).float()
        value, parts = next_item_loss(wrapped, model, example, weights, recipe.training.item_weight)
        return Loss(value, parts, len(weights), int(weights.sum()) * catalogue.levels)

    plan = Plan(
        steps=len(examples) * recipe.training.epochs,
        example=examples,
        objective=objective,
        training={"recipe": {name: str(value) for name, value in asdict(recipe).items()}},
        guard=guard,
    )
    metrics = fit(model, plan, replace(recipe.training, checkpoint_every=len(examples)), output)
    best.restore()
    return model, metrics


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
