"""Published sizes, counted on the meta device, against their names; and where the lazy decoder's compute goes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.flops import count, on_meta, parameters, saved_values, training
from models.generator import GeneratorConfig
from models.naive import NaiveConfig
from models.onerec_session import SessionConfig
from models.onerec_v1 import V1Config
from models.onerec_v2 import V2Config
from models.sizes import V1_SIZES, V2_SIZES, preset

SHARED = {"codes": 64, "d_model": 64, "heads": 4, "kv_groups": 4, "embed": 16, "recency_bias": False}
LAZY = V2Config(layers=4, processor="direct", **SHARED)  # type: ignore[arg-type]
ENCDEC = V1Config(encoder_layers=2, decoder_layers=2, ffn=256, queries=0, **SHARED)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", V2_SIZES)
def test_v2_sizes_have_the_parameters_of_their_names(name: str) -> None:
    nominal = float(name.removeprefix("v2-").removesuffix("b")) * 1e9
    allowed = 0.15 if name in ("v2-0.1b", "v2-0.2b") else 0.06
    assert parameters(on_meta(preset(name, 8192)))["body"] == pytest.approx(nominal, rel=allowed)


def test_the_mixture_has_4_billion_parameters_and_uses_half_a_billion() -> None:
    found = parameters(on_meta(preset("v2-moe-4b", 8192)))
    assert found["body"] == pytest.approx(4.07e9, rel=0.01)
    assert found["active"] == pytest.approx(0.5e9, rel=0.01)


@pytest.mark.parametrize("name", [name for name in V1_SIZES if name != "v1-0.015b"])
def test_v1_sizes_come_near_their_names(name: str) -> None:
    nominal = float(name.removeprefix("v1-").removesuffix("b")) * 1e9
    assert parameters(on_meta(preset(name, 8192)))["body"] == pytest.approx(nominal, rel=0.11)


def test_the_lazy_decoder_s_layers_cost_18_d2_and_the_context_hardly_anything() -> None:
    layers = 6 * 18 * 64**2 * 4 * 3  # forward and backward, three tokens
    heads = 6 * 3 * 64 * 64
    split = 6 * 48 * 64 * 512 / 5
    assert count(LAZY, 512).one_head * 1e9 == pytest.approx(layers + heads + split, rel=0.01)


def test_encoders_pay_for_every_context_token() -> None:
    encoder, decoder = 6 * 16 * 64**2 * 2 * 512 / 5, 6 * 18 * 64**2 * 2 * 3
    assert count(ENCDEC, 512).one_head * 1e9 == pytest.approx(encoder + decoder + 6 * 3 * 64 * 64, rel=2e-3)


def test_only_the_lazy_decoder_keeps_its_compute_when_the_context_grows() -> None:
    naive = NaiveConfig(layers=4, **SHARED)  # type: ignore[arg-type]
    growth = [training(config, 1024, 5) / training(config, 256, 5) for config in (LAZY, ENCDEC, naive)]
    assert growth[0] < growth[1]
    assert growth[0] < growth[2]
    assert growth[1] > 3.5
    assert saved_values(LAZY, 256) * 3 < saved_values(ENCDEC, 256)


def test_the_paper_s_count_has_every_head_at_every_position() -> None:
    found = count(LAZY, 512)
    other_heads = 6 * LAZY.levels * (LAZY.levels - 1) * LAZY.d_model * LAZY.codes
    assert (found.paper - found.one_head) * 1e9 == pytest.approx(other_heads)


def test_the_count_without_context_lacks_the_kv_split_alone() -> None:
    found = count(replace(LAZY, l_kv=2), 512)
    split = 6 * LAZY.levels * LAZY.embed * 2 * LAZY.d_model * 512 / 5  # forward and backward, shared by five items
    assert (found.paper - found.without_context) * 1e9 == pytest.approx(split, rel=0.01)


def test_counting_needs_no_memory() -> None:
    model = on_meta(replace(LAZY, d_model=4096, heads=32, kv_groups=32))
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


WRONG: list[tuple[Callable[..., GeneratorConfig], dict[str, Any]]] = [
    (V1Config, {"heads": 3}),
    (V1Config, {"ffn": 0}),
    (V1Config, {"queries": -1}),
    (V1Config, {"experts_in": "encoder"}),
    (V1Config, {"experts": 2, "active_experts": 2}),
    (NaiveConfig, {"layers": 0}),
    (SessionConfig, {"items": 0}),
    (V2Config, {"processor": "none"}),
    (V2Config, {"head": "free"}),
]


@pytest.mark.parametrize(("kind", "wrong"), WRONG)
def test_impossible_sizes_are_refused(kind: Callable[..., GeneratorConfig], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|>= 0"):
        kind(**wrong)
