"""Where the compute goes: FLOPs, parameters and saved activations of every published size, counted, never run.

Models stand on the meta device; torch's own counter sees every matrix product of a forward and a backward pass, and
hooks see every tensor kept for the backward pass. OneRec-V2 (arXiv 2508.20900) Tables 1, 2 and 5 and its KV tables
stand beside. Per target item, five items sharing a request's context, three levels of 8192 codes.

Three counts, because the paper's tables leave things out without saying so:
  all       everything, three tokens per item (BOS, s1, s2), the context shared by five
  paper     ``all`` without attention scores over the context, and of the context's own work only the lazy model's KV
            split, or the layers of the encoder or decoder: not the features, not the decoder's keys and values of the
            encoder's output. Their GQA and KV sharing rows show that the split is in; with the rest, the
            encoder-decoders would be 15 to 32 % high (the lazy rows would still be within 6 %). Every level's head is
            counted at every one of the three positions, as 6 N per token does when N holds the heads. That is our
            guess, made for the lazy 0.1B row, which is 12.9 % low with the one head that a position needs; that count
            (``one_head``) is the nearer one at 0.5B and 1B. ``without_context`` is ``paper`` without the KV split too
  as run    our implementation: BOS, which does not depend on the item, once per request

Left out: optimizer, element-wise operations, embedding look-ups (the counter counts products only).
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import finish, table
from models.architectures import model_of
from models.generator import Generator, GeneratorConfig
from models.naive import NaiveConfig
from models.nn.moe import MoE
from models.onerec_v1 import V1Config
from models.onerec_v2 import V2Config
from models.pathways import NUMERIC, PATHWAYS, ContextTensors
from models.sizes import V1_SIZES, V2_SIZES, preset

CODES = 8192
ITEMS = 5
"""Target items that share a request's context, in the paper."""
BATCH = 512
"""Target items of the paper's activation figures."""
TABLE_2 = {
    "lazy": {"0.1b": 1.98, "0.5b": 9.55, "1b": 18.89},
    "enc:dec 1:1": {"0.1b": 25.64, "0.5b": 142.73, "1b": 296.36},
    "enc:dec 1:2": {"0.1b": 17.72, "0.5b": 104.73, "1b": 204.21},
    "naive": {"0.1b": 63.78, "0.5b": 317.68, "1b": 634.83},
}
ACTIVATIONS = {
    "lazy": {"0.1b": 0.31, "0.5b": 0.77, "1b": 1.24},
    "enc:dec 1:1": {"0.1b": 4.21, "0.5b": 10.79, "1b": 17.63},
    "enc:dec 1:2": {"0.1b": 2.92, "0.5b": 7.94, "1b": 12.20},
    "naive": {"0.1b": 7.52, "0.5b": 19.28, "1b": 31.53},
}
"""Billions of values kept for the backward pass at a batch of 512 items."""
KV_SHARING = {(1, 1): 18.89, (1, 2): 19.19, (3, 1): 19.49, (9, 1): 21.27, (18, 1): 23.95}
KV_GROUPS = {14: 18.89, 7: 18.74, 2: 18.64, 1: 18.62}
LAYERS = {
    "enc:dec 1:1": {"0.1b": (6, 6), "0.5b": (7, 7), "1b": (9, 9)},
    "enc:dec 1:2": {"0.1b": (4, 8), "0.5b": (5, 9), "1b": (6, 12)},
    "naive": {"0.1b": (0, 14), "0.5b": (0, 16), "1b": (0, 20)},
}
"""Encoder and decoder layers, ours, at V2's widths: total parameters as near the lazy model's as whole layers come."""


@dataclass(frozen=True)
class Count:
    """GFLOPs of one training step per target item."""

    all: float
    paper: float
    one_head: float
    """``paper`` with the one head a position needs."""
    without_context: float
    """``paper`` without the context's own work: the lazy model's KV split, or the layers of the encoder or decoder."""
    run: float


