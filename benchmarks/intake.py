"""What the event collector sustains, and what it loses when it is killed.

Load: 16 clients post batches of 16 kB; every one is fsynced before its 202, while the uploader stores them in S3. The
limit is one writer that appends and fsyncs the same batches, measured in turns with the load (``share_of_fsync_limit``;
group commit may pass 1). ``--disk-ms`` makes every flush take that long in both, which shows how group commit does on
a disk that really flushes. ``--crash N``: the collector is killed N times at random moments under load while S3 is
killed, suspended and started in between; what was acknowledged is then looked for in S3.
Left out: several collectors, networks other than loopback.
"""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import harness
from benchmarks.intake_crash import crash
from benchmarks.intake_load import LoadConfig, template
from benchmarks.intake_servers import T0, Servers, load, servers

LIMIT_SECONDS = 1.5


def fsync_limit(folder: Path, body: bytes, disk_ms: float, seconds: float = LIMIT_SECONDS) -> float:
    """Batches a second of one writer that appends ``body`` and flushes it, with the calls the log uses."""
    path = folder / "limit"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    flushes, begun = 0, time.perf_counter()
    try:
        while time.perf_counter() - begun < seconds:
            os.write(handle, body)
            os.fdatasync(handle)
            if disk_ms:
                time.sleep(disk_ms / 1000)
            flushes += 1
        return flushes / (time.perf_counter() - begun)
    finally:
        os.close(handle)
        path.unlink()


def sustained(running: Servers, clients: int, seconds: float, disk_ms: float, rounds: int) -> dict[str, Any]:
    """Load and limit in turns; medians over the rounds."""
    body, _ = template(0, LoadConfig.body_bytes, T0)
    limits, outcomes = [fsync_limit(running.folder, body, disk_ms)], []
    before = running.metrics()
    for _ in range(rounds):
        cpu = running.cpu_seconds()
        outcome = load(LoadConfig(port=running.port, token="server", seconds=seconds, clients=clients, time_ms=T0))
        used = {name: (running.cpu_seconds()[name] - cpu[name]) / outcome["seconds"] for name in cpu}
        outcomes.append({**outcome, **{f"{name}_core_share": share for name, share in used.items()}})
        limits.append(fsync_limit(running.folder, body, disk_ms))
        print(f"{outcome['batches'] / outcome['seconds']:,.0f} batches/s of {limits[-1]:,.0f}", file=sys.stderr)
    during = running.metrics()
    begun = time.perf_counter()
    running.flush(600)
    return summary(outcomes, limits, len(body), before, during) | {"drain_seconds": time.perf_counter() - begun}


def summary(
    outcomes: list[dict[str, Any]], limits: list[float], size: int, before: dict[str, float], during: dict[str, float]
) -> dict[str, Any]:
    """The record of a run."""
    typical = {
        name: float(np.median([outcome[name] for outcome in outcomes]))
        for name in outcomes[0]
        if isinstance(outcomes[0][name], float | int)
    }
    # Each round against the limit just before and just after it.
    rates = np.array([outcome["batches"] / outcome["seconds"] for outcome in outcomes])
    took = sum(outcome["seconds"] for outcome in outcomes) + LIMIT_SECONDS * len(outcomes)
    flushed = "onerec_collector_batches_committed_total"
    flushes = "onerec_collector_commit_seconds_count"
    stored = sum(value - before.get(name, 0.0) for name, value in during.items() if "events_uploaded_total" in name)
    return {
        "events_per_second": float(np.median([o["events"] / o["seconds"] for o in outcomes])),
        "batches_per_second": float(np.median(rates)),
        "fsync_limit": float(np.median(limits)),
        "share_of_fsync_limit": float(np.median(rates / ((np.array(limits[1:]) + limits[:-1]) / 2))),
        "p50_ms": typical["p50_ms"],
        "p99_ms": typical["p99_ms"],
        "batches_per_flush": (during[flushed] - before[flushed]) / max(1.0, during[flushes] - before[flushes]),
        "uploaded_events_per_second": stored / took,
        "refused": int(sum(outcome["refused"] for outcome in outcomes)),
        "batch_bytes": size,
        "collector_core_share": typical["collector_core_share"],
        "uploader_core_share": typical["uploader_core_share"],
        "s3_core_share": typical["s3_core_share"],
        "load_core_share": typical["core_share"],
        "collector_us_per_batch": 1e6 * typical["collector_core_share"] / float(np.median(rates)),
    }


def main(
    seconds: Annotated[float, typer.Option(help="Length of each of the rounds.")] = 10.0,
    clients: Annotated[int, typer.Option(help="Concurrent connections.")] = 16,
    rounds: Annotated[int, typer.Option(help="Load and limit take turns so often.")] = 3,
    disk_ms: Annotated[float, typer.Option(help="Let every flush take so long, in the limit too.")] = 0.0,
    crash_: Annotated[int, typer.Option("--crash", help="Afterwards kill the collector so often.")] = 0,
    quick: Annotated[bool, typer.Option(help="Under two minutes.")] = False,
) -> None:
    """Measures the collector, and kills it."""
    if quick:
        seconds, rounds, crash_ = min(seconds, 4.0), min(rounds, 2), min(crash_, 3)
    record: dict[str, Any] = {"clients": clients}
    with servers(disk_ms=disk_ms) as running:
        record |= sustained(running, clients, seconds, disk_ms, rounds)
    if not disk_ms:
        # The same on a disk that takes a millisecond, in one round.
        with servers(disk_ms=1.0) as running:
            slow = sustained(running, clients, min(seconds, 5.0), 1.0, 1)
        record |= {"share_at_1_ms": slow["share_of_fsync_limit"], "p99_ms_at_1_ms": slow["p99_ms"]}
    if crash_:
        with servers() as running:
            record |= crash(running, crash_)
    harness.table("intake", ["figure", "value"], record.items())
    harness.finish({"quick": quick, **record})


if __name__ == "__main__":
    typer.run(main)
