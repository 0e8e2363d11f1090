"""Named model sizes and the recipes that train them: presets are functions, pipelines pass a name and overrides."""

import json
from dataclasses import dataclass, fields, replace
from typing import Any

from models.onerec_v2 import V2Config
from models.tokenizer.tokenizer import TokenizerConfig
from models.tokenizer.vocabulary import Catalogue
from models.training.align import AlignConfig
from models.training.pretrain import PretrainConfig


def tiny(codes: int, levels: int = 3) -> V2Config:
    """d 128, 3 layers: demonstrations and CI on a CPU. Keys and values of their own for every layer: at this width one
    shared row is too narrow a passage for the context (docs/log.md)."""
    return V2Config(
        codes=codes, levels=levels, d_model=128, layers=3, heads=4, kv_groups=4, l_kv=3, s_kv=2, embed=64, head="tied"
    )


def small(codes: int, levels: int = 3) -> V2Config:
    """d 512, 4 layers, about 20 M parameters: one GPU, or a patient CPU."""
    return V2Config(codes=codes, levels=levels, d_model=512, layers=4, heads=8, kv_groups=2, embed=64, head="tied")


WEIGHTS: dict[str, Any] = {"exposure_weight": "watched", "propensity_power": 0.5}
"""Chosen on the simulator's history among all, engaged and watched and powers 0, 0.5 and 1 (docs/log.md)."""

PRESETS = {"tiny": tiny, "small": small}


def preset(name: str, codes: int, levels: int = 3) -> V2Config:
    """The preset called ``name``; raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name](codes, levels)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a pipeline run needs to know beside its data."""

    preset: str
    tokenizer: TokenizerConfig
    pretrain: PretrainConfig
    incremental: PretrainConfig
    """Going on from a bundle's weights on a newer window."""
    align: AlignConfig
    dropout: float = 0.1

    def model_for(self, catalogue: Catalogue) -> V2Config:
        """The preset's model with the catalogue's codebook size and levels."""
        return replace(preset(self.preset, catalogue.codes, catalogue.levels), dropout=self.dropout)


def recipe(name: str, overrides: str = "{}") -> Recipe:
    """The recipe of preset ``name`` with ``overrides``, a JSON object such as {"pretrain.epochs": 2, "dropout": 0}.

    Raises ValueError naming the unknown field and those that exist, or what is wrong with the JSON.
    """
    preset(name, codes=2)
    chosen = Recipe(
        preset=name,
        tokenizer=TokenizerConfig(),
        pretrain=PretrainConfig(epochs=5, batch_requests=64, max_steps=3000, **WEIGHTS),
        incremental=PretrainConfig(epochs=3, batch_requests=64, learning_rate=1e-3, max_steps=400, **WEIGHTS),
        align=AlignConfig(epochs=1, max_steps=300, **WEIGHTS),
    )
    try:
        given: Any = json.loads(overrides)
    except json.JSONDecodeError as error:
        raise ValueError(f"overrides {overrides!r} are not a JSON object ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f'overrides are {overrides!r}; expected a JSON object such as {{"pretrain.epochs": 2}}')
    for path, value in given.items():
        chosen = _override(chosen, path, value)
    return chosen


def _override(chosen: Recipe, path: str, value: Any) -> Recipe:
    part, _, name = path.rpartition(".")
    parts: dict[str, Any] = {
        "": chosen,
        **{p: getattr(chosen, p) for p in ("tokenizer", "pretrain", "incremental", "align")},
    }
    known = {p: {field.name for field in fields(config)} for p, config in parts.items()}
    if name not in known.get(part, ()) or (not part and name in (*parts, "preset")):
        names = sorted(f"{p}.{field}" for p in known if p for field in known[p])
        raise ValueError(f"the recipe has no field {path!r}; it has dropout, {', '.join(names)}")
    try:
        changed: Any = replace(parts[part], **{name: value})
    except TypeError as error:
        raise ValueError(f"recipe field {path!r} cannot be {value!r}: {error}") from error
    return replace(chosen, **{part: changed}) if part else changed
