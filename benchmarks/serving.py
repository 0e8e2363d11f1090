"""Serving over real HTTP on loopback: throughput, latency under load, overload, hot swaps, and what the context costs.

``python -m benchmarks.serving [--quick] [--only PART,...] [--output DIR] [--soak MINUTES]``. Preset ``small``, context
512, beam 128 (and 16), 100 000 items, contexts from a real Valkey through Feast, served events to a real collector. The
load generator is open-loop and a process of its own (``benchmarks.serving_load``). Parts: engine, batching, share,
knee, rival, overload, swaps, context. What a part has measured is kept in ``--output`` and not measured again unless it
is named. Left out: gRPC, several replicas, a GPU.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import plotly.graph_objects as go
import torch
import typer

from benchmarks import serving_engine
from benchmarks import serving_parts as parts
from benchmarks.harness import finish, hardware, table
from benchmarks.serving_parts import QUICK, Lab, Lengths
from benchmarks.serving_servers import platform
from monitoring.page import page, plots

ALONE = ("engine", "context")
"""Parts without a server."""
SERVED = ("share", "knee", "batching", "rival", "swaps", "overload")
PARTS = (*ALONE, *SERVED)
BEAM, NARROW, WIDEST = 128, 16, 512
_WIDE, _NARROW = f"beam_{BEAM}", f"beam_{NARROW}"
PLACES = {
    "batching_gain": ("batching", _NARROW, "gain"),
    "batching_gain_128": ("batching", _WIDE, "gain"),
    "throughput_vs_hf": ("rival", _WIDE, "throughput_vs_hf"),
    "throughput_vs_hf_16": ("rival", _NARROW, "throughput_vs_hf"),
    "http_share": ("share", _WIDE, "http_share"),
    "http_share_16": ("share", _NARROW, "http_share"),
    "liveness_ms": ("share", _WIDE, "liveness_max_ms"),
    "liveness_ms_16": ("share", _NARROW, "liveness_max_ms"),
    "mfu_inference": ("engine", _WIDE, "mfu"),
    "mfu_inference_16": ("engine", _NARROW, "mfu"),
    "mfu_inference_512": ("engine", f"beam_{WIDEST}", "mfu"),
    "single_ms_512": ("engine", f"beam_{WIDEST}", "single_ms"),
    "mfu_bound_by": ("engine", _WIDE, "time_by_kind"),
    "p50_ms_at_half_load": ("knee", "half", "p50_ms"),
    "p99_ms_at_half_load": ("knee", "half", "p99_ms"),
    "overload_p99_ms": ("overload", "p99_ms"),
    "overload_keeps_p99": ("overload", "keeps_p99"),
    "overload_calm_p99_ms": ("overload", "calm", "p99_ms"),
    "overload_statuses": ("overload", "statuses"),
    "overload_unexpected": ("overload", "unexpected"),
    "overload_timed_out": ("overload", "timed_out"),
    "overload_memory_growth": ("overload", "memory_growth"),
    "overload_liveness_ms": ("overload", "health", "max_ms"),
    "failed_requests": ("swaps", "failed_requests"),
    "mixed_versions": ("swaps", "mixed_versions"),
    "old_weights_freed": ("swaps", "old_weights_freed"),
    "swaps": ("swaps", "swaps"),
    "swaps_p99_ms": ("swaps", "p99_ms"),
    "swaps_liveness_ms": ("swaps", "liveness_max_ms"),
    "swap_seconds": ("swaps", "swap_seconds_p50"),
    "context_growth": ("context", _WIDE, "v2"),
    "context_growth_16": ("context", _NARROW, "v2"),
    "context_growth_v1": ("context", _WIDE, "v1"),
    "context_growth_v1_16": ("context", _NARROW, "v1"),
}
"""Where each figure that counts lies in what the parts measured."""


@contextmanager
def laboratory(items: int, lengths: Lengths) -> Iterator[Lab]:
    """The platform and a model server with its default settings."""
    with platform(items, versions=3) as running, running.model_server() as default:
        yield Lab(running, lengths, default)


def served(name: str, lab: Lab, quick: bool) -> dict[str, Any]:
    """Measures one part that asks a server; ``quick`` leaves out the other beam width of the long ones."""
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "share": lambda: parts.share(lab, [BEAM, NARROW]),
        "knee": lambda: parts.knee(lab, BEAM),
        "batching": lambda: parts.batching(lab, [NARROW] if quick else [NARROW, BEAM]),
        "rival": lambda: parts.rival(lab, [BEAM] if quick else [BEAM, NARROW]),
        "swaps": lambda: parts.swaps(lab, BEAM),
        "overload": lambda: parts.overload(lab, BEAM),
    }
    return works[name]()


def alone(name: str, items: int, quick: bool) -> dict[str, Any]:
    """Measures one part that needs no server."""
    if name == "engine":
        beams = [NARROW, BEAM] if quick else [NARROW, BEAM, WIDEST]
        return serving_engine.engine(items, beams, 1.0 if quick else 8.0)
    return serving_engine.context(items, (BEAM, NARROW), 2 if quick else 10)


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that count, of the parts that were measured."""
    values = {name: _at(found, place) for name, place in PLACES.items()}
    return {name: value for name, value in values.items() if value != {}}


