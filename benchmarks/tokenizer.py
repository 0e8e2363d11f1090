"""The tokenizer: do SIDs stay apart and balanced, does the embedding know who is watched together, does it scale?

``python -m benchmarks.tokenizer --data PATH [--quick] [--output DIR] [--only PART,...] [--seeds N]``. PATH is a
published log (``features.datasets``) or a folder with items.parquet and exposures.parquet in our schema. Parts:
codebooks, speed, neighbours, append, scaling, ablation. What a part has measured is kept in ``--output``, so a
benchmark that was killed, or run part by part, goes on where it stopped; the last line sums up what is there.
Embeddings never see the last two positive interactions of a user, on which neighbours and the ablation are measured.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from benchmarks import ablation, quantisers
from benchmarks.harness import PeakMemory, exponent, finish, hardware, spread, table
from features.datasets import load
from features.schema import EXPOSURE, ITEM, conform
from models.tokenizer import card
from models.tokenizer.alignment import AlignmentConfig
from models.tokenizer.balance import capacity_of
from models.tokenizer.cooccurrence import collaborative, engagements
from models.tokenizer.embedding import ItemEmbedder
from models.tokenizer.interactions import item_rows, popularity, positive, times, user_numbers
from models.tokenizer.nearest import shortlist
from models.tokenizer.quality import codebook_report, neighbour_hit_rate, neighbour_pairs
from models.tokenizer.residual import ResidualQuantizer
from models.tokenizer.swing import swing
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.tokenizer.vocabulary import Catalogue

PARTS = ("codebooks", "speed", "neighbours", "append", "scaling", "ablation")
KINDS = ("aligned", "detailed", "content", "collaborative")
"""Embeddings: without the words of titles (``detail=0``), the default, and what either half of it knows."""
CODES, LEVELS = 256, 3
SIZES = (62_500, 250_000, 1_000_000)
"""Rows of the scaling runs."""
SCALE_CODES, SCALE_DIM = 8192, 64
NEW_ITEMS = 1000
EMBEDDER_STEPS = 600


@dataclass(frozen=True, eq=False)
class Bench:
    """The log under test and the folder where results are kept."""

    items: pa.Table
    exposures: pa.Table
    output: Path
    quick: bool

    @classmethod
    def open(cls, path: Path, output: Path, quick: bool) -> "Bench":
        """Reads the log at ``path``."""
        if (path / "items.parquet").exists() and (path / "exposures.parquet").exists():
            tables = (pq.read_table(path / f"{name}.parquet") for name in ("items", "exposures"))
            items, exposures = (conform(part, schema) for part, schema in zip(tables, (ITEM, EXPOSURE), strict=True))
        else:
            data = load(path)
            items, exposures = data.items, data.exposures
        output.mkdir(parents=True, exist_ok=True)
        return cls(items, exposures, output, quick)

    @cached_property
    def held_out(self) -> np.ndarray:
        """bool [exposures]: at or after the last but one positive interaction of a user with three or more."""
        log = self.exposures
        users, when = user_numbers(log), times(log)
        liked = np.flatnonzero(positive(log) & (item_rows(log, self.items.column("item_id").to_pylist()) >= 0))
        liked = liked[np.lexsort((liked, when[liked], users[liked]))]
        sizes = np.bincount(users[liked], minlength=users.max() + 1)
        ends = np.cumsum(sizes)
        cut = np.full(len(sizes), np.iinfo(np.int64).max)
        enough = sizes >= 3
        cut[enough] = when[liked[ends[enough] - 2]]
        found: np.ndarray = when >= cut[users]
        return found

    @cached_property
    def training(self) -> pa.Table:
        """The exposures that embeddings may learn from."""
        return self.exposures.filter(pa.array(~self.held_out))

    @cached_property
    def pairs(self) -> np.ndarray:
        """Rows [m, 2] of items engaged with one after the other, the second of them held out."""
        ids = self.items.column("item_id").to_pylist()
        late = self.exposures.filter(pa.array(self.held_out))
        return neighbour_pairs(late, ids)

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` returns, or returned before: stored as JSON under ``name``."""
        path = self.output / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            print(f"{name} ...", file=sys.stderr, flush=True)
            result = measure() | {"measured_on": hardware()}
            path.write_text(json.dumps(result, default=float))
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def embedding(self, kind: str, seed: int = 0) -> np.ndarray:
        """Vectors float32 [items, dim]; made once."""
        path = self.output / f"embedding-{kind}-{seed}.npy"
        if not path.exists():
            print(f"embedding {kind}, seed {seed} ...", file=sys.stderr, flush=True)
            start = time.perf_counter()
            for name, vectors in self._embed(kind, seed).items():
                np.save(self.output / f"embedding-{name}-{seed}.npy", np.asarray(vectors, np.float32))
            print(f"embedding {kind}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return np.asarray(np.load(path))

    @property
    def kinds(self) -> list[str]:
        """Embeddings that differ here: without titles there is no detail."""
        titled = self.items.column("title").null_count < self.items.num_rows
        return [kind for kind in KINDS if titled or kind != "detailed"]

    @property
    def production(self) -> str:
        """The embedding of the default configuration."""
        return "detailed" if "detailed" in self.kinds else "aligned"

    def _embed(self, kind: str, seed: int) -> dict[str, np.ndarray]:
        """Vectors by kind: the aligned and the detailed ones are of one network."""
        steps = 20 if self.quick else EMBEDDER_STEPS
        config = AlignmentConfig(seed=seed, threads=torch.get_num_threads(), max_steps=steps, detail=0)
        if kind == "collaborative":  # the vectors of co-engagement as they are, no network
            return {kind: collaborative(engagements(self.items, self.training), config.dim, seed).vectors}
        if kind == "content":  # nothing of the log: items of like content are contrasted
            return {kind: ItemEmbedder.fit(self.items, self.training.slice(0, 0), config).encode(self.items)}
        fitted = ItemEmbedder.fit(self.items, self.training, replace(config, detail=AlignmentConfig.detail))
        plain = ItemEmbedder(config, fitted.modalities, fitted.model, fitted.spread)
        return {"aligned": plain.encode(self.items), "detailed": fitted.encode(self.items)}


def codebooks(bench: Bench, kind: str) -> dict[str, Any]:
    """Every quantiser on one embedding, 3 x 256."""
    x = bench.embedding(kind)
    codes = min(CODES, len(x) // 4)
    arms = {}
    for name, fit in quantisers.rivals().items():
        arms[name] = quantisers.measured(x, fit(x, LEVELS, codes), bench.pairs)
    return {"items": len(x), "codes": codes, "capacity": capacity_of(len(x), codes), "arms": arms}


def draw_card(bench: Bench) -> None:
    """The quality card of our codebooks, beside the results."""
    x = bench.embedding(bench.production)
    quantizer = ResidualQuantizer.fit(x, levels=LEVELS, codes=min(CODES, len(x) // 4))
    sids = quantizer.assign(x, unique=True)
    liked = popularity(bench.training, bench.items.column("item_id").to_pylist())
    catalogue = Catalogue.from_items(bench.items, sids=sids, codes=quantizer.codes, popularity=liked)
    report = codebook_report(x, sids, quantizer.codebooks, catalogue=catalogue, pairs=bench.pairs)
    (bench.output / "card.html").write_text(card.html(report, title=f"Codebook {quantizer.version}"), encoding="utf-8")


def speed(bench: Bench) -> dict[str, Any]:
    """Seconds of fits, taken in turns, and of Swing."""
    x, named = bench.embedding("aligned"), quantisers.rivals()
    codes = min(CODES, len(x) // 4)
    names = [name for name in ("balanced", "plain", "sklearn_kmeans", "sklearn_minibatch", "faiss") if name in named]
    rounds = [
        [named[name](x, LEVELS, codes, seed=turn).seconds for name in names] for turn in range(1 if bench.quick else 3)
    ]
    taken = dict(zip(names, np.median(rounds, axis=0).tolist(), strict=True))
    start = time.perf_counter()
    engaged = engagements(bench.items, bench.exposures)
    swing(engaged.multiply(engaged >= 1).tocsr())
    return {"fit_seconds": taken, "swing_seconds": time.perf_counter() - start, "interactions": int(engaged.nnz)}


def neighbours(bench: Bench, kind: str, seed: int) -> dict[str, Any]:
    """How often held-out next items share the first codes, for one embedding."""
    x = bench.embedding(kind, seed)
    codes = min(CODES, len(np.unique(x, axis=0)) // 4)
    quantizer = ResidualQuantizer.fit(x, levels=LEVELS, codes=codes, seed=seed)
    return neighbour_hit_rate(quantizer.assign(x), bench.pairs) | nearest_hit_rate(x, bench.pairs)


def nearest_hit_rate(x: np.ndarray, pairs: np.ndarray, count: int = 10) -> dict[str, float]:
    """How often the second of a pair [m, 2] is among the ``count`` nearest of the first by ``x`` [n, d]; and chance."""
    first, place = np.unique(pairs[:, 0], return_inverse=True)
    near, _ = shortlist(x[first], x, min(count + 1, len(x)))  # an item is its own nearest
    near = np.where(near == first[:, None], -1, near)
    return {
        f"nearest{count}": float((near[place] == pairs[:, 1:]).any(1).mean()),
        f"nearest{count}_chance": count / len(x),
    }


def append(bench: Bench) -> dict[str, Any]:
    """New items with frozen codebooks: speed, and that no old SID changes by a byte."""
    count = min(NEW_ITEMS, bench.items.num_rows // 5)
    chosen = np.random.default_rng(0).permutation(bench.items.num_rows)
    old, new = (bench.items.take(np.sort(rows)) for rows in (chosen[count:], chosen[:count]))
    config = TokenizerConfig(
        codes=min(CODES, old.num_rows // 4), levels=LEVELS, threads=torch.get_num_threads(), max_steps=20
    )
    tokenizer = Tokenizer.fit(old, bench.training, config)
    catalogue = tokenizer.catalogue(old, bench.training)
    before = catalogue.sids.tobytes()
    start = time.perf_counter()
    longer = tokenizer.append(catalogue, new)
    appended = time.perf_counter() - start
    start = time.perf_counter()
    tokenizer.quantizer.encode(tokenizer.embedder.encode(old.slice(1)))
    return {
        "new_items": count,
        "append_seconds": appended,
        "encode_items_per_second": (old.num_rows - 1) / (time.perf_counter() - start),
        "existing_sids_byte_identical": longer.sids[: len(catalogue)].tobytes() == before == catalogue.sids.tobytes(),
        "distinct_sids": len(np.unique(longer.sids, axis=0)),
        "items": len(longer),
    }


def scaling(bench: Bench, rows: int) -> dict[str, Any]:
    """One fit on random vectors: two passes in batches and one auction a level, no sweeps after the last.

    CPU seconds are kept too: they bear a machine that others use.
    """
    codes = 128 if bench.quick else SCALE_CODES
    x = np.random.default_rng(0).normal(size=(rows, SCALE_DIM)).astype(np.float32)
    with PeakMemory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        quantizer = ResidualQuantizer.fit(x, levels=LEVELS, codes=codes, sweeps=0)
        fit_seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        start = time.perf_counter()
        sids = quantizer.encode(x)
    return {
        "rows": rows,
        "codes": codes,
        "fit_seconds": fit_seconds,
        "fit_cpu_seconds": cpu,
        "encode_seconds": time.perf_counter() - start,
        "peak_gigabytes": memory.gigabytes,
        "error_share": float(((x - quantizer.reconstruct(sids)) ** 2).sum(1).mean() / (x**2).sum(1).mean()),
    }


Task = tuple[str, str, Callable[[Bench], dict[str, Any]]]
"""Part, name of the result, and what measures it."""


def tasks(quick: bool, seeds: int, kinds: list[str]) -> list[Task]:
    """Everything there is to measure, first seeds first."""
    found: list[Task] = [("speed", "speed", speed), ("append", "append", append)]
    for kind in KINDS[:2]:
        if kind in kinds:
            found.append(("codebooks", f"codebooks-{kind}", partial(codebooks, kind=kind)))
    for rows in (60_000, 120_000) if quick else SIZES:
        found.append(("scaling", f"scaling-{rows}", partial(scaling, rows=rows)))
    for seed in range(seeds):
        for kind in kinds:
            found.append(("neighbours", f"neighbours-{kind}-{seed}", partial(neighbours, kind=kind, seed=seed)))
    arms = [name for name, arm in ablation.ARMS.items() if arm.embedding in kinds]
    for seed in range(seeds):
        for arm in ("base_3x256", "content_only") if quick else arms:
            found.append(("ablation", f"ablation-{arm}-{seed}", partial(ablation.run, name=arm, seed=seed)))
    return found


def summary(bench: Bench, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The last line: the figures the targets are about, and every result under its name."""
    record: dict[str, Any] = {"benchmark": "tokenizer", "quick": bench.quick, "items": bench.items.num_rows}
    if f"codebooks-{bench.production}" in found:
        record |= {"embedding": bench.production, **_codebook_figures(found[f"codebooks-{bench.production}"])}
    if bench.production != "aligned" and "codebooks-aligned" in found:
        record["without_detail"] = _codebook_figures(found["codebooks-aligned"])
    if "speed" in found:
        taken = found["speed"]["fit_seconds"]
        record |= {"swing_seconds": found["speed"]["swing_seconds"], "fit_seconds": taken["balanced"]}
        record |= {f"fit_ratio_to_{name}": taken["balanced"] / taken[name] for name in taken if name != "balanced"}
    if "append" in found:
        names = ("encode_items_per_second", "append_seconds", "existing_sids_byte_identical")
        record |= {name: found["append"][name] for name in names}
    sizes = [result for name, result in found.items() if name.startswith("scaling")]
    if len(sizes) > 1:
        record["scaling_exponent"] = exponent([s["rows"] for s in sizes], [s["fit_seconds"] for s in sizes])
        cpu = [s["fit_cpu_seconds"] for s in sizes]
        record["scaling_exponent_cpu"] = exponent([s["rows"] for s in sizes], cpu)
        record["peak_gigabytes"] = max(s["peak_gigabytes"] for s in sizes)
        record["scaling_iterations"] = "two passes in batches of 50 000 rows, the second balanced; one auction a level"
    rates = {kind: [r for name, r in found.items() if name.startswith(f"neighbours-{kind}-")] for kind in KINDS}
    lengths = ("nearest10", "nearest10_chance", "prefix1", "prefix1_chance", "prefix2", "prefix2_chance")
    record["neighbour_hit_rate"] = {
        kind: {name: spread(one[name] for one in each) for name in lengths} | {"seeds": len(each)}
        for kind, each in rates.items()
        if each
    }
    runs = [result for name, result in found.items() if name.startswith("ablation")]
    if runs:
        record["ablation_recall@10"] = ablation.summary(runs)
    return record | {"results": found}


def _codebook_figures(result: dict[str, Any]) -> dict[str, Any]:
    arms = result["arms"]
    best, plain = arms["balanced"], min(arms[name]["mse"] for name in ("plain", "sklearn_kmeans"))
    return {
        "unique_sid_share": best["unique_sid_share"],
        "unique_after_separation": best["unique_after_separation"],
        "separation_mse_ratio": best["mse_after_separation"] / best["mse"],
        "perplexity": best["perplexity"],
        "largest_cluster": best["largest_cluster"],
        "largest_cluster_after_separation": best["largest_cluster_after_separation"],
        "capacity": result["capacity"],
        "mse_ratio_to_plain": best["mse"] / plain,
        "mse_ratio_to_greedy": best["mse"] / arms["greedy"]["mse"],
    }


def show(record: dict[str, Any]) -> None:
    """Tables of what was measured."""
    found = record["results"]
    columns = ("mse", "unique_sid_share", "unique_after_separation", "mse_after_separation", "fit_seconds")
    for kind in [kind for kind in KINDS if f"codebooks-{kind}" in found]:
        rows = [
            [name, *(arm[c] for c in columns), min(arm["perplexity"]), max(arm["largest_cluster"])]
            for name, arm in found[f"codebooks-{kind}"]["arms"].items()
        ]
        table(f"Quantisers, {kind} embedding", ["", *columns, "least perplexity", "largest cluster"], rows)
    rates = record["neighbour_hit_rate"]
    rows = [[kind, each["prefix1"]["mean"], each["prefix1"]["std"], each["seeds"]] for kind, each in rates.items()]
    if rows:
        table("Held-out neighbours that share the first code", ["embedding", "mean", "std", "seeds"], rows)
    arms = record.get("ablation_recall@10", {})
    rows = [[name, each["mean"], each["std"], each["seeds"]] for name, each in arms.items()]
    if rows:
        table("Small lazy decoder, leave-one-out", ["arm", "recall@10", "std", "seeds"], rows)
    sizes = [result for name, result in found.items() if name.startswith("scaling")]
    rows = [[s["rows"], s["fit_seconds"], s["encode_seconds"], s["peak_gigabytes"]] for s in sizes]
    if rows:
        table("Random vectors", ["rows", "fit s", "encode s", "peak GB"], rows)


def main(
    data: Annotated[Path, typer.Option(help="a log that features.datasets reads, or our schema as Parquet")],
    quick: Annotated[bool, typer.Option(help="under two minutes; one seed, few steps")] = False,
    output: Annotated[Path, typer.Option(help="where results are kept")] = Path("benchmark-tokenizer"),
    only: Annotated[str, typer.Option(help=f"parts to measure, of {', '.join(PARTS)}; others are read")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Measures the parts asked for (all by default) and sums up everything that ``--output`` holds."""
    wanted = set(only.split(",")) if only else set(PARTS)
    if wanted - set(PARTS):
        raise typer.BadParameter(f"unknown parts {sorted(wanted - set(PARTS))}; expected some of {', '.join(PARTS)}")
    torch.set_num_threads(threads)
    output = output / "quick" if quick else output
    bench = Bench.open(data, output, quick)
    found = {
        name: bench.kept(name, partial(measure, bench))
        for part, name, measure in tasks(quick, 1 if quick else seeds, bench.kinds)
        if part in wanted or (output / f"{name}.json").exists()
    }
    if "codebooks" in wanted and not (output / "card.html").exists():
        draw_card(bench)
    record = summary(bench, found)
    show(record)
    finish(record)


if __name__ == "__main__":
    typer.run(main)
