"""The models that ``benchmarks.quality`` compares: how each is fitted on a split, and how it ranks.

Popularity; ItemKNN; SASRec with a full softmax, with and without dates, its dropout chosen by validation; TIGER's way
(Rajput et al. 2023): plain residual K-means codes of content and an encoder-decoder; and OneRec. Left out: rivals'
own code bases.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from torch import nn

from benchmarks import quality_generator, sasrec
from benchmarks.leave_one_out import Histories, accuracy, popularity_ranking
from benchmarks.protocol import Split, leave_one_out, time_split
from benchmarks.quality_generator import Recipe
from benchmarks.sasrec import SASRecConfig
from features.datasets import Dataset
from models.baselines import EngagementLog, ItemKNN, KNNConfig, item_index
from models.generator import Generator
from models.onerec_session import SessionConfig
from models.onerec_v1 import V1Config
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.tokenizer.vocabulary import Catalogue

RIVAL = "sasrec"
JUDGED = 6000
"""Users that validation looks at between epochs, a random sample where there are more."""
DROPOUTS = (0.5, 0.3)
"""Tried for SASRec."""
QUICK_TESTS = 2000
"""Tests, and as many validations, of a quick run."""
QUICK_TARGETS = 40_000
"""Interactions that a quick run has to learn to foretell."""
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A data set in one order, and the seed of everything random."""

    dataset: Dataset
    seed: int
    shuffled: bool
    since: int | None
    """Test on interactions from this time on (UTC ms); None is leave-one-out."""
    quick: bool

    @property
    def items(self) -> pa.Table:
        """ITEM rows."""
        return self.dataset.items

    @cached_property
    def split(self) -> Split:
        """What is trained and tested on; the shuffled order is the same for all seeds."""
        n = self.items.num_rows
        bare = Catalogue.from_items(self.items, sids=np.zeros((n, 1), np.int32), codes=1, popularity=np.zeros(n))
        histories = Histories.from_exposures(self.dataset.exposures, bare, limit=50, shuffle_ties=self.shuffled)
        whole = leave_one_out(histories) if self.since is None else time_split(histories, self.since)
        return whole.sampled(QUICK_TESTS, QUICK_TARGETS) if self.quick else whole

    @cached_property
    def training(self) -> pa.Table:
        """EXPOSURE rows that may be learned from."""
        return self.split.training_table(self.dataset.exposures)

    @cached_property
    def judged(self) -> np.ndarray:
        """Positions that validation looks at while training."""
        validation = self.split.validation
        if len(validation) <= JUDGED:
            return validation
        return np.sort(np.random.default_rng(0).choice(validation, JUDGED, replace=False))

    def ndcg(self, ranked: np.ndarray) -> float:
        """NDCG@10 of lists for ``judged``."""
        return accuracy(ranked, self.split.histories.item[self.judged], (10,))["ndcg@10"]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A model ready to rank: ``rank(positions)`` gives item rows int32 [len(positions), 50], best first, -1 = none."""

    rank: Callable[[np.ndarray], np.ndarray]
    parameters: int
    notes: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """How to fit one, and the recipe that says whether a kept run is still the same."""

    fit: Callable[[Question, Path, Progress], Fitted]
    describe: Callable[[Question], dict[str, Any]]


def _popularity(question: Question, _: Path, __: Progress) -> Fitted:
    split, n = question.split, question.items.num_rows
    often = split.occurrences(n)
    return Fitted(
        rank=lambda positions: popularity_ranking(split.histories, positions, often, 50), parameters=n, notes={}
    )


def _item_knn(question: Question, _: Path, __: Progress) -> Fitted:
    split, exposures = question.split, question.dataset.exposures
    histories, ids = split.histories, item_index(question.items)
    now = int(histories.time_ms.max()) + 1
    # Public sequences span years: nothing may decay within days.
    config = KNNConfig(half_life_days=36_500.0, history=50)
    knn = ItemKNN.fit(question.training, question.items, now_ms=now, config=config)
    users = np.asarray(exposures.column("user_id").to_pylist(), object)

    def rank(positions: np.ndarray) -> np.ndarray:
        before = np.concatenate([np.arange(a, b) for a, b in zip(histories.first(positions), positions, strict=True)])
        table = exposures.take(pa.array(np.sort(histories.row[before])))
        asking = ItemKNN(knn.item_ids, EngagementLog.of(table, ids), knn.similarity, config, knn.popular)
        result = np.full((len(positions), 50), -1, np.int32)
        for first in range(0, len(positions), 512):
            names = users[histories.row[positions[first : first + 512]]].tolist()
            for row, ranked in enumerate(asking.recommend(names, now, 50)):
                result[first + row, : len(ranked)] = ids.get_indexer(
                    pd.Index([item for item, _ in ranked], dtype=object)
                )
        return result

    return Fitted(rank=rank, parameters=int(knn.similarity.nnz), notes={})


def _sasrec(dates: bool) -> Callable[[Question, Path, Progress], Fitted]:
    def fit(question: Question, folder: Path, progress: Progress) -> Fitted:
        split, n = question.split, question.items.num_rows
        best: tuple[float, sasrec.SASRec, SASRecConfig] | None = None
        for config in _configs(question, folder, dates):

            def judge(model: sasrec.SASRec, config: SASRecConfig = config) -> float:
                return question.ndcg(sasrec.rank(model, split, question.judged, config))

            model = sasrec.train(split, n, config, judge, progress)
            value = judge(model)
            progress(f"dropout {config.dropout}: validation NDCG@10 {value:.4f}")
            if best is None or value > best[0]:
                best = (value, model, config)
        assert best is not None
        _, chosen, config = best
        return Fitted(
            rank=lambda positions: sasrec.rank(chosen, split, positions, config),
            parameters=size(chosen),
            notes={"dropout": config.dropout},
        )

    return fit


def _configs(question: Question, folder: Path, dates: bool) -> list[SASRecConfig]:
    """What is tried: every dropout with the first seed in the published order, and what won there in the others."""
    base = SASRecConfig(dates=dates, seed=question.seed, limit=_length(question))
    if question.quick:
        return [replace(base, epochs=4, every=2, least_steps=1)]
    first = folder.with_name(f"{folder.name.rsplit('-', 2)[0]}-raw-0") / "run.json"
    if (question.seed or question.shuffled) and first.exists():
        return [replace(base, dropout=json.loads(first.read_text())["dropout"])]
    return [replace(base, dropout=dropout) for dropout in DROPOUTS]


def _length(question: Question) -> int:
    """Interactions that SASRec reads, as its paper has it: 50 on reviews, 200 on MovieLens, whose users are long."""
    lengths = np.diff(question.split.histories.starts)
    return 200 if np.quantile(lengths, 0.95) > 100 else SASRecConfig.limit


def _generator(recipe: Recipe) -> Callable[[Question, Path, Progress], Fitted]:
    def fit(question: Question, folder: Path, progress: Progress) -> Fitted:
        made = _seeded(recipe, question)
        split = question.split
        codes = min(made.tokenizer.codes, max(question.items.num_rows // 4, 2))
        tokenizer = Tokenizer.fit(question.items, question.training, replace(made.tokenizer, codes=codes))
        catalogue = tokenizer.catalogue(question.items, question.training)
        progress(f"tokenizer fitted: {len(np.unique(catalogue.sids, axis=0))} SIDs of {len(catalogue)} items")

        def judge(model: Generator) -> float:
            ranked = quality_generator.rank(model, split, question.judged, catalogue, made, 10)
            value = question.ndcg(ranked)
            progress(f"validation NDCG@10 {value:.4f}")
            return value

        output = folder / "training"
        model, metrics = quality_generator.train(split, catalogue, tokenizer.codebooks, made, output, judge)
        return Fitted(
            rank=lambda positions: quality_generator.rank(model, split, positions, catalogue, made),
            parameters=size(model),
            notes={"steps": metrics["step"], "stopped": metrics["stopped"]},
        )

    return fit


def _seeded(recipe: Recipe, question: Question) -> Recipe:
    """The recipe with this question's seed; few steps when it is quick."""
    epochs = 1 if question.quick else recipe.training.epochs
    return replace(
        recipe,
        tokenizer=replace(recipe.tokenizer, seed=question.seed),
        training=replace(recipe.training, seed=question.seed, epochs=epochs),
    )