def _at(found: dict[str, Any], place: tuple[str, ...]) -> Any:
    """What lies there; an empty dict when it was not measured."""
    for key in place:
        found = found.get(key, {})
    return found


def draw(knee: dict[str, Any], path: Path) -> None:
    """The knee as a page."""
    points = knee["points"]
    figure = go.Figure(
        [
            go.Scatter(x=[p["rate"] for p in points], y=[p[name] for p in points], name=name, mode="lines+markers")
            for name in ("p50_ms", "p99_ms")
        ]
    )
    figure.update_yaxes(type="log", title="ms, from the intended start")
    figure.update_xaxes(title="requests offered a second (Poisson)")
    figure.update_layout(legend={"x": 0.02, "y": 0.98})  # the tool bar stands on the right
    figure.add_vline(x=knee["capacity"], line_dash="dot", annotation_text="capacity, closed loop")
    note = f"Preset small, context 512, beam {BEAM}. {hardware()}"
    body = f"<h1>Serving: the knee</h1>{plots([('Latency by load', figure, note)], {'height': 460})}"
    path.write_text(page("Serving: the knee", body), encoding="utf-8")


def main(
    quick: Annotated[bool, typer.Option(help="short measurements on a smaller catalogue, under two minutes")] = False,
    only: Annotated[str, typer.Option(help=f"parts to measure, of {', '.join(PARTS)}; others are read")] = "",
    output: Annotated[Path, typer.Option(help="where results are kept")] = Path("benchmark-serving"),
    soak: Annotated[float, typer.Option(help="minutes of the overload")] = 10.0,
    threads: Annotated[
        int, typer.Option(help="threads of the model, here and in the servers; 0: PyTorch's choice")
    ] = 0,
) -> None:
    """Measures the parts that are wanted and not yet in ``output``, and sums up everything it holds."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    output = output / "quick" if quick else output
    output.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in PARTS if name in only.split(",")] if only else list(PARTS)
    if set(only.split(",")) - set(PARTS) - {""}:
        raise typer.BadParameter(f"{only} names unknown parts; the parts are {', '.join(PARTS)}")
    if threads:
        torch.set_num_threads(threads)
    missing = [name for name in wanted if only or quick or not (output / f"{name}.json").exists()]
    lengths = QUICK if quick else replace(Lengths(), soak=60 * soak)
    items = 20_000 if quick else 100_000
    for name in (name for name in missing if name in ALONE):
        keep(output, name, lambda name=name: alone(name, items, quick))  # type: ignore[misc]
    if set(missing) & set(SERVED):
        with laboratory(items, lengths) as lab:
            for name in (name for name in SERVED if name in missing):
                keep(output, name, lambda name=name: served(name, lab, quick))  # type: ignore[misc]
    conclude(quick, output)


def conclude(quick: bool, output: Path) -> None:
    """Sums up what ``output`` holds."""
    stored = {name: output / f"{name}.json" for name in PARTS}
    found = {name: json.loads(path.read_text()) for name, path in stored.items() if path.exists()}
    plot = output / "knee.html"
    if "knee" in found:
        draw(found["knee"], plot)
    record = summary(found)
    table("serving", ["figure", "value"], record.items())
    finish({"quick": quick, "threads": torch.get_num_threads(), **record, "parts": found, "plot": str(plot)})


def keep(output: Path, name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Measures a part and stores what came of it, and how long that took."""
    began = time.monotonic()
    record = {**work(), "took_s": time.monotonic() - began}
    print(f"measured {name} in {record['took_s']:.0f} s", file=sys.stderr)
    (output / f"{name}.json").write_text(json.dumps(record, indent=1, default=float))


if __name__ == "__main__":
    typer.run(main)