def config_for(kind: str, size: str, context: int) -> GeneratorConfig:
    """The model of a row: the published lazy size, or a rival of its widths, layers as in ``LAYERS``."""
    lazy = preset(f"v2-{size}", CODES)
    assert isinstance(lazy, V2Config)
    if kind == "lazy":
        return lazy
    encoder, decoder = LAYERS[kind][size]
    shared: dict[str, Any] = {
        "codes": CODES,
        "d_model": lazy.d_model,
        "heads": lazy.heads,
        "kv_groups": lazy.heads,
        "embed": lazy.embed,
        "recency_bias": False,
    }
    if kind == "naive":
        return NaiveConfig(layers=decoder, **shared)
    side = lazy.embed // 2
    return V1Config(
        encoder_layers=encoder,
        decoder_layers=decoder,
        ffn=4 * lazy.d_model,
        lifelong=context,
        queries=0,
        static_width=side,
        author_width=side,
        field_width=side,
        **shared,
    )


def on_meta(config: GeneratorConfig) -> Generator:
    """The model without memory."""
    with torch.device("meta"):
        return model_of(config)


def context_of(config: GeneratorConfig, tokens: int) -> ContextTensors:
    """One request's full context of ``tokens``, the static one included."""
    slots = (1, tokens - 1)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def longs(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=torch.long)

    return ContextTensors(
        static=longs(1, config.static_fields),
        sids=longs(*slots, config.levels),
        author=longs(*slots),
        tag=longs(*slots),
        numeric=floats(*slots, len(NUMERIC)),
        labels=floats(*slots, 9),
        kind=torch.full((tokens - 1,), PATHWAYS.index("lifelong"), device="meta"),
        mask=torch.empty(slots, device="meta", dtype=torch.bool),
    )


def counted(work: Callable[[], Tensor]) -> float:
    """GFLOPs of a forward and a backward pass, as torch's counter sees them."""
    counter = FlopCounterMode(display=False)
    with counter:
        work().backward()
    return counter.get_total_flops() / 1e9


@cache
def encoding(config: GeneratorConfig, tokens: int) -> float:
    """The context of one request alone."""
    model = on_meta(config)

    def work() -> Tensor:
        kv = model.encode(context_of(config, tokens))
        return torch.stack([part.sum() for part in (*kv.keys, *kv.values)]).sum()

    return counted(work)


@cache
def training(config: GeneratorConfig, tokens: int, items: int) -> float:
    """One request with its target items."""
    model = on_meta(config)
    codes = torch.empty(1, items, config.levels, device="meta", dtype=torch.long)
    return counted(lambda: model(context_of(config, tokens), codes).sum())


def count(config: GeneratorConfig, tokens: int) -> Count:
    """The three counts of one model; what the paper leaves out is found by counting again with other sizes."""
    target, longer = (training(config, n, 1) - encoding(config, n) for n in (tokens, 2 * tokens))
    without_scores = 2 * target - longer  # the scores of three tokens grow linearly with the context
    context = published_context(config, tokens) / ITEMS
    one_head = without_scores + context
    paper = one_head + other_heads(config)
    return Count(
        all=target + encoding(config, tokens) / ITEMS,
        paper=paper,
        one_head=one_head,
        without_context=paper - context,
        run=training(config, tokens, ITEMS) / ITEMS,
    )


@cache
def other_heads(config: GeneratorConfig) -> float:
    """Each level's head at the positions of the other levels, for one item."""
    heads = on_meta(config).heads
    h = torch.empty(1, config.levels - 1, config.d_model, device="meta", requires_grad=True)
    return counted(lambda: torch.stack([head(h).sum() for head in heads]).sum())


def published_context(config: GeneratorConfig, tokens: int) -> float:
    """What the paper's figures count of the context: the KV split, the encoder's layers, or the decoder's."""
    if isinstance(config, V2Config):
        other = replace(config, l_kv=config.l_kv + (1 if config.l_kv < config.layers else -1))
        return config.l_kv * abs(encoding(other, tokens) - encoding(config, tokens))
    if isinstance(config, V1Config):
        twice = replace(config, encoder_layers=2 * config.encoder_layers)
        once, longer = (encoding(twice, n) - encoding(config, n) for n in (tokens, 2 * tokens))
    else:
        once, longer = (encoding(config, n) for n in (tokens, 2 * tokens))
    return 2 * once - longer / 2  # once = a N + b N^2, of which the scores are b N^2