def size(model: nn.Module) -> int:
    """Numbers that were learned."""
    return sum(parameter.numel() for parameter in model.parameters())


def _without(**changes: Any) -> Recipe:
    base = Recipe()
    return replace(base, model=replace(base.model, **changes))


_ENCODED: dict[str, Any] = {
    "d_model": 128,
    "heads": 4,
    "kv_groups": 4,
    "head": "tied",
    "short": 50,
    "queries": 0,
    "static_width": 32,
    "author_width": 32,
    "field_width": 32,
    "static_buckets": 2,
}
"""Of the encoder-decoders; their contexts have no lifelong pathway to compress."""
RECIPES = {
    "v2": Recipe(),
    "v2-no-memory": _without(memory=False, item_head=False),
    "v2-no-item-head": _without(item_head=False),
    "v2-no-context-layer": _without(context_layers=0),
    "v2-no-newest": _without(start_from_newest=False),
    "v2-no-dates": replace(Recipe(), dates=False),
    "v2-lazy": _without(context_layers=0, start_from_newest=False, item_head=False),
    "v2-published": _without(
        context_layers=0, start_from_newest=False, item_head=False, memory=False, head="linear", recency_bias=False
    ),
    "v1": replace(Recipe(), model=V1Config(**_ENCODED, embed=128, dropout=0.3, memory=True, item_head=True)),
    "session": replace(Recipe(), model=SessionConfig(**_ENCODED, embed=128, dropout=0.3)),
    "tiger": Recipe(
        tokenizer=TokenizerConfig(levels=4, codes=256, dim=64, balanced=False),
        model=V1Config(**_ENCODED | {"head": "linear"}, embed=64, dropout=0.1),
    ),
}


def _of_recipe(recipe: Recipe) -> Model:
    return Model(_generator(recipe), lambda question: _plain(asdict(_seeded(recipe, question))))


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _of_sasrec(dates: bool) -> Model:
    return Model(
        _sasrec(dates),
        lambda question: {
            **_plain(asdict(SASRecConfig(dates=dates, seed=question.seed, limit=_length(question)))),
            "dropout": list(DROPOUTS),
        },
    )


MODELS = {
    "popularity": Model(_popularity, lambda _: {}),
    "itemknn": Model(_item_knn, lambda _: {}),
    RIVAL: _of_sasrec(dates=False),
    "sasrec-dates": _of_sasrec(dates=True),
    **{name: _of_recipe(recipe) for name, recipe in RECIPES.items()},
}
