"""The recipe of every preset: a model's size and its training; pipelines pass a name and overrides."""

import json
from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from models.generator import GeneratorConfig
from models.overrides import read_overrides
from models.sizes import V1_SIZES, V2_SIZES, preset
from models.tokenizer.tokenizer import TokenizerConfig
from models.tokenizer.vocabulary import Catalogue
from models.training.alignment import AlignConfig
from models.training.config import LAW
from models.training.pretrain import PretrainConfig
from models.training.reward import RewardConfig

WEIGHTS: dict[str, Any] = {"exposure_weight": "watched", "propensity_power": 0.5}
"""Chosen on the simulator's history among all, engaged and watched and powers 0, 0.5 and 1 (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a pipeline run needs to know beside its data."""

    preset: str
    tokenizer: TokenizerConfig
    pretrain: PretrainConfig
    incremental: PretrainConfig
    """Going on from a bundle's weights on a newer window."""
    align: AlignConfig
    reward: RewardConfig
    dropout: float = 0.1

    def model_for(self, catalogue: Catalogue) -> GeneratorConfig:
        """The preset's model with the catalogue's codebook size and levels."""
        return replace(preset(self.preset, catalogue.codes, catalogue.levels), dropout=self.dropout)


def machine(name: str, size: GeneratorConfig) -> Recipe:
    """For small logs: several epochs, and at most so many steps on the newest data."""
    return Recipe(
        preset=name,
        tokenizer=TokenizerConfig(dim=size.embed),
        pretrain=PretrainConfig(epochs=5, batch_requests=64, max_steps=3000, **WEIGHTS),
        incremental=PretrainConfig(epochs=3, batch_requests=64, learning_rate=1e-3, max_steps=400, **WEIGHTS),
        align=AlignConfig(epochs=1, max_steps=300, **WEIGHTS),
        reward=RewardConfig(epochs=1, batch_requests=64, max_steps=200),
    )


def published(name: str, size: GeneratorConfig) -> Recipe:
    """For the papers' sizes: once through the data, all exposures alike, V2's learning-rate law, sharded on GPUs."""
    shared: dict[str, Any] = {"batch_requests": 512, "parallel": "auto"}
    once = PretrainConfig(learning_rate=LAW, schedule="constant", **shared)
    return Recipe(
        preset=name,
        tokenizer=TokenizerConfig(dim=size.embed),
        pretrain=once,
        incremental=once,
        align=AlignConfig(**shared),
        reward=RewardConfig(epochs=1, max_steps=0, d_model=256, heads=8, embed=64, **shared),
        dropout=0.0,
    )


def recipe(name: str, overrides: str = "{}") -> Recipe:
    """The recipe of preset ``name`` with ``overrides``, a JSON object such as {"pretrain.epochs": 2, "dropout": 0}.

    Raises ValueError naming the unknown field and those that exist, or what is wrong with the JSON.
    """
    size = preset(name, codes=2)
    chosen = published(name, size) if name in {*V1_SIZES, *V2_SIZES, "v2-moe-4b"} else machine(name, size)
    return _overridden(chosen, read_overrides(overrides))


def _overridden(chosen: Recipe, given: dict[str, Any]) -> Recipe:
    """``chosen`` with all fields of a part set at once: one may need the other, in whatever order they are given."""
    parts: dict[str, Any] = {
        "": chosen,
        **{p: getattr(chosen, p) for p in ("tokenizer", "pretrain", "incremental", "align", "reward")},
    }
    known = {p: {field.name: field.type for field in fields(config)} for p, config in parts.items()}
    values: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        part, _, name = path.rpartition(".")
        if name not in known.get(part, ()) or (not part and name in (*parts, "preset")):
            names = sorted(f"{p}.{field}" for p in known if p for field in known[p])
            raise ValueError(f"the recipe has no field {path!r}; it has dropout, {', '.join(names)}")
        if wrong := _misfit(known[part][name], value):
            raise ValueError(f"recipe field {path!r} cannot be {value!r}: {wrong}")
        values.setdefault(part, {})[name] = value
    for part, changes in values.items():
        changed: Any = replace(chosen if not part else parts[part], **changes)
        chosen = replace(chosen, **{part: changed}) if part else changed
    return chosen


def _misfit(kind: Any, value: Any) -> str:
    """What is expected instead where ``value``, read from JSON, is not of a field's type; empty where it is."""
    try:
        TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return "; ".join(each["msg"] for each in error.errors())
    return ""
