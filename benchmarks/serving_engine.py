"""The recommender without a server: the limit ``benchmarks.serving`` holds HTTP against, and what bounds it.

``engine``: requests a second of full batches, the share of the machine's measured matmul peak they reach, and where the
time goes by kind of operation. ``context``: what a context of 3000 behaviours costs over one of 512, for the lazy
decoder (V2) and the encoder-decoder (V1), whole request: tensors from the context, encoding, filtered search, items.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import alternate, matmul_peak, table
from benchmarks.random_catalogue import CODES, LENGTHS, LEVELS
from benchmarks.serving_servers import NOW_MS, windows, write_bundle
from features.histories.context import STATIC_FIELDS, Context, from_windows
from features.histories.windows import Limits
from models.bundle import Bundle
from models.onerec_v1 import V1Config
from models.serving.recommender import Recommender
from models.sizes import preset

BATCH = 32
LONG = (20, 256, 2724)
"""Pathways of 3000 behaviours in all; the lifelong one is what grows, as in the papers."""
Engines = dict[tuple[str, int], Recommender]
"""By preset and behaviours of the context."""
_KINDS = {
    "products": ("mm", "linear", "bmm", "attention", "baddbmm", "mkldnn"),
    "softmax": ("softmax", "logsumexp"),
    "selection": ("topk", "sort", "searchsorted", "unique"),
    "moving": ("gather", "index", "copy", "cat", "scatter", "to_copy", "fill", "clone", "embedding", "nonzero"),
}


def recommender(items: int, name: str = "small", lengths: tuple[int, ...] = LENGTHS) -> Recommender:
    """A fresh bundle of random weights, as a server would hold it."""
    config = preset(name, CODES, LEVELS)
    if isinstance(config, V1Config):
        config = replace(config, lifelong=lengths[2])
    limits = Limits(short=lengths[0], positive=lengths[1], lifelong=lengths[2])
    with tempfile.TemporaryDirectory(prefix="onerec-engine-") as folder:
        return Recommender(Bundle.load(write_bundle(Path(folder), items, config, limits=limits)), bf16=True)


def context_of(engine: Recommender, requests: int) -> Context:
    """Full windows of so many users."""
    limits, catalogue = engine.bundle.limits, engine.bundle.catalogue
    short, positive, lifelong = (
        windows(len(catalogue), length, seed)[:requests]
        for seed, length in enumerate((limits.short, limits.positive, limits.lifelong))
    )
    static, times = np.zeros((requests, STATIC_FIELDS), np.int64), np.full(requests, NOW_MS)
    return from_windows(static, short, positive, lifelong, times, catalogue.index, limits)


def rate(engine: Recommender, context: Context, beam: int, seconds: float) -> float:
    """Requests a second, batch after batch on every thread, as the server runs them."""

    def work(until: float) -> tuple[int, float]:
        done = 0
        while time.perf_counter() < until:
            engine.recommend(context, num_items=10, beam_width=beam)
            done += len(context)
        return done, time.perf_counter()

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, [time.perf_counter() + 1e-3] * threads))  # everybody's first time
        began = time.perf_counter()
        did = list(pool.map(work, [began + seconds] * threads))
    return sum(done / (ended - began) for done, ended in did)


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Where the time of ``work`` goes, by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        kind = next((kind for kind, names in _KINDS.items() if any(name in event.key for name in names)), "elementwise")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: spent[kind] / total for kind, _ in spent.most_common()}


def engine(items: int, beams: list[int], seconds: float) -> dict[str, Any]:
    """In-process throughput at each beam width, against the matmul peak."""
    ours = recommender(items)
    context, peak = context_of(ours, BATCH), matmul_peak()
    found: dict[str, Any] = {"bf16_peak_gflops": peak / 1e9, "batch": BATCH}
    for beam in beams:

        def work(beam: int = beam) -> object:
            return ours.recommend(context, num_items=10, beam_width=beam)

        per_second = rate(ours, context, beam, seconds)
        with FlopCounterMode(display=False) as counter:
            work()
        flops = counter.get_total_flops() / BATCH
        single = alternate([lambda b=beam: ours.recommend(context.take(slice(0, 1)), num_items=10, beam_width=b)], 7)  # type: ignore[misc]
        found[f"beam_{beam}"] = {
            "requests_per_second": per_second,
            "gflop_per_request": flops / 1e9,
            "mfu": flops * per_second / peak,
            "single_ms": 1e3 * float(np.median(single)),
            "time_by_kind": shares(work),
        }
    rows = [(beam, *list(found[f"beam_{beam}"].values())[:4]) for beam in beams]
    table("the recommender alone", ["beam", "requests/s", "GFLOP a request", "of peak", "single, ms"], rows)
    return found


def growth(engines: Engines, beam: int, requests: int, repeats: int) -> dict[str, Any]:
    """Least disturbed time of a run of ``requests`` at context 512 and 3000, rivals in turns."""

    def work(engine: Recommender) -> Callable[[], object]:
        context = context_of(engine, requests)
        return lambda: engine.recommend(context, num_items=10, beam_width=beam)

    works = [work(engine) for engine in engines.values()]
    least = alternate(works, repeats + 1)[1:].min(0) / requests
    times = {name: 1e3 * float(t) for name, t in zip(engines, least, strict=True)}
    table(
        f"cost of the context, beam {beam}, {requests} requests a run",
        ["model", "behaviours", "ms a request"],
        [(*name, ms) for name, ms in times.items()],
    )
    short, long = sum(LENGTHS), sum(LONG)
    return {
        "ms": {f"{name} {length}": ms for (name, length), ms in times.items()},
        "v2": times["small", long] / times["small", short],
        "v1": times["v1-small", long] / times["v1-small", short],
    }


def context(items: int, beams: tuple[int, int], repeats: int) -> dict[str, Any]:
    """``growth`` for a request alone at both beam widths, and for eight together at the narrow one."""
    wide, narrow = beams
    engines = {
        (name, sum(lengths)): recommender(items, name, lengths)
        for name in ("small", "v1-small")
        for lengths in (LENGTHS, LONG)
    }
    return {
        f"beam_{wide}": growth(engines, wide, 1, repeats),
        f"beam_{narrow}": growth(engines, narrow, 1, repeats),
        f"beam_{narrow}_batch_8": growth(engines, narrow, 8, max(repeats // 2, 2)),
    }