def saved_values(config: GeneratorConfig, tokens: int) -> float:
    """Values kept for the backward pass for ``BATCH`` items, each storage once, without the weights."""
    model = on_meta(config)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        codes = torch.empty(1, ITEMS, config.levels, device="meta", dtype=torch.long)
        out = model(context_of(config, tokens), codes)
    values = sum(t.untyped_storage().nbytes() / t.element_size() for key, t in kept.items() if key not in weights)
    del out
    return values * BATCH / ITEMS


def parameters(model: nn.Module) -> dict[str, int]:
    """All parameters; those outside embeddings and heads; those of them that a token uses."""
    every = sum(p.numel() for p in model.parameters())
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    heads = sum(p.numel() for p in model.get_submodule("heads").parameters())
    body = every - embeddings - heads
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoE):
            experts = layer.input.shape[0]
            idle += (layer.input.numel() + layer.output.numel()) * (experts - layer.active) // experts
    return {"all": every, "body": body, "active": body - idle}


def size_rows() -> Iterable[dict[str, Any]]:
    """Parameters of every published size against its name."""
    for name in V2_SIZES:
        found = parameters(on_meta(preset(name, CODES)))
        nominal = float(name.removeprefix("v2-").removesuffix("b"))
        yield {"row": name, "table": "size", "nominal": nominal, **_billions(found), "of": "body"}
    found = parameters(on_meta(preset("v2-moe-4b", CODES)))
    yield {"row": "v2-moe-4b", "table": "size", "nominal": 4.07, **_billions(found), "of": "body"}
    yield {"row": "v2-moe-4b active", "table": "size", "nominal": 0.5, **_billions(found), "of": "active"}
    for name in V1_SIZES:
        found = parameters(on_meta(preset(name, CODES)))
        nominal = float(name.removeprefix("v1-").removesuffix("b"))
        yield {"row": name, "table": "size", "nominal": nominal, **_billions(found), "of": "body"}


def _billions(found: dict[str, int]) -> dict[str, float]:
    return {name: value / 1e9 for name, value in found.items()}


def flops_rows(tokens: int, quick: bool) -> Iterable[dict[str, Any]]:
    """Table 2: every architecture at three sizes."""
    for kind, sizes in TABLE_2.items():
        for size, paper in sizes.items():
            if quick and size == "0.5b":
                continue
            config = config_for(kind, size, tokens)
            yield _flops_row(f"{kind} {size}", "flops", count(config, tokens), paper) | {
                "layers": getattr(config, "layers", None) or (config.encoder_layers, config.decoder_layers),  # type: ignore[attr-defined]
                "activations": saved_values(config, tokens) / 1e9,
                "paper_activations": ACTIVATIONS[kind][size],
            }


def kv_rows(tokens: int) -> Iterable[dict[str, Any]]:
    """KV sharing and grouping at 1B."""
    base = preset("v2-1b", CODES)
    assert isinstance(base, V2Config)
    for (l_kv, s_kv), paper in KV_SHARING.items():
        config = replace(base, l_kv=l_kv, s_kv=s_kv)
        yield _flops_row(f"L_kv {l_kv} S_kv {s_kv}", "kv", count(config, tokens), paper)
    for groups, paper in KV_GROUPS.items():
        yield _flops_row(f"G_kv {groups}", "kv", count(replace(base, kv_groups=groups), tokens), paper)


def _flops_row(name: str, kind: str, found: Count, paper: float) -> dict[str, Any]:
    error = found.paper / paper - 1
    return {
        "row": name,
        "table": kind,
        "ours": found.paper,
        "paper": paper,
        "error": error,
        "one_head": found.one_head,
        "error_one_head": found.one_head / paper - 1,
        "without_context": found.without_context,
        "error_without_context": found.without_context / paper - 1,
        "all": found.all,
        "error_all": found.all / paper - 1,
        "as_run": found.run,
    }


