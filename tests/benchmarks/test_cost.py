"""The cost model's formulas against what was counted, and the page that quotes it."""

from pathlib import Path

import pytest

from benchmarks.cost import Gpu, Load, cost, errors, platform, serving_flops, training_flops

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()


def test_formulas_are_near_what_torch_counts() -> None:
    found = errors()
    assert len(found) == 6
    assert max(abs(error) for error in found.values()) < 0.085, found


def test_cost_is_linear_in_what_is_asked_for() -> None:
    one, two = (cost("v2-1b", Load(requests_a_second=rate), Gpu()) for rate in (1e6, 2e6))
    assert two["serving_gpus"] == pytest.approx(2 * one["serving_gpus"], rel=1e-3)
    assert two["training_gpus"] == one["training_gpus"]
    assert serving_flops(1e9, 0, 4) == 2e9 * 9
    assert training_flops(1e9) == 18e9


def test_the_page_quotes_the_model() -> None:
    for name, beam in (("v2-1b", 128), ("v2-1b", 512), ("v2-moe-4b", 512), ("v2-8b", 128), ("v2-8b", 512)):
        found = cost(name, Load(beam=beam), Gpu())
        row = f"| {name.removeprefix('v2-')} | {beam} | {found['training_gpus']} | {found['serving_gpus']:,} |".replace(
            ",", " "
        )
        assert row in PAGE, row
    rest = platform(Load())
    assert f"{rest['collectors']} collectors" in PAGE
    assert f"{rest['online_terabytes']:.0f} TB" in PAGE
    assert f"{rest['lifelong_threads']} threads" in PAGE
