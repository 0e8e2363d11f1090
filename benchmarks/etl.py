"""From an exposure log on disk to training sequences: rows per second, peak memory and growth, against plain pandas.

A synthetic log (DuckDB, deterministic) of time-ordered Parquet files, one in a hundred rows delivered twice, goes
through ``features.histories.etl``: partition by user, build parts, assemble sequences and the index of requests. pandas
does the same with the log in memory: read, drop repeats, sort, count what precedes each request, write. At the size
where both run their indexes are compared row by row. Left out: point-in-time features, which take their time in Feast.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import typer

from benchmarks import harness
from features.histories.etl import EtlConfig, sequences_of_files
from features.histories.sequences import Sequences
from features.histories.windows import is_positive
from features.schema import FLAGS, SOURCES

ITEMS = 100_000
ROWS_OF_A_USER = 40
FILE_ROWS = 1_000_000
REPEATED = 100
"""One row in so many is delivered twice."""
START_MS = 1_700_000_000_000

app = typer.Typer(add_completion=False)


def write_log(folder: Path, rows: int) -> list[Path]:
    """EXPOSURE rows in order of time, in files of at most FILE_ROWS."""
    folder.mkdir(parents=True)
    users = max(rows // ROWS_OF_A_USER, 2)
    step = 30 * 86_400_000 / rows
    flags = ", ".join(
        f"hash(i, {seed}) % 1000 < {300 if name in ('click', 'long_view') else 20} AS {name}"
        for seed, name in enumerate(FLAGS, 10)
    )
    files = []
    with duckdb.connect() as connection:
        for first in range(0, rows, FILE_ROWS):
            files.append(folder / f"{first:012d}.parquet")
            last = min(first + FILE_ROWS, rows)
            connection.execute(
                f"""COPY (
                WITH drawn AS (
                    SELECT i, floor({users} * pow((hash(i, 1) % 1000000) / 1e6, 1.5))::BIGINT AS u,
                           floor({ITEMS} * pow((hash(i, 2) % 1000000) / 1e6, 2))::BIGINT AS item,
                           ({START_MS} + floor(i * {step}))::BIGINT AS ms, 5000 + hash(i, 3) % 60000 AS duration
                    FROM (SELECT range AS i FROM range({first}, {last})
                          UNION ALL SELECT range FROM range({first}, {last}, {REPEATED}))
                )
                SELECT md5(i::VARCHAR) AS exposure_id, 'r' || (ms // 3600000) AS request_id, 'u' || u AS user_id,
                       'i' || item AS item_id, NULL::INTEGER[] AS sid, (hash(i, 4) % 10)::INTEGER AS position,
                       make_timestamptz(ms * 1000) AS event_time, '{SOURCES[2]}' AS source,
                       NULL::VARCHAR AS model_version, NULL::FLOAT[] AS log_probs, duration::BIGINT AS duration_ms,
                       (duration * ((hash(i, 5) % 1000) / 1000.0))::BIGINT AS play_ms, {flags}
                FROM drawn ORDER BY ms
                ) TO '{files[-1]}' (FORMAT PARQUET, COMPRESSION ZSTD)"""
            )
    return files


def item_ids() -> pa.Array:
    """The catalogue."""
    return pa.array([f"i{item}" for item in range(ITEMS)])


def with_pandas(files: list[Path], folder: Path) -> pd.DataFrame:
    """The same work with the whole log in memory; returns the index of requests."""
    folder.mkdir(parents=True)
    log = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True).drop_duplicates("exposure_id")
    log = log.sort_values(["user_id", "event_time", "exposure_id"], ignore_index=True)
    log["item"] = pd.Index(item_ids().to_pylist()).get_indexer(log["item_id"])
    labels = log[list(FLAGS)].to_numpy(np.int64) @ (1 << np.arange(len(FLAGS)))
    log["positive"] = is_positive(log["play_ms"].to_numpy(), log["duration_ms"].to_numpy(), labels)
    by_user = log.groupby("user_id", sort=False)
    log["nth"] = by_user.cumcount()
    log["nth_positive"] = by_user["positive"].cumsum() - log["positive"]
    at_once = log.groupby(["user_id", "event_time"], sort=False)
    log["before"], log["positive_before"] = at_once["nth"].transform("min"), at_once["nth_positive"].transform("min")
    requests = log.groupby(["user_id", "request_id"], sort=False).agg(
        time=("event_time", "min"), before=("before", "min"), positive=("positive_before", "min"), size=("nth", "size")
    )
    requests = requests.sort_values("time", kind="stable").reset_index()
    log.to_parquet(folder / "exposures.parquet")
    requests.to_parquet(folder / "requests.parquet")
    return requests


def index_of(folder: Path) -> pd.DataFrame:
    """The index of requests as ``with_pandas`` returns it, from the sequences on disk."""
    sequences = Sequences(folder / "sequences")
    found, columns = sequences.requests, sequences.columns
    users = columns["users"]
    return pd.DataFrame(
        {
            "user_id": found.user_ids,
            "request_id": found.request_ids,
            "time": pd.to_datetime(found.times_ms, unit="ms", utc=True),
            "before": columns["requests"]["before"] - users["start"][found.user],
            "positive": columns["requests"]["positive_before"] - users["positive_start"][found.user],
            "size": np.diff(found.offsets),
        }
    )


def same_index(folder: Path, expected: pd.DataFrame) -> bool:
    """Whether both wrote the same requests with the same counts of earlier events."""
    keys = ["user_id", "request_id"]
    mine, theirs = (frame.sort_values(keys, ignore_index=True) for frame in (index_of(folder), expected))
    return all(np.array_equal(mine[name].to_numpy(), theirs[name].to_numpy()) for name in (*keys, "before", "positive"))


@app.command("measure", hidden=True)
def measure(log: Path, output: Path, executor: str) -> None:
    """One run in a process of its own, so that its peak is its own; prints JSON."""
    files = sorted(log.glob("*.parquet"))
    start = time.perf_counter()
    with harness.PeakMemory() as memory:
        counts = sequences_of_files(
            files,
            item_ids(),
            output,
            scratch=output / "scratch",
            config=EtlConfig(executor=executor),  # type: ignore[arg-type]  # checked there
            progress=lambda done, total: print(f"  part {done} of {total}", file=sys.stderr),
        )
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_gb": memory.gigabytes, **counts}))


def measured(log: Path, output: Path, executor: str = "process") -> dict[str, float]:
    """``measure`` in a child; the output's scratch is removed."""
    command = [sys.executable, "-m", "benchmarks.etl", "measure", str(log), str(output), executor]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    shutil.rmtree(output / "scratch")
    return found


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, under two minutes.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where to work; needs 12 GB, 1 GB when quick.")] = None,
) -> None:
    """Measures growth and peak over three sizes, Ray Data at the largest, and pandas at one."""
    if context.invoked_subcommand is not None:
        return
    sizes = (100_000, 400_000, 1_600_000) if quick else (1_250_000, 5_000_000, 20_000_000)
    shared = 400_000 if quick else 2_000_000
    with tempfile.TemporaryDirectory(prefix="onerec-bench-etl-", dir=folder) as scratch:
        runs = [_one(Path(scratch), size, "process") for size in sizes]
        ray = _one(Path(scratch), sizes[-1], "ray")
        ours, theirs, same = _against_pandas(Path(scratch), shared)
    largest = runs[-1]
    record = {
        "rows_per_second": sizes[-1] / largest["seconds"],
        "peak_gb": largest["peak_gb"],
        "ratio_to_pandas": theirs / ours,
        "scaling_exponent": harness.exponent(sizes, [run["seconds"] for run in runs]),
        "rows": sizes[-1],
        "seconds": [run["seconds"] for run in runs],
        "sizes": list(sizes),
        "pandas_rows": shared,
        "pandas_seconds": theirs,
        "our_seconds": ours,
        "same_index_as_pandas": same,
        "ray_rows_per_second": sizes[-1] / ray["seconds"],
        "ray_peak_gb": ray["peak_gb"],
        "quick": quick,
    }
    names = [*(f"{size:,}" for size in sizes), f"{sizes[-1]:,}, Ray Data"]
    shown = zip(names, (*sizes, sizes[-1]), (*runs, ray), strict=True)
    rows = [(name, run["seconds"], size / run["seconds"], run["peak_gb"]) for name, size, run in shown]
    harness.table("Exposures to training sequences", ("rows", "seconds", "rows/s", "peak GB"), rows)
    harness.table(f"{shared:,} rows", ("", "seconds"), [("this", ours), ("pandas", theirs)])
    harness.finish(record)


def _one(scratch: Path, rows: int, executor: str) -> dict[str, float]:
    log = scratch / f"log-{rows}"
    if not log.exists():
        print(f"writing a log of {rows:,} rows", file=sys.stderr)
        write_log(log, rows)
    print(f"{rows:,} rows, executor {executor}", file=sys.stderr)
    found = measured(log, scratch / "out", executor)
    shutil.rmtree(scratch / "out")
    return found


def _against_pandas(scratch: Path, rows: int) -> tuple[float, float, bool]:
    """Seconds of both, taking turns, and whether they agree."""
    files = write_log(scratch / "shared", rows)
    ours, theirs = [], []
    for turn in range(2):
        print(f"{rows:,} rows against pandas, turn {turn + 1} of 2", file=sys.stderr)
        for name in ("ours", "pandas"):
            shutil.rmtree(scratch / name, ignore_errors=True)
        ours.append(measured(scratch / "shared", scratch / "ours")["seconds"])
        start = time.perf_counter()
        index = with_pandas(files, scratch / "pandas")
        theirs.append(time.perf_counter() - start)
    return min(ours), min(theirs), same_index(scratch / "ours", index)


if __name__ == "__main__":
    app()
