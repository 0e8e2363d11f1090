"""Decoding: is the trie-constrained beam search exact, legal, fast, and does its cost depend on the catalogue?

``python -m benchmarks.decoding [--quick]``. The rival is transformers' ``generate`` on a T5 with as many parameters
(``benchmarks.t5``), with its usual per-beam callback and with a vectorised constraint; it runs in fp32 and bf16 and its
better time counts. Rivals take turns, and each is judged by its least disturbed turn. Random weights: quality is not
measured here.
"""

import itertools
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import t5
from benchmarks.harness import alternate, finish, matmul_peak, seconds, table
from benchmarks.random_catalogue import CODES, LENGTHS, LEVELS, random_sids
from models.architectures import model_of
from models.decoding.beam import Beams, beam_search, continuations
from models.decoding.filter import LeafFilter, blocked_leaves
from models.decoding.precision import for_serving
from models.decoding.trie import Children, Trie
from models.generator import ContextKV, Generator
from models.pathways import NUMERIC, PATHWAYS, ContextTensors
from models.sizes import preset

SHORT = (20, 24, 20)
SEEN = 256
"""Items filtered for every request."""


def random_context(requests: int, model: Generator, lengths: tuple[int, ...] = LENGTHS) -> ContextTensors:
    """Behaviours of every request, so many of each pathway."""
    draw = torch.Generator().manual_seed(0)
    c, shape = model.config, (requests, sum(lengths))

    def integers(high: int, *more: int) -> torch.Tensor:
        return torch.randint(1, high, (*shape, *more), generator=draw)

    return ContextTensors(
        static=torch.randint(0, c.static_buckets, (requests, c.static_fields), generator=draw),
        sids=integers(c.codes, c.levels),
        author=integers(c.author_buckets),
        tag=integers(c.tag_buckets),
        numeric=torch.randn(*shape, len(NUMERIC), generator=draw),
        labels=(torch.rand(*shape, 9, generator=draw) < 0.1).float(),
        kind=torch.repeat_interleave(torch.arange(len(PATHWAYS)), torch.tensor(lengths)),
        mask=torch.ones(shape, dtype=torch.bool),
    )


