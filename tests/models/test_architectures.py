"""What holds for every architecture: stepping equals teacher forcing, KV is made once, padding does not matter."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drawn import behaviours, shaken

from models.architectures import config_of, describe, model_of, name_of, restored
from models.generator import ContextKV, Generator, GeneratorConfig
from models.naive import NaiveConfig
from models.nn.moe import MoE, balance
from models.objectives.ntp import ntp_loss
from models.onerec_session import OneRecSession, SessionConfig
from models.onerec_v1 import V1Config
from models.onerec_v2 import V2Config
from models.pathways import PATHWAYS, ContextTensors
from models.sizes import PRESETS, preset

SIZES: dict[str, Any] = {"codes": 7, "d_model": 16, "heads": 4, "kv_groups": 2, "embed": 8}
V1: dict[str, Any] = {
    **SIZES,
    "ffn": 24,
    "short": 4,
    "positive": 6,
    "lifelong": 8,
    "queries": 5,
    "static_width": 4,
    "author_width": 8,
    "field_width": 4,
}
EXPERTS: dict[str, Any] = {"experts": 4, "active_experts": 2, "expert_width": 8}
CONFIGS: dict[str, GeneratorConfig] = {
    "v2": V2Config(**SIZES),
    "v2-moe": V2Config(**SIZES, **EXPERTS, dense_blocks=1, shared_experts=1),
    "v1": V1Config(**V1),
    "v1-uncompressed": V1Config(**{**V1, "queries": 0}, head="tied", recency_bias=True),
    "v1-moe": V1Config(**V1, **EXPERTS, experts_in="both"),
    "naive": NaiveConfig(**SIZES),
    "session": SessionConfig(**V1, items=3),
}
LENGTHS = {"short": 4, "positive": 6, "lifelong": 8}


def random_model(config: GeneratorConfig) -> Generator:
    torch.manual_seed(0)
    return shaken(model_of(config))


def random_context(config: GeneratorConfig, requests: int = 3, *, empty: bool = False, seed: int = 0) -> ContextTensors:
    """Behaviours in all pathways, left-padded as the histories are."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.repeat_interleave(torch.arange(len(PATHWAYS)), torch.tensor(list(LENGTHS.values())))
    mask = torch.cat(
        [torch.arange(n) >= n - torch.randint(0, n + 1, (requests, 1), generator=draw) for n in LENGTHS.values()], 1
    )
    mask = torch.zeros_like(mask) if empty else mask
    return behaviours(config, kind, mask, draw)


def random_targets(model: Generator, requests: int = 3, targets: int = 2) -> torch.Tensor:
    """[B, T, L]; a session model's T are the items of one session."""
    draw = torch.Generator().manual_seed(1)
    count = model.items if model.items > 1 else targets
    return torch.randint(0, model.config.codes, (requests, count, model.config.levels), generator=draw)


every = pytest.mark.parametrize("name", CONFIGS)


@every
@torch.no_grad()
def test_stepping_equals_teacher_forcing(name: str) -> None:
    model = random_model(CONFIGS[name])
    kv = model.encode(random_context(model.config))
    targets = random_targets(model)
    expected = model.score(kv, targets)
    assert expected.shape == (*targets.shape, 7)
    assert expected.dtype == torch.float32
    sequence = targets.flatten(1).unsqueeze(1) if model.items > 1 else targets  # [B, T, codes]
    wanted = expected.flatten(1, 2).unsqueeze(1) if model.items > 1 else expected
    logits, state = model.step(kv, None, None)
    for place in range(sequence.shape[2]):
        if place:
            logits, state = model.step(kv, sequence[:, :, place - 1], state)
        torch.testing.assert_close(logits.expand(-1, sequence.shape[1], -1), wanted[:, :, place], atol=2e-5, rtol=1e-4)
    assert len(state) == model.items * (model.config.levels + 1) - 1