def growth_rows() -> Iterable[dict[str, Any]]:
    """Table 1: the context grows from 512 to 3000 tokens, at 1B, everything counted."""
    paper = {"lazy": (18, 18), "enc:dec 1:1": (346, 1988), "naive": (632, 3618)}
    for kind, (short, long) in paper.items():
        ours = [count(config_for(kind, "1b", tokens), tokens).all for tokens in (512, 3000)]
        yield {
            "row": f"{kind} 1b",
            "table": "growth",
            "at_512": ours[0],
            "at_3000": ours[1],
            "growth": ours[1] / ours[0],
            "paper_growth": long / short,
        }


def show(rows: list[dict[str, Any]]) -> None:
    """Ours beside the paper's."""
    sizes = [r for r in rows if r["table"] == "size"]
    table(
        "Parameters, billions, without embeddings and heads",
        ["model", "nominal", "ours", "error", "active", "with embeddings and heads"],
        [(r["row"], r["nominal"], r["body"], _percent(r["error"]), r["active"], r["all"]) for r in sizes],
    )
    columns = ["model", "paper", "ours, counted alike", "error", "one head", "error", "all counted", "error", "as run"]
    for kind, title in (("flops", "GFLOPs per target item, context 512"), ("kv", "GFLOPs per target item, lazy 1B")):
        found = [r for r in rows if r["table"] == kind]
        table(
            title,
            columns,
            [
                (
                    *(r["row"], r["paper"], r["ours"], _percent(r["error"])),
                    *(r["one_head"], _percent(r["error_one_head"]), r["all"], _percent(r["error_all"]), r["as_run"]),
                )
                for r in found
            ],
        )
    found = [r for r in rows if r["table"] == "flops"]
    table(
        f"Values kept for the backward pass, billions, {BATCH} items",
        ["model", "paper", "ours"],
        [(r["row"], r["paper_activations"], r["activations"]) for r in found],
    )
    table(
        "Context 512 to 3000 tokens, everything counted",
        ["model", "GFLOPs at 512", "at 3000", "growth", "paper"],
        [(r["row"], r["at_512"], r["at_3000"], r["growth"], r["paper_growth"]) for r in rows if r["table"] == "growth"],
    )


def _percent(error: float) -> str:
    return f"{100 * error:+.1f} %"


def main(quick: bool = False) -> None:
    """Counts everything; ``--quick`` leaves out the middle size of Table 2."""
    rows = [{**row, "error": row[row["of"]] / row["nominal"] - 1} for row in size_rows()]
    for part in (flops_rows(512, quick), kv_rows(512), growth_rows()):
        for row in part:
            print(f"counted {row['row']}", file=sys.stderr)
            rows.append(row)
    show(rows)
    flops = {row["row"]: row for row in rows if row["table"] == "flops"}
    lazy = [row for name, row in flops.items() if name.startswith("lazy")]
    growth = {row["row"]: row["growth"] for row in rows if row["table"] == "growth"}
    record = {
        "rows": rows,
        "worst_lazy_error": max(abs(row["error"]) for row in lazy),
        "worst_lazy_error_from_0.5b": max(abs(row["error"]) for row in lazy if row["row"] != "lazy 0.1b"),
        "worst_lazy_error_one_head": max(abs(row["error_one_head"]) for row in lazy),
        "worst_lazy_error_without_context": max(abs(row["error_without_context"]) for row in lazy),
        "worst_lazy_error_all_counted": max(abs(row["error_all"]) for row in lazy),
        "worst_encdec_error": max(abs(row["error"]) for name, row in flops.items() if name.startswith("enc")),
        "worst_kv_error": max(abs(row["error"]) for row in rows if row["table"] == "kv"),
        "encdec_over_lazy_1b": flops["enc:dec 1:1 1b"]["ours"] / flops["lazy 1b"]["ours"],
        "encdec_over_lazy_activations_1b": flops["enc:dec 1:1 1b"]["activations"] / flops["lazy 1b"]["activations"],
        "growth_lazy": growth["lazy 1b"],
        "growth_encdec": growth["enc:dec 1:1 1b"],
        "quick": quick,
    }
    finish(record)


if __name__ == "__main__":
    typer.run(main)