class Bench:
    """One model, ready to serve in bf16, and what is asked of it."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.exact = model_of(preset(name, CODES, LEVELS)).eval()
        with torch.no_grad():
            for weight in self.exact.heads.parameters():
                weight.mul_(8)  # codes as unlike in probability as in a trained model
        self.model = for_serving(self.exact)

    def run(self, context: ContextTensors, trie: Trie | None, width: int, allowed: LeafFilter | None = None) -> Beams:
        """A whole request: context and search."""
        return self.search(self.encoded(context), trie, width, allowed)

    def encoded(self, context: ContextTensors) -> ContextKV:
        """The context alone."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return self.model.encode(context)

    def search(self, kv: ContextKV, trie: Trie | None, width: int, allowed: LeafFilter | None = None) -> Beams:
        """The search alone."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return beam_search(self.model, kv, trie, width, allowed)


@torch.inference_mode()
def exactness(bench: Bench, items: int, width: int) -> dict[str, float]:
    """Against scoring every item of the catalogue by teacher forcing in fp32."""
    trie = Trie.from_sids(random_sids(items))
    kv = bench.exact.encode(random_context(2, bench.exact))
    scores = []
    for part in trie.sids.split(512):
        targets = part.expand(2, -1, -1)
        log_probs = bench.exact.score(kv, targets).log_softmax(-1)
        scores.append(log_probs.gather(-1, targets[..., None]).squeeze(-1))
    every = torch.cat(scores, 1)
    best = every.sum(-1).topk(10).indices
    whole = beam_search(bench.exact, kv, trie, items)
    narrow = beam_search(bench.exact, kv, trie, width)
    same = every.gather(1, whole.leaf[..., None].expand(-1, -1, LEVELS))
    ordered = every.sum(-1).sort(descending=True).values
    found = (best[..., None] == narrow.leaf[:, None]).any(-1)
    return {
        "brute_force_max_score_error": float((whole.scores - ordered).abs().max()),
        "teacher_forcing_max_log_prob_error": float((whole.log_probs - same).abs().max()),
        "equals_brute_force": bool((whole.scores - ordered).abs().max() < 1e-3 and whole.valid.all()),
        "narrow_beam_finds_of_true_top10": float(found.float().mean()),
    }


def filters(trie: Trie, requests: int, seed: int = 0) -> LeafFilter:
    """``SEEN`` items of each request, filtered as serving does it."""
    item = np.random.default_rng(seed).integers(0, len(trie.leaf_of_item), requests * SEEN)
    request = np.repeat(np.arange(requests), SEEN)
    blocked = blocked_leaves(trie.leaf_of_item.numpy(), trie.leaves, request, item, requests)
    return LeafFilter.blocking(trie, torch.from_numpy(blocked))


def mask_share(bench: Bench, trie: Trie, width: int, repeats: int) -> float:
    """Median share of the search spent on the constraint: children, the filter, masking the scores."""
    kv, allowed = bench.encoded(random_context(1, bench.model)), filters(trie, 1)
    shares = []
    for _ in range(repeats):
        spent = 0.0

        def timed(*arguments: Any) -> Children:
            nonlocal spent
            start = time.perf_counter()
            children = continuations(*arguments)
            torch.zeros(children.exists.shape).masked_fill_(~children.exists, -torch.inf)
            spent += time.perf_counter() - start
            return children

        with mock.patch("models.decoding.beam.continuations", timed):
            whole = seconds(lambda: bench.search(kv, trie, width, allowed))
        shares.append(spent / whole)
    return float(np.median(shares))


def catalogue_growth(bench: Bench, sizes: list[int], width: int, repeats: int) -> dict[str, Any]:
    """A whole filtered request on catalogues of several sizes, taking turns."""
    context = random_context(1, bench.model)
    tries = [Trie.from_sids(random_sids(size)) for size in sizes]

    def request(trie: Trie) -> Callable[[], object]:
        return lambda: bench.run(context, trie, width, filters(trie, 1))

    times = alternate([request(trie) for trie in tries], repeats + 1)[1:].min(0)
    rows = [
        {"items": size, "ms": 1e3 * t, "children": [trie.slots(level, width) for level in range(LEVELS)]}
        for size, trie, t in zip(sizes, tries, times, strict=True)
    ]
    table(
        "cost against the catalogue",
        ["items", "ms a request", "children scored"],
        [(row["items"], row["ms"], str(row["children"])) for row in rows],
    )
    return {"catalogue": rows, "catalogue_growth": float(times[-1] / times[0])}


def widths(benches: dict[str, Bench], trie: Trie, beams: list[int], batches: list[int], repeats: int) -> dict[str, Any]:
    """p50 of a request by architecture, beam width and requests in a batch, with the share of the matmul peak."""
    peak, rows, illegal = matmul_peak(), [], 0
    for name, width, batch in itertools.product(benches, beams, batches):
        row, wrong = one_width(benches[name], trie, width, batch, repeats)
        rows.append(
            {"model": name, **row, "share_of_bf16_peak": row["gflop_per_request"] / row["p50_ms"] * 1e12 / peak}
        )
        illegal += wrong
        print(rows[-1], file=sys.stderr)
    table("a request: context and search", list(rows[0]), [tuple(row.values()) for row in rows])
    return {"requests": rows, "illegal": illegal, "bf16_peak_gflops": peak / 1e9}


def one_width(bench: Bench, trie: Trie, width: int, batch: int, repeats: int) -> tuple[dict[str, Any], int]:
    """Time and FLOPs of a request, and how many of its beams are padding or name no item of the catalogue."""
    context, allowed = random_context(batch, bench.model), filters(trie, batch)
    found = bench.run(context, trie, width, allowed)
    illegal = int((~found.valid | (trie.locate(found.sids) < 0)).sum())
    with FlopCounterMode(display=False) as counter:
        bench.run(context, trie, width, allowed)
    times = alternate([lambda: bench.run(context, trie, width, allowed)], repeats) / batch
    return {
        "beam": width,
        "batch": batch,
        "p50_ms": 1e3 * float(np.median(times)),
        "gflop_per_request": counter.get_total_flops() / batch / 1e9,
    }, illegal


def rivals(
    benches: dict[str, Bench], items: int, width: int, repeats: int, lengths: tuple[int, ...] = LENGTHS
) -> dict[str, Any]:
    """The same request answered by transformers' ``generate``; all take turns."""
    sids = random_sids(items)
    trie = Trie.from_sids(sids)
    config = benches["v2"].exact.config
    model = t5.build(CODES, LEVELS, config.d_model, config.heads, 4)
    history = torch.randint(1, model.config.vocab_size, (1, sum(lengths)))
    callback, vectorised = t5.prefix_callback(sids, CODES), t5.TrieProcessor(trie, CODES)
    works: dict[str, Callable[[], object]] = {}
    for name, bench in benches.items():
        context = random_context(1, bench.model, lengths)
        works[name] = lambda b=bench, c=context: b.run(c, trie, width)  # type: ignore[misc]
    half = t5.build(CODES, LEVELS, config.d_model, config.heads, 4).to(torch.bfloat16)
    for precision, rival in (("fp32", model), ("bf16", half)):
        for constraint, how in (("callback", callback), ("vectorised", vectorised)):
            works[f"t5 {precision} {constraint}"] = lambda r=rival, h=how: t5.recommend(r, history, trie, width, h)  # type: ignore[misc]
    found = t5.recommend(model, history, trie, width, vectorised)
    legal = float((trie.locate(found) >= 0).float().mean())
    times = dict(zip(works, alternate(list(works.values()), repeats + 1)[1:].min(0), strict=True))
    table(
        f"beam {width}, {items} items, context {sum(lengths)}",
        ["", "ms", "times ours"],
        [(name, 1e3 * t, t / times["v2"]) for name, t in times.items()],
    )

    def best(constraint: str) -> float:
        return float(min(times[f"t5 {precision} {constraint}"] for precision in ("fp32", "bf16")))

    blocks = sum(p.numel() for p in benches["v2"].exact.blocks.parameters())
    return {
        "rivals_ms": {name: 1e3 * t for name, t in times.items()},
        "t5_parameters": t5.parameters(model),
        "v2_parameters": blocks,
        "t5_legal_share": legal,
        "speedup_vs_hf": best("callback") / times["v2"],
        "speedup_vs_hf_vectorised": best("vectorised") / times["v2"],
        **({"v1_speedup_vs_hf_vectorised": best("vectorised") / times["v1"]} if "v1" in times else {}),
    }