@every
@torch.no_grad()
def test_beams_continue_from_the_ones_they_were_chosen_from(name: str) -> None:
    model = random_model(CONFIGS[name])
    kv = model.encode(random_context(model.config))
    codes = torch.tensor([[0, 3, 5]]).expand(3, -1)
    _, state = model.step(kv, codes, model.step(kv, None, None)[1])
    parents = torch.tensor([[2, 0, 0], [1, 1, 2], [0, 2, 1]])
    after, _ = model.step(kv, torch.ones_like(parents), state.select(parents))
    prefix = torch.stack([codes.gather(1, parents), torch.ones_like(parents)], -1)
    torch.testing.assert_close(after, model.decode(kv, prefix), atol=2e-5, rtol=1e-4)


@every
@torch.no_grad()
def test_the_context_is_encoded_once_whatever_is_generated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS[name])
    calls = 0
    encode = model.context.forward

    def counted(context: ContextTensors) -> ContextKV:
        nonlocal calls
        calls += 1
        kv: ContextKV = encode(context)
        return kv

    monkeypatch.setattr(model.context, "forward", counted)
    context = random_context(model.config)
    model(context, random_targets(model, targets=5))
    assert calls == 1
    kv = model.encode(context)
    assert calls == 2
    model.decode(kv, random_targets(model, targets=64)[:, :, :2])
    assert calls == 2
    assert len(kv) == 3
    assert all(part.shape[0] == 3 for part in (*kv.keys, *kv.values))  # a copy per request, none per target


@every
@torch.no_grad()
def test_padding_and_neighbours_in_the_batch_change_nothing(name: str) -> None:
    model = random_model(CONFIGS[name])
    context = random_context(model.config)
    targets = random_targets(model)
    expected = model(context, targets)
    fields = ("static", "sids", "author", "tag", "numeric", "labels", "mask")
    alone = replace(context, **{name: getattr(context, name)[1:2] for name in fields})
    torch.testing.assert_close(model(alone, targets[1:2]), expected[1:2], atol=2e-5, rtol=1e-4)
    garbage = replace(context, author=torch.where(context.mask, context.author, 5))
    torch.testing.assert_close(model(garbage, targets), expected, atol=2e-5, rtol=1e-4)
    trimmed = [s for s in range(len(context.kind)) if context.mask[:, s].any()]
    short = {name: getattr(context, name)[:, trimmed] for name in fields[1:]}
    cut = replace(context, kind=context.kind[trimmed], **short)
    torch.testing.assert_close(model(cut, targets), expected, atol=2e-5, rtol=1e-4)


@every
@torch.no_grad()
def test_an_empty_history_is_served_from_the_static_token(name: str) -> None:
    model = random_model(CONFIGS[name])
    assert torch.isfinite(model(random_context(model.config, empty=True), random_targets(model))).all()


@every
def test_every_weight_learns_and_bf16_agrees(name: str) -> None:
    model = random_model(CONFIGS[name])
    context = random_context(model.config, requests=6)
    targets = random_targets(model, requests=6, targets=4)
    exact = model(context, targets)
    ntp_loss(exact, targets, torch.ones(targets.shape[:2]), model.level_loss).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(context, targets)
    assert rough.dtype == torch.float32
    assert (rough.softmax(-1) - exact.softmax(-1)).abs().mean() < 0.03


@every
@torch.no_grad()
def test_a_model_is_restored_from_json_and_its_weights(name: str) -> None:
    model = random_model(CONFIGS[name])
    again = restored(config_of(*json.loads(json.dumps(describe(model)))), model.state_dict()).eval()
    assert again.config == model.config
    assert type(again) is type(model)
    context, targets = random_context(model.config), random_targets(model)
    assert torch.equal(again(context, targets), model(context, targets))


