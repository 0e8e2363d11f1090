"""The parts of ``benchmarks.serving`` that ask a server over HTTP: capacity, the knee, the rival, overload, swaps.

Every part returns a record of its own; ``benchmarks.serving`` sums them up. Rates under a bound are found by bisection
between measured runs of an open-loop generator.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks import serving_engine
from benchmarks.intake_servers import ROOT
from benchmarks.serving_load import LoadConfig
from benchmarks.serving_servers import NOW_MS, Platform, Running, python_server, running
from models.bundle import set_alias
from pipelines.processes import free_ports

BOUND_MS = {16: 250.0, 128: 1000.0}
"""p99 that a rate must keep to count, by beam width."""
IN_FLIGHT = {16: 96, 128: 24}
"""Requests of a closed-loop load: what two threads of the model take at once, and half as much or as much again."""
HALF = 0.5
_TOLD = ("rate", "answered_per_second", "p50_ms", "p99_ms", "statuses", "without_features")
SWAPS = 20


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long each measurement lasts, in seconds, and how often it is repeated."""

    probe: float = 8.0
    probes: int = 5
    rounds: int = 3
    knee: tuple[float, ...] = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)
    soak: float = 600.0
    swaps: int = SWAPS


QUICK = Lengths(probe=1.5, probes=2, rounds=1, knee=(0.5, 0.9, 1.1), soak=5.0, swaps=3)


@dataclass
class Lab:
    """The platform and the servers started on it so far; ``default`` is the one most parts share."""

    platform: Platform
    lengths: Lengths
    default: Running
    capacity: dict[int, float] = field(default_factory=dict)

    def at_capacity(self, beam: int) -> float:
        """Requests a second that the default server answers at saturation, measured once."""
        if not self.capacity.get(beam):
            self.capacity[beam] = saturated(self.default, beam, self.lengths)["answered_per_second"]
        if not self.capacity[beam]:
            raise RuntimeError(
                f"the server answered nothing at beam {beam} within {self.lengths.probe} s; use a quieter machine"
            )
        return self.capacity[beam]


