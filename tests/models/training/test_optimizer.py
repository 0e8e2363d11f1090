from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from models.onerec_v2 import OneRecV2, V2Config
from models.training.config import FitConfig
from models.training.optimizer import Average, active_parameters, adamw, base_rate, law, rate

CONFIG = FitConfig()
TABLE_5 = {0.1e9: 5.00e-4, 0.2e9: 3.54e-4, 0.5e9: 2.24e-4, 1e9: 1.58e-4, 2e9: 1.12e-4, 4e9: 7.91e-5, 8e9: 5.59e-5}


def test_rate_warms_up_and_decays() -> None:
    config = FitConfig(learning_rate=1.0, warmup_steps=10, final_share=0.1)
    rates = [rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(rates) == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert {rate(step, 100, replace(config, schedule="constant")) for step in range(10, 100)} == {1.0}


def test_only_matrices_of_linear_layers_decay() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(4, 8), "l": nn.Linear(8, 8), "n": nn.LayerNorm(8)})
    decayed, plain = adamw(model, CONFIG).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model["l"].weight)]
    assert len(plain["params"]) == 4
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize(("parameters", "published"), TABLE_5.items())
def test_the_law_gives_the_published_rates(parameters: float, published: float) -> None:
    assert law(parameters) == pytest.approx(published, rel=0.005)


def test_no_rate_means_the_law_of_the_model_s_active_parameters() -> None:
    dense = OneRecV2(V2Config(codes=8, d_model=32, layers=3, heads=4, kv_groups=4, recency_bias=False))
    mixed = OneRecV2(
        V2Config(codes=8, d_model=32, layers=3, heads=4, kv_groups=4, recency_bias=False, experts=8, expert_width=128)
    )
    assert active_parameters(dense) == pytest.approx(18 * 32**2 * 3, rel=0.02)
    assert active_parameters(mixed) < sum(p.numel() for p in mixed.blocks.parameters())
    assert base_rate(replace(CONFIG, learning_rate=0.0), dense) == law(active_parameters(dense))
    assert base_rate(replace(CONFIG, learning_rate=0.1), dense) == 0.1


def test_the_running_mean_approaches_constant_weights_and_can_go_on() -> None:
    model = nn.Linear(3, 3)
    average = Average(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for step in range(40):
        average.update(model, step)
    assert torch.allclose(average.mean["weight"], torch.ones(3, 3), atol=1e-3)
    other = Average(nn.Linear(3, 3), 0.5)
    other.load(average.mean)
    assert torch.equal(other.mean["weight"], average.mean["weight"])