def test_restoring_draws_no_initial_values() -> None:
    """They are most of the time that a swap of models would take."""
    model = random_model(CONFIGS["v2-moe"])
    before = torch.get_rng_state()
    restored(model.config, model.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    model_of(model.config)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_belongs_to_an_architecture(name: str) -> None:
    config = preset(name, 64)
    assert (config.codes, config.levels) == (64, 3)
    assert config_of(*describe(config)) == config
    kinds = {"v1": "onerec_v1", "session": "onerec_session", "naive": "naive"}
    assert name_of(config) == kinds.get(name.split("-")[0], "onerec_v2")


def test_foreign_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'bert'; there are onerec_v2, onerec_v1"):
        config_of("bert", {})
    with pytest.raises(ValueError, match="onerec_v1 has no context_layers, dense_blocks, l_kv"):
        config_of("onerec_v1", describe(CONFIGS["v2"])[1])


@every
def test_codebooks_of_other_sizes_are_refused(name: str) -> None:
    model = random_model(CONFIGS[name])
    model.start_from_codebooks(torch.randn(3, 7, 8))
    with pytest.raises(ValueError, match=r"shape \(3, 7, 9\); this model starts from \(3, 7, 8\)"):
        model.start_from_codebooks(torch.randn(3, 7, 9))


@every
@torch.no_grad()
def test_an_unknown_code_is_an_error_and_padding_is_not(name: str) -> None:
    model = random_model(CONFIGS[name])
    kv = model.encode(random_context(model.config))
    targets = random_targets(model)
    assert torch.isfinite(model.score(kv, torch.full_like(targets, -1))).all()
    with pytest.raises(IndexError, match="out of range"):
        model.score(kv, torch.full_like(targets, 7))


@pytest.mark.parametrize("name", ["v1", "v1-uncompressed", "session"])
def test_v1_refuses_a_pathway_longer_than_its_positions(name: str) -> None:
    model = random_model(replace(CONFIGS[name], positive=5))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="6 positive behaviours and the model positions for 5"):
        model.encode(random_context(model.config))


@pytest.mark.parametrize("name", ["v2", "naive"])
@torch.no_grad()
def test_models_without_positions_read_contexts_of_any_length(name: str) -> None:
    model = random_model(CONFIGS[name])
    context = random_context(model.config)
    doubled = {
        field: torch.cat([getattr(context, field)] * 5, 1)
        for field in ("sids", "author", "tag", "numeric", "labels", "mask")
    }
    long = replace(context, kind=context.kind.repeat(5), **doubled)
    assert torch.isfinite(model(long, random_targets(model))).all()


@pytest.mark.parametrize("name", ["v2-moe", "v1-moe"])
def test_padded_targets_and_behaviours_do_not_count_as_load(name: str) -> None:
    model = random_model(CONFIGS[name]).train()
    context = random_context(model.config)
    model(context, torch.tensor([[[1, 2, 3], [-1, -1, -1]]]).expand(3, -1, -1))
    decoder = [
        block.ffn.load.sum() for block in model.blocks if isinstance(block.ffn, MoE) and block.ffn.load is not None
    ]
    assert decoder
    assert all(load == 3 * 3 * 2 for load in decoder)  # requests x (BOS, s1, s2) x active experts
    if name == "v1-moe":
        recent = int((context.mask & (context.kind != 2)).sum())
        queries = 5 * int(context.mask[:, context.kind == 2].any(1).sum())
        encoder = [block.ffn.load.sum() for block in model.context.blocks]  # type: ignore[union-attr]
        assert all(load == 2 * (3 + recent + queries) for load in encoder)


def test_v1_has_the_published_token_count_and_sums_its_levels() -> None:
    config = preset("v1-0.121b", 8192)
    assert isinstance(config, V1Config)
    assert config.tokens == 405
    model = random_model(CONFIGS["v1"])
    logits, targets = torch.randn(2, 1, 3, 7), torch.randint(0, 7, (2, 1, 3))
    total = ntp_loss(logits, targets, torch.ones(2, 1), model.level_loss)
    torch.testing.assert_close(total, 3 * ntp_loss(logits, targets, torch.ones(2, 1)))


@torch.no_grad()
def test_v1_counts_positions_from_the_newest() -> None:
    """A pathway of a shorter batch is read like the end of a longer one."""
    model = random_model(CONFIGS["v1"])
    place = model.context._places(random_context(model.config))  # type: ignore[operator]
    assert place.tolist() == [*range(1, 5), *range(5, 11), *range(11, 19)]
    short = model.context._places(replace(random_context(model.config), kind=torch.tensor([0, 1, 1])))  # type: ignore[operator]
    assert short.tolist() == [4, 9, 10]


