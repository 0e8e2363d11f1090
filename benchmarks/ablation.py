"""Ablations of the tokenizer on Recall@10 of a small lazy decoder, leave-one-out (see ``leave_one_out``).

One arm changes one thing of the base: 3 levels of 256 codes, aligned embedding without ``detail``, SIDs as input, heads
tied to the code embeddings. ``detailed`` is the default configuration. Item ids as input cannot have tied heads, so
their rival is the SID input with linear heads. All arms have the same network, steps and order of samples for a seed.
Embeddings are those of seed 0; the quantiser's and the decoder's seeds vary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from benchmarks.harness import spread
from benchmarks.leave_one_out import (
    Histories,
    ItemIds,
    TrainingConfig,
    accuracy,
    popularity_ranking,
    rank,
    train,
)
from models.onerec_v2 import OneRecV2, V2Config
from models.tokenizer.interactions import popularity
from models.tokenizer.residual import ResidualQuantizer
from models.tokenizer.vocabulary import Catalogue

STEPS = 300
TESTED = 2000
"""Users whose last item is ranked, a random sample where there are more."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant of the tokenizer or of the model's input."""

    levels: int = 3
    codes: int = 256
    embedding: str = "aligned"
    balanced: bool = True
    tied: bool = True
    item_ids: bool = False


ARMS = {
    "base_3x256": Arm(),
    "content_only": Arm(embedding="content"),
    "detailed": Arm(embedding="detailed"),
    "sid_linear_heads": Arm(tied=False),
    "item_ids_linear_heads": Arm(tied=False, item_ids=True),
    "3x128": Arm(codes=128),
    "3x512": Arm(codes=512),
    "4x128": Arm(levels=4, codes=128),
    "4x256": Arm(levels=4),
    "4x512": Arm(levels=4, codes=512),
    "plain_kmeans": Arm(balanced=False),
}


class Prepared(Protocol):
    """What an ablation needs of the benchmark."""

    @property
    def items(self) -> pa.Table:
        """ITEM rows."""

    @property
    def exposures(self) -> pa.Table:
        """The whole log."""

    @property
    def training(self) -> pa.Table:
        """The log without what is tested on."""

    @property
    def quick(self) -> bool:
        """Few steps and users."""

    def embedding(self, kind: str, seed: int = 0) -> np.ndarray:
        """Vectors of the items."""


def network(arm: Arm, codes: int, embed: int) -> V2Config:
    """The small lazy decoder that every arm trains; ``embed`` is the width of the item vectors."""
    return V2Config(
        codes=codes,
        levels=arm.levels,
        d_model=64,
        layers=2,
        heads=4,
        kv_groups=4,
        l_kv=2,
        s_kv=2,
        embed=embed,
        dropout=0.1,
        head="tied" if arm.tied else "linear",
    )


def run(bench: Prepared, name: str, seed: int) -> dict[str, Any]:
    """Accuracy of one arm with one seed."""
    arm, x = ARMS[name], bench.embedding(ARMS[name].embedding)
    codes = min(arm.codes, len(x) // 4)
    quantizer = ResidualQuantizer.fit(x, levels=arm.levels, codes=codes, balanced=arm.balanced, seed=seed)
    sids = quantizer.assign(x, balanced=arm.balanced, unique=True)
    liked = popularity(bench.training, bench.items.column("item_id").to_pylist())
    catalogue = Catalogue.from_items(bench.items, sids=sids, codes=codes, popularity=liked)
    histories = Histories.from_exposures(bench.exposures, catalogue)
    torch.manual_seed(seed)
    model = OneRecV2(network(arm, codes, embed=x.shape[1]))
    model.start_from_codebooks(torch.from_numpy(quantizer.codebooks))
    inputs = ItemIds(catalogue) if arm.item_ids else catalogue
    if isinstance(inputs, ItemIds):
        inputs.give_table(model)
    config = TrainingConfig(steps=20 if bench.quick else STEPS, seed=seed)
    loss = train(model, histories, catalogue.sids, inputs, config)
    tested = np.random.default_rng(0).permutation(histories.test())[: 200 if bench.quick else TESTED]
    ranked = rank(model, histories, tested, catalogue, inputs)
    often = np.bincount(histories.item[histories.training()], minlength=len(catalogue))
    floor = popularity_ranking(histories, tested, often)
    return {
        "arm": name,
        "seed": seed,
        "loss": loss,
        "steps": config.steps,
        "batch": config.batch,
        "tested_users": len(tested),
        **accuracy(ranked, histories.item[tested]),
        "popularity": accuracy(floor, histories.item[tested]),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """``recall@10`` of each arm over the seeds that were run, and that of popularity."""
    arms = dict.fromkeys(each["arm"] for each in runs)
    found = {
        arm: spread(each["recall@10"] for each in runs if each["arm"] == arm)
        | {"seeds": float(sum(each["arm"] == arm for each in runs))}
        for arm in arms
    }
    return found | {"popularity": spread([runs[0]["popularity"]["recall@10"]]) | {"seeds": 1.0}}
