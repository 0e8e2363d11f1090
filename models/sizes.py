"""Model sizes by name: those of the papers and those for one machine, in every architecture.

OneRec V1 (arXiv 2506.13695) Table 1, OneRec-V2 (arXiv 2508.20900) Table 5, published for 3 levels of 8192 codes. A
size is a function of the codebook; pipelines pass its name. Equal names of the machine's sizes (``small``,
``v1-small``, ``naive-small``) have about equal parameters in the decoder and encoder.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from models.generator import GeneratorConfig
from models.naive import NaiveConfig
from models.onerec_session import SessionConfig
from models.onerec_v1 import V1Config
from models.onerec_v2 import V2Config

V2_SIZES: dict[str, tuple[int, int, int, int]] = {
    "v2-0.1b": (640, 12, 10, 32),
    "v2-0.2b": (896, 12, 14, 45),
    "v2-0.5b": (1408, 14, 11, 70),
    "v2-1b": (1792, 18, 14, 90),
    "v2-2b": (2304, 22, 18, 115),
    "v2-4b": (2944, 26, 23, 147),
    "v2-8b": (3584, 34, 28, 179),
}
"""d_model, layers, heads, embed of V2 Table 5; keys and values are one set for all layers, a group per head."""


MACHINE: dict[str, Any] = {"recency_bias": True, "head": "tied", "embed": 64}
"""Departures of the machine's sizes, ours (models.generator)."""


def tiny(codes: int, levels: int = 3) -> V2Config:
    """d 128, 3 layers: demonstrations and CI on a CPU. Keys and values of their own for every layer: at this width one
    shared row is too narrow a passage for the context (docs/log.md)."""
    return V2Config(codes=codes, levels=levels, d_model=128, layers=3, heads=4, kv_groups=4, l_kv=3, s_kv=2, **MACHINE)


def small(codes: int, levels: int = 3) -> V2Config:
    """d 512, 4 layers, about 20 M parameters: one GPU, or a patient CPU."""
    return V2Config(
        codes=codes, levels=levels, d_model=512, layers=4, heads=8, kv_groups=2, processor="direct", **MACHINE
    )


def v2(name: str, codes: int, levels: int = 3) -> V2Config:
    """A dense size of V2 Table 5, as published: no departures."""
    d_model, layers, heads, embed = V2_SIZES[name]
    return V2Config(
        codes=codes,
        levels=levels,
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_groups=heads,
        embed=embed,
        processor="direct",
        recency_bias=False,
    )


def v2_moe(codes: int, levels: int = 3) -> V2Config:
    """4B parameters, 0.5B of them active: 53 routed experts (top 3) and a shared one, the first two blocks dense."""
    dense = v2("v2-0.5b", codes, levels)
    return replace(dense, experts=53, active_experts=3, shared_experts=1, expert_width=dense.d_model)


V1_SIZES: dict[str, dict[str, Any]] = {
    "v1-0.015b": {"d_model": 128, "ffn": 256, "heads": 4, "encoder_layers": 2, "decoder_layers": 2},
    "v1-0.121b": {"d_model": 1024, "ffn": 2048, "heads": 8, "encoder_layers": 4, "decoder_layers": 4},
    "v1-0.935b": {
        "d_model": 1024,
        "ffn": 2048,
        "heads": 8,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "experts": 24,
        "active_experts": 2,
        "expert_width": 2688,
    },
    "v1-2.633b": {
        "d_model": 1024,
        "ffn": 2048,
        "heads": 8,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "experts": 24,
        "active_experts": 4,
        "expert_width": 2688,
        "experts_in": "both",
        "expert_stride": 2,
    },
}
"""V1 Table 1; the experts' width and their place in every other layer are derived from the totals."""


def v1(name: str, codes: int, levels: int = 3) -> V1Config:
    """A size of V1 Table 1; a SID's embedding is as wide as the model, its levels sharing that width."""
    size = V1_SIZES[name]
    return V1Config(codes=codes, levels=levels, kv_groups=size["heads"], embed=-(-size["d_model"] // levels), **size)


V1_MACHINE: dict[str, Any] = {**MACHINE, "static_width": 32, "author_width": 64, "field_width": 32}
"""V1's widths, scaled down."""
V1_TINY: dict[str, Any] = {
    **V1_MACHINE,
    "d_model": 128,
    "ffn": 512,
    "heads": 4,
    "kv_groups": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "queries": 32,
}
V1_SMALL: dict[str, Any] = {
    **V1_MACHINE,
    "d_model": 512,
    "ffn": 2048,
    "heads": 8,
    "kv_groups": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
}


def v1_tiny(codes: int, levels: int = 3) -> V1Config:
    """``tiny`` as an encoder-decoder: 1 + 2 layers of d 128."""
    return V1Config(codes=codes, levels=levels, **V1_TINY)


def v1_small(codes: int, levels: int = 3) -> V1Config:
    """``small`` as an encoder-decoder: 2 + 2 layers of d 512, lifelong history uncompressed."""
    return V1Config(codes=codes, levels=levels, queries=0, **V1_SMALL)


def naive_tiny(codes: int, levels: int = 3) -> NaiveConfig:
    """``tiny`` as a plain decoder."""
    return NaiveConfig(codes=codes, levels=levels, d_model=128, layers=3, heads=4, kv_groups=4, **MACHINE)


def naive_small(codes: int, levels: int = 3) -> NaiveConfig:
    """``small`` as a plain decoder: 5 layers of d 512."""
    return NaiveConfig(codes=codes, levels=levels, d_model=512, layers=5, heads=8, kv_groups=2, **MACHINE)


def session_tiny(codes: int, levels: int = 3) -> SessionConfig:
    """``v1-tiny`` that writes five items, as O1 does."""
    return SessionConfig(codes=codes, levels=levels, **V1_TINY)


def session_small(codes: int, levels: int = 3) -> SessionConfig:
    """``v1-small`` that writes five items, its lifelong history compressed and its decoder with 8 experts (O1's is a
    mixture too)."""
    return SessionConfig(
        codes=codes, levels=levels, queries=32, experts=8, active_experts=2, expert_width=1024, **V1_SMALL
    )


PRESETS: dict[str, Callable[[int, int], GeneratorConfig]] = {
    "tiny": tiny,
    "small": small,
    "v1-tiny": v1_tiny,
    "v1-small": v1_small,
    "naive-tiny": naive_tiny,
    "naive-small": naive_small,
    "session-tiny": session_tiny,
    "session-small": session_small,
    **{name: partial(v1, name) for name in V1_SIZES},
    **{name: partial(v2, name) for name in V2_SIZES},
    "v2-moe-4b": v2_moe,
}


def preset(name: str, codes: int, levels: int = 3) -> GeneratorConfig:
    """The configuration called ``name``; raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name](codes, levels)