@torch.no_grad()
def test_sessions_are_scored_alone_and_see_only_earlier_items() -> None:
    model = random_model(CONFIGS["session"])
    assert isinstance(model, OneRecSession)
    kv = model.encode(random_context(model.config))
    sessions = torch.randint(0, 7, (3, 4, 3, 3), generator=torch.Generator().manual_seed(2))
    scored = model.score_sessions(kv, sessions)
    for t in range(4):
        torch.testing.assert_close(scored[:, t], model.score(kv, sessions[:, t]), atol=2e-5, rtol=1e-4)
    changed = sessions.clone()
    changed[:, :, 1, 1] = (changed[:, :, 1, 1] + 1) % 7
    moved = (model.score_sessions(kv, changed) != scored).any(-1).flatten(0, 1).any(0)
    assert moved.tolist() == [[False] * 3, [False, False, True], [True] * 3]
    with pytest.raises(ValueError, match="sessions of 4 items"):
        model.score(kv, torch.zeros(3, 4, 3, dtype=torch.long))


@torch.no_grad()
def test_a_full_session_takes_no_further_code() -> None:
    model = random_model(CONFIGS["session"])
    kv = model.encode(random_context(model.config))
    logits, state = model.step(kv, None, None)
    for _ in range(8):
        logits, state = model.step(kv, logits.argmax(-1), state)
    with pytest.raises(ValueError, match="has its 3 items"):
        model.step(kv, logits.argmax(-1), state)


@torch.no_grad()
def test_naive_equals_one_causal_sequence() -> None:
    """Context then BOS s1 s2 through the blocks at once, without a cache, one request and target at a time."""
    model = random_model(replace(CONFIGS["naive"], recency_bias=False))
    context = random_context(model.config)
    targets = random_targets(model)
    logits = model(context, targets)
    order = [s for kind in (2, 1, 0) for s in range(len(context.kind)) if context.kind[s] == kind]
    for b in range(3):
        slots = torch.tensor([s for s in order if context.mask[b, s]], dtype=torch.long)
        part, rows = model.context, torch.full((len(slots),), b)
        static = part.static(model.features.static(context)[b : b + 1])  # type: ignore[operator]
        tokens = torch.cat([static, part.behaviour(model.features(context, rows, slots))])  # type: ignore[operator]
        for t in range(2):
            own = torch.stack([model.bos, *(model.token[i](targets[b, t, i]) for i in range(2))])
            x = torch.cat([tokens, own])[None]
            for block in model.blocks:
                h = block.self_norm(x)
                q = block.attention.query(h).unflatten(2, (4, 4)).transpose(1, 2)
                k, v = (p.transpose(1, 2).repeat_interleave(2, 1) for p in block.attention.project(h))
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + block.attention.output(mixed.transpose(1, 2).flatten(2))
                x = x + block.ffn(block.ffn_norm(x))
            for level in range(3):
                expected = model._logits(x[:, len(tokens) + level], level)[0]
                torch.testing.assert_close(logits[b, t, level], expected, atol=2e-5, rtol=1e-4)


LEARNERS: dict[str, GeneratorConfig] = {
    "v1": V1Config(**{**V1, "codes": 8, "d_model": 32, "embed": 16, "ffn": 64, "queries": 0}, recency_bias=True),
    "naive": NaiveConfig(**{**SIZES, "codes": 8, "d_model": 32, "embed": 16}),
    "v2-moe": V2Config(
        **{**SIZES, "codes": 8, "d_model": 32, "embed": 16},
        experts=4,
        active_experts=2,
        expert_width=64,
        dense_blocks=1,
    ),
}


@pytest.mark.parametrize("name", ["v1", *(pytest.param(name, marks=pytest.mark.long) for name in ("naive", "v2-moe"))])
def test_training_finds_the_item_a_history_points_to(name: str) -> None:
    """Target = the SID of the youngest behaviour: solvable only by telling items apart and preferring recent ones."""
    config = LEARNERS[name]
    torch.manual_seed(0)
    model = model_of(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(120):
        context = random_context(config, requests=48, seed=step)
        newest = context.numeric[..., 0].masked_fill(~context.mask, torch.inf).argmin(1)
        targets = (context.sids[torch.arange(48), newest][:, None] - 1).clamp(min=0)
        loss = ntp_loss(model(context, targets), targets, context.mask.any(1)[:, None].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        balance(model)
        losses.append(loss.item())
    assert losses[0] > 1.9  # ln 8 = 2.08
    assert sum(losses[-10:]) / 10 < 1.5