def free_legality(bench: Bench, trie: Trie, width: int) -> float:
    """Share of unconstrained beams that name an item; with random weights about the share of codes that do."""
    free = bench.run(random_context(4, bench.model), None, width)
    return float((trie.locate(free.sids) >= 0).float().mean())


def main(quick: Annotated[bool, typer.Option(help="smaller catalogues, fewer repeats")] = False) -> None:
    """Measures and prints the record."""
    benches = {"v2": Bench("small"), "v1": Bench("v1-small")}
    v2 = benches["v2"]
    sizes = [10_000, 100_000] if quick else [10_000, 100_000, 1_000_000]
    repeats = 3 if quick else 15
    trie = Trie.from_sids(random_sids(sizes[-1]))
    record: dict[str, Any] = {"quick": quick, "threads": torch.get_num_threads()}
    record |= exactness(v2, 2000 if quick else 5000, 128)
    record |= widths(benches, trie, [128, 512] if quick else [32, 128, 512], [1] if quick else [1, 8], repeats)
    record["mask_share_of_step"] = mask_share(v2, trie, 512, repeats)
    record["unconstrained_legality"] = free_legality(v2, trie, 128)
    record |= catalogue_growth(v2, sizes, 512, repeats)
    record |= rivals(benches, sizes[-1] if quick else 100_000, 128, 1 if quick else 5)
    short = rivals(benches, sizes[-1] if quick else 100_000, 128, 1 if quick else 5, SHORT)
    record["context_64"] = {name: value for name, value in short.items() if "ms" in name or "speedup" in name}
    finish(record)


if __name__ == "__main__":
    typer.run(main)
