from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drawn import behaviours, shaken

from models.objectives.ntp import ntp_loss
from models.onerec_v2 import OneRecV2, V2Config
from models.pathways import ContextTensors
from models.sizes import preset

VARIANTS = [
    {},
    {"l_kv": 3, "s_kv": 2},
    {"processor": "direct"},
    {"l_kv": 2, "kv_groups": 4},
    {"recency_bias": False, "head": "tied"},
]


def build_model(**overrides: Any) -> OneRecV2:
    """A few thousand weights."""
    torch.manual_seed(0)
    sizes = {"codes": 7, "d_model": 16, "layers": 3, "heads": 4, "kv_groups": 2, "embed": 8}
    return shaken(OneRecV2(V2Config(**{**sizes, **overrides})))


def build_context(
    model: OneRecV2, requests: int = 3, length: int = 12, share: float = 0.6, seed: int = 0
) -> ContextTensors:
    """Random behaviours of the model's vocabulary; a slot is filled with probability ``share``."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand((requests, length), generator=draw) < share
    return behaviours(model.config, torch.arange(length) * 3 // length, mask, draw)


def plain_logits(model: OneRecV2, context: ContextTensors, request: int, sid: torch.Tensor) -> torch.Tensor:
    """[L, C] for one request and one target: whole prefix, no cache, no packing, one head at a time."""
    c, p = model.config, model.context
    slots = [s for s in range(context.mask.shape[1]) if context.mask[request, s]]
    f = p.features
    tokens = [p.static(f.attribute(context.static[request]).flatten())]
    for s in slots:
        parts = [table(context.sids[request, s, level]) for level, table in enumerate(f.code)]
        parts += [f.author(context.author[request, s]), f.tag(context.tag[request, s]), f.kind(context.kind[s])]
        parts += [f.number(context.numeric[request, s]), context.labels[request, s]]
        tokens.append(p.behaviour(torch.cat(parts)))
    x = torch.stack(tokens)
    x = x + p.mix(p.norm(x)) if p.mix is not None else p.norm(x)
    rows = p.split(x).split(c.kv_groups * c.d_head, -1)
    age = torch.cat([torch.zeros(1), context.numeric[request, slots, 0]])
    h = torch.stack([model.bos, *(model.token[i](sid[i]) for i in range(c.levels - 1))])
    for layer, block in enumerate(model.blocks):
        row = (layer * c.l_kv // c.layers) * c.s_kv
        keys = p.row_norms[row](rows[row].view(-1, c.kv_groups, c.d_head))
        values = p.row_norms[row + c.s_kv - 1](rows[row + c.s_kv - 1].view(-1, c.kv_groups, c.d_head))
        query = block.cross.query(block.cross_norm(h)).view(-1, c.heads, c.d_head)
        heads = []
        for head in range(c.heads):
            group = head // (c.heads // c.kv_groups)
            scores = query[:, head] @ keys[:, group].T * c.d_head**-0.5
            if block.cross.slope is not None:
                scores = scores + block.cross.slope[head] * age
            heads.append(scores.softmax(-1) @ values[:, group])
        h = h + block.cross.output(torch.cat(heads, -1))
        q, k, v = block.attention.qkv(block.self_norm(h)).view(c.levels, 3, c.heads, c.d_head).permute(1, 2, 0, 3)
        inner = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + block.attention.output(inner.transpose(0, 1).flatten(1))
        h = h + block.ffn(block.ffn_norm(h))
    out = [head(norm(h[i])) for i, (head, norm) in enumerate(zip(model.heads, model.head_norms, strict=True))]
    if c.head == "tied":
        out = [row @ f.code[i].weight[1:].T for i, row in enumerate(out)]
    return torch.stack(out)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_the_plain_reference(variant: dict[str, Any]) -> None:
    model = build_model(**variant)
    context = build_context(model)
    targets = torch.randint(0, 7, (3, 2, 3), generator=torch.Generator().manual_seed(1))
    logits = model(context, targets)
    assert logits.shape == (3, 2, 3, 7)
    for b in range(3):
        for t in range(2):
            expected = plain_logits(model, context, b, targets[b, t])
            torch.testing.assert_close(logits[b, t], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_targets_together_equal_one_at_a_time_and_decode() -> None:
    model = build_model()
    context = build_context(model)
    targets = torch.randint(0, 7, (3, 5, 3), generator=torch.Generator().manual_seed(2))
    together = model(context, targets)
    for t in range(5):
        torch.testing.assert_close(together[:, t : t + 1], model(context, targets[:, t : t + 1]), atol=1e-5, rtol=1e-4)
    kv = model.encode(context)
    for level in range(3):
        torch.testing.assert_close(model.decode(kv, targets[:, :, :level]), together[:, :, level], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_and_neighbours_in_the_batch_change_nothing() -> None:
    model = build_model(s_kv=2)
    context = build_context(model)
    targets = torch.zeros(3, 1, 3, dtype=torch.long)
    expected = model(context, targets)
    padded = {
        name: F.pad(getattr(context, name), (0, 0) * (getattr(context, name).ndim - 2) + (4, 3))
        for name in ("sids", "author", "tag", "numeric", "labels", "mask")
    }
    wide = replace(context, kind=F.pad(context.kind, (4, 3)), **padded)
    torch.testing.assert_close(model(wide, targets), expected, atol=1e-5, rtol=1e-4)
    fields = ("static", "sids", "author", "tag", "numeric", "labels", "mask")
    alone = replace(context, **{name: getattr(context, name)[1:2] for name in fields})
    torch.testing.assert_close(model(alone, targets[:1]), expected[1:2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_empty_history_is_served_from_the_static_token() -> None:
    model = build_model()
    context = build_context(model, share=0.0)
    assert torch.isfinite(model(context, torch.zeros(3, 1, 3, dtype=torch.long))).all()


def test_every_weight_learns_and_bf16_agrees() -> None:
    model = build_model(l_kv=3, s_kv=2)
    context = build_context(model)
    targets = torch.randint(0, 7, (3, 4, 3), generator=torch.Generator().manual_seed(3))
    exact = model(context, targets)
    ntp_loss(exact, targets, torch.ones(3, 4)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(context, targets)
    assert rough.dtype == torch.float32
    assert (rough.softmax(-1) - exact.softmax(-1)).abs().mean() < 0.02


def test_training_finds_the_item_a_history_points_to() -> None:
    """Target = the SID of the youngest behaviour: solvable only by reading the context and preferring recent items."""
    torch.manual_seed(0)
    model = OneRecV2(V2Config(codes=8, d_model=32, layers=2, heads=4, embed=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(150):
        context = build_context(model, requests=64, length=6, share=1.0, seed=step)
        newest = context.numeric[..., 0].argmin(1)
        targets = context.sids[torch.arange(64), newest][:, None] - 1
        loss = ntp_loss(model(context, targets), targets, torch.ones(64, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.9  # ln 8 = 2.08
    assert sum(losses[-10:]) / 10 < 1.0


def test_lazy_decoder_size_and_presets() -> None:
    model = OneRecV2(preset("small", 256))
    decoder = sum(p.numel() for p in model.blocks.parameters())
    assert decoder / (18 * 512**2 * 4) == pytest.approx(1, abs=0.01)  # params ~ 18 d^2 layers
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(20e6, rel=0.15)
    with pytest.raises(ValueError, match="unknown preset 'huge'; the presets are tiny, small"):
        preset("huge", 256)


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"kv_groups": 3}, {"l_kv": 4}, {"s_kv": 3}, {"codes": 0}])
def test_impossible_sizes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        V2Config(**wrong)