@contextmanager
def generator(config: LoadConfig) -> Iterator["subprocess.Popen[bytes]"]:
    """A running load generator, gone afterwards."""
    command = [sys.executable, "-m", "benchmarks.serving_load", json.dumps(asdict(config))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """Waits for a load generator; returns what it saw."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the load generator failed with {process.returncode}")
    outcome: dict[str, Any] = json.loads(output)
    return outcome


def load(server: Running, **options: Any) -> dict[str, Any]:
    """One run of the load generator; with the server's share of a core."""
    used, began = server.cpu_seconds(), time.perf_counter()
    config = LoadConfig(port=server.port, time_ms=NOW_MS, **options)
    with generator(config) as process:
        outcome = finish(process)
    outcome["server_cores"] = (server.cpu_seconds() - used) / (time.perf_counter() - began)
    said = {name: outcome[name] for name in _TOLD}
    print(f"beam {config.beam}: {said}", file=sys.stderr)
    return outcome


def saturated(server: Running, beam: int, lengths: Lengths, **options: Any) -> dict[str, Any]:
    """Closed-loop load with many requests in flight."""
    warm = lengths.probe / 3
    options = {"connections": IN_FLIGHT[beam], **options}
    return load(server, beam=beam, seconds=lengths.probe + warm, warm_s=warm, **options)


def open_loop(server: Running, beam: int, rate: float, lengths: Lengths, **options: Any) -> dict[str, Any]:
    """Poisson arrivals at ``rate``."""
    warm = lengths.probe / 4
    seconds = options.pop("seconds", lengths.probe) + warm
    return load(server, beam=beam, rate=rate, seconds=seconds, warm_s=warm, connections=2000, **options)


def best_rate(server: Running, beam: int, lengths: Lengths, in_flight: int) -> dict[str, Any]:
    """The highest rate tried whose p99 keeps the bound, nothing refused: by bisection, from 0.7 of the capacity on."""
    full = saturated(server, beam, lengths, connections=in_flight)["answered_per_second"]
    low, high, rate = 0.0, float("inf"), 0.7 * full
    trials = []
    for trial in range(lengths.probes):
        outcome = open_loop(server, beam, rate, lengths, seed=trial)
        kept = outcome["p99_ms"] <= BOUND_MS[beam] and set(outcome["statuses"]) == {"200"}
        trials.append({"rate": rate, "p99_ms": outcome["p99_ms"], "kept": kept})
        low, high = (rate, high) if kept else (low, rate)
        rate = 1.2 * low if high == float("inf") else (low + high) / 2
    return {"rate": low, "saturated": full, "p99_bound_ms": BOUND_MS[beam], "trials": trials}


def batching(lab: Lab, beams: list[int]) -> dict[str, Any]:
    """Throughput under the same p99 bound with batching and without (``--max_batch 1``)."""
    with lab.platform.model_server("--max_batch", "1") as plain:
        # Few in flight: a crowd that is refused and comes back would cost the plain server its time.
        without = {beam: best_rate(plain, beam, lab.lengths, 4) for beam in beams}
    found: dict[str, Any] = {}
    for beam in beams:
        ours = best_rate(lab.default, beam, lab.lengths, IN_FLIGHT[beam])
        gain = ours["rate"] / without[beam]["rate"] if without[beam]["rate"] else float("inf")
        found[f"beam_{beam}"] = {
            "gain": gain,
            "gain_saturated": ours["saturated"] / without[beam]["saturated"],
            "with": ours,
            "without": without[beam],
        }
    return found


def share(lab: Lab, beams: list[int]) -> dict[str, Any]:
    """HTTP at saturation over the recommender alone, in turns; liveness meanwhile."""
    engine = serving_engine.recommender(lab.platform.items)
    context = serving_engine.context_of(engine, serving_engine.BATCH)
    found: dict[str, Any] = {}
    for beam in beams:
        alone, http = [], []
        for _ in range(lab.lengths.rounds):
            alone.append(serving_engine.rate(engine, context, beam, lab.lengths.probe))
            http.append(saturated(lab.default, beam, lab.lengths, health=True))
        rates = [outcome["answered_per_second"] for outcome in http]
        lab.capacity[beam] = float(np.median(rates))
        found[f"beam_{beam}"] = {
            "http_share": float(np.median(np.array(rates) / np.array(alone))),
            "http_per_second": rates,
            "recommender_per_second": alone,
            "liveness_p99_ms": max(outcome["health"]["p99_ms"] for outcome in http),
            "liveness_max_ms": max(outcome["health"]["max_ms"] for outcome in http),
            "without_features": sum(outcome["without_features"] for outcome in http),
            "load_core_share": http[-1]["core_share"],
            "server_cores": http[-1]["server_cores"],
        }
    return found


def knee(lab: Lab, beam: int) -> dict[str, Any]:
    """p50 and p99 by offered load."""
    capacity = lab.at_capacity(beam)
    points = []
    for part in lab.lengths.knee:
        outcome = open_loop(lab.default, beam, part * capacity, lab.lengths, seed=int(100 * part))
        kept = (*_TOLD, "late_p99_ms", "core_share")
        points.append({"load": part, **{name: outcome[name] for name in kept}})
    half = next(point for point in points if point["load"] == HALF)
    return {"capacity": capacity, "points": points, "half": half}


def rival(lab: Lab, beams: list[int]) -> dict[str, Any]:
    """transformers' generate behind a KServe model, saturated, in turns with ours."""
    (port,) = free_ports(1)
    arguments = ["--items", str(lab.platform.items)]
    server = python_server("benchmarks.serving_hf", arguments, port, "/v2/health/live", lab.platform.folder / "hf.log")
    found: dict[str, Any] = {}
    with running(server, port) as theirs:
        for beam in beams:
            hf = one_by_one(theirs, beam, 4 * lab.lengths.probe)
            ours = saturated(lab.default, beam, lab.lengths)["answered_per_second"]
            found[f"beam_{beam}"] = {"throughput_vs_hf": ours / hf, "ours_per_second": ours, "hf_per_second": hf}
    return found


def one_by_one(server: Running, beam: int, seconds: float) -> float:
    """Answers a second of a server that works on one request at a time: one after the other, from their median."""
    load(server, beam=beam, seconds=0.1, connections=1, timeout_s=120)  # its first request
    outcome = load(server, beam=beam, seconds=seconds, connections=1, timeout_s=120)
    if set(outcome["statuses"]) != {"200"}:
        raise RuntimeError(f"the rival answered {outcome['statuses']}; see {server.server.log}")
    return 1000 / float(outcome["p50_ms"])


def overload(lab: Lab, beam: int) -> dict[str, Any]:
    """Five times the capacity for a long time: what is served keeps its p99, the rest is refused, memory stays."""
    capacity, server, seconds = lab.at_capacity(beam), lab.default, lab.lengths.soak
    warm = min(5.0, seconds / 4)
    calm = open_loop(server, beam, 0.9 * capacity, lab.lengths)
    config = LoadConfig(
        port=server.port,
        time_ms=NOW_MS,
        beam=beam,
        rate=5 * capacity,
        seconds=seconds + warm,
        warm_s=warm,
        connections=2000,
        slices=10,
        health=True,
    )
    resident: list[tuple[float, int]] = []
    with generator(config) as process:
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < seconds + warm:
            time.sleep(max(seconds / 120, 0.25))
            resident.append((time.monotonic() - began, server.memory()))
        outcome = finish(process)
    return {
        "offered_over_capacity": 5.0,
        "seconds": seconds,
        "capacity": capacity,
        "calm": {name: calm[name] for name in ("rate", "p50_ms", "p99_ms")},
        "p99_bound_ms": BOUND_MS[beam],
        "keeps_p99": outcome["p99_ms"] <= BOUND_MS[beam],
        **{name: outcome[name] for name in ("answered_per_second", "p50_ms", "p99_ms", "max_ms", "refused_p99_ms")},
        **{
            name: outcome[name]
            for name in ("statuses", "slices", "health", "core_share", "late_p99_ms", "without_features")
        },
        "unexpected": sum(n for code, n in outcome["statuses"].items() if code not in ("200", "429", "503")),
        "timed_out": outcome["statuses"].get("-1", 0),
        "refusals_with_retry_after": outcome["retry_after"],
        **_flatness(resident),
    }


def _flatness(resident: list[tuple[float, int]]) -> dict[str, Any]:
    """Resident memory after the first fifth, which warms up: growth to the last fifth, and slope."""
    at, size = (np.array(column, float) for column in zip(*resident, strict=True))
    fifth = max(len(at) // 5, 1)
    tail = slice(fifth, None)
    slope = float(np.polyfit(at[tail], size[tail], 1)[0]) if len(at[tail]) > 2 else 0.0
    return {
        "memory_mb": {"start": size[0] / 1e6, "end": float(np.median(size[-fifth:])) / 1e6, "max": size.max() / 1e6},
        "memory_growth": float(np.median(size[-fifth:]) / np.median(size[fifth : 2 * fifth]) - 1),
        "memory_mb_per_minute": 60 * slope / 1e6,
    }


def swaps(lab: Lab, beam: int) -> dict[str, Any]:
    """The alias moves again and again under load: no request fails, every answer is of one version."""
    server, versions = lab.default, lab.platform.versions
    rate = HALF * lab.at_capacity(beam)
    config = LoadConfig(
        port=server.port,
        time_ms=NOW_MS,
        beam=beam,
        rate=rate,
        seconds=3600,
        connections=2000,
        verify=True,
        health=True,
    )
    took, resident = [], []
    with generator(config) as process:
        for number in range(lab.lengths.swaps):
            took.append(_swap(lab, versions[(number + 1) % len(versions)]))
            time.sleep(0.5)
            resident.append(server.memory())
        process.terminate()
        outcome = finish(process)
    _swap(lab, versions[0])
    weights = (lab.platform.folder / "bundle0" / "model.safetensors").stat().st_size
    settled = resident[: max(len(resident) // 5, 1)]
    return {
        "swaps": len(took),
        "rate": rate,
        "requests": outcome["asked"],
        "failed_requests": outcome["asked"] - outcome["statuses"].get("200", 0),
        "statuses": outcome["statuses"],
        "mixed_versions": outcome["mixed"],
        "answers_by_version": list(outcome["versions"].values()),
        "p50_ms": outcome["p50_ms"],
        "p99_ms": outcome["p99_ms"],
        "liveness_max_ms": outcome["health"]["max_ms"],
        "swap_seconds_p50": float(np.median(took)),
        "weights_mb": weights / 1e6,
        "memory_mb": {"first": float(np.median(settled)) / 1e6, "last": resident[-1] / 1e6},
        # Kept weights would add a model with every swap.
        "old_weights_freed": bool(resident[-1] - np.median(settled) < 2 * weights),
    }


def _swap(lab: Lab, version: str, patience_s: float = 120.0) -> float:
    """Moves the alias and waits until the server answers with the version; seconds."""
    began, server = time.monotonic(), lab.default
    set_alias(lab.platform.storage, "production", version)
    while server.version() != version:
        if time.monotonic() > began + patience_s:
            raise RuntimeError(f"the server does not swap to {version}; see {server.server.log}")
        time.sleep(0.05)
    return time.monotonic() - began
