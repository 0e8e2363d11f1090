"""From an exposure log of any size to training sequences: DuckDB partitions it by user, one function maps a partition.

1. ``partition_by_user``: DuckDB streams Parquet files into one folder a partition, by a hash of the user.
2. ``write_part`` (features.histories.parts) turns one partition into integer columns. The same function runs in this
   process, one partition after the other, or in Ray Data's workers, on one machine or on a cluster.
3. ``SequenceWriter`` appends the parts, a part at a time, and orders the requests of all by time.

Memory is bounded by DuckDB's limit and one partition per worker, not by the log. A part that is on disk is not built
again, so a killed run goes on where it was. Left out: partitions of one user with more rows than fit in memory.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from features.histories.parts import PART_FILE, ROW_GROUP, ROWS_FILE, Part, part_of, write_part
from features.histories.sequences import PartFeatures, SequenceWriter
from features.intake.partitions import between
from features.schema import EXPOSURE, conform

Progress = Callable[[int, int], None]
Features = Callable[[Part, pa.Table], PartFeatures]
"""Point-in-time features of a part's requests, given the part and its EXPOSURE rows."""

ITEMS_FILE = "item_ids.arrow"
PARTITION = "onerec_part"
"""A column that no log has."""


@dataclass(frozen=True, kw_only=True)
class EtlConfig:
    """How the work is cut."""

    partition_rows: int = 500_000
    """Rows a partition aims at: about 0.5 GB in memory while it is mapped."""
    memory: str = "1GB"
    """DuckDB's limit; beyond it DuckDB spills to the scratch folder."""
    threads: int = 2
    executor: Literal["auto", "process", "ray"] = "auto"
    """``auto`` starts Ray Data from ``ray_rows`` rows on: below, its start alone takes longer than the work."""
    ray_rows: int = 10_000_000
    ray_address: str = ""

    def __post_init__(self) -> None:
        if min(self.partition_rows, self.threads, self.ray_rows) < 1:
            raise ValueError(
                f"partition_rows {self.partition_rows}, threads {self.threads} and ray_rows {self.ray_rows} "
                "must be at least 1"
            )
        if self.executor not in ("auto", "process", "ray"):
            raise ValueError(f"executor {self.executor!r} is unknown; give auto, process or ray")


def sequences_of_table(
    exposures: pa.Table, item_ids: pa.Array, folder: Path, features: Features | None = None
) -> dict[str, int]:
    """Writes exposures.parquet and sequences/ into ``folder`` from EXPOSURE rows in memory; returns counts."""
    part, rows = part_of(exposures, item_ids)
    return assemble([part], [rows], folder, features)


def sequences_of_files(
    files: Sequence[Path],
    item_ids: pa.Array,
    folder: Path,
    *,
    scratch: Path,
    config: EtlConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """As ``sequences_of_table`` from Parquet files of EXPOSURE rows that need not fit in memory."""
    paths = build_parts(files, item_ids, scratch, config=config, progress=progress)
    return assemble(read_parts(paths), read_rows(paths), folder)


def build_parts(
    files: Sequence[Path],
    item_ids: pa.Array,
    scratch: Path,
    *,
    window: tuple[datetime, datetime] | None = None,
    config: EtlConfig | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Partitions Parquet files of EXPOSURE rows by user and builds each part; returns the parts' folders.

    ``window`` keeps rows with start <= event_time < end. ``scratch`` is worked in and resumed from; the caller removes
    it. On a Ray cluster it must be a folder that all machines share.
    """
    config = config or EtlConfig()
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    partitions = math.ceil(rows / config.partition_rows)
    if partitions < 2:
        return _one_part(files, item_ids, scratch, window)
    columns, paths = ", ".join(map(_name, EXPOSURE.names)), ", ".join(map(_text, files))
    selected = f"SELECT {columns} FROM read_parquet([{paths}]){_where(window)}"
    sources = partition_by_user(selected, "user_id", partitions, scratch / "partitions", config)
    (scratch / "parts").mkdir(exist_ok=True)
    with pa.ipc.new_file(scratch / ITEMS_FILE, pa.schema([("item_id", item_ids.type)])) as file:
        file.write_batch(pa.record_batch([item_ids], ["item_id"]))
    parts = [scratch / "parts" / source.name for source in sources]
    work = partial(build_part, items=scratch / ITEMS_FILE)
    _map(work, list(zip(sources, parts, strict=True)), rows, config, progress)
    return parts


def _one_part(
    files: Sequence[Path], item_ids: pa.Array, scratch: Path, window: tuple[datetime, datetime] | None
) -> list[Path]:
    """What ``build_parts`` does when all of the log fits one part: nothing has to be partitioned."""
    tables = [conform(pq.read_table(file, partitioning=None), EXPOSURE) for file in files]
    exposures = pa.concat_tables(tables) if tables else EXPOSURE.empty_table()
    exposures = between(exposures, *(window or (None, None)))
    if not exposures.num_rows:
        return []
    write_part(exposures, scratch / "parts" / "all", item_ids)
    return [scratch / "parts" / "all"]


def read_parts(paths: Sequence[Path]) -> Iterator[Part]:
    """The parts in ``paths``, mapped into memory, one at a time."""
    for path in paths:
        yield Part.load(path / PART_FILE)


def read_rows(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The EXPOSURE rows of each part in ``paths``, one part at a time."""
    for path in paths:
        yield pq.read_table(path / ROWS_FILE)


def partition_by_user(
    selected: str,
    user: str,
    partitions: int,
    folder: Path,
    config: EtlConfig,
    *,
    rows: pa.RecordBatchReader | None = None,
) -> list[Path]:
    """Streams the rows of a DuckDB query into ``folder``, one sub-folder of Parquet files per hash of column ``user``.

    The query reads the stream ``rows`` by the name streamed. Returns the sub-folders that have rows. A finished
    partitioning is used again: the caller keeps one folder a query.
    """
    import duckdb

    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        options: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": config.memory,
            "threads": config.threads,
            "preserve_insertion_order": False,
            "temp_directory": str(folder.with_name("spill")),
        }
        with duckdb.connect(config=options) as connection:
            if rows is not None:
                connection.register("streamed", rows)
            connection.execute(
                f"COPY (SELECT *, hash({_name(user)}) % {partitions} AS {PARTITION} FROM ({selected})) "
                f"TO {_text(folder)} (FORMAT PARQUET, COMPRESSION LZ4_RAW, PARTITION_BY ({PARTITION}))"
            )
        (folder / "done").touch()
    found = folder.glob(f"{PARTITION}=*")
    return sorted(found, key=lambda path: int(path.name.partition("=")[2]))


def build_part(source: Path, target: Path, items: Path) -> dict[str, int]:
    """``write_part`` of a folder of Parquet files unless that is done: what every executor runs."""
    if target.exists():
        return {}
    with pa.memory_map(str(items)) as mapped:
        item_ids = pa.ipc.open_file(mapped).read_all().column("item_id").combine_chunks()
    return write_part(conform(pq.read_table(source, partitioning=None), EXPOSURE), target, item_ids)


def assemble(
    parts: Iterable[Part], rows: Iterable[pa.Table], folder: Path, features: Features | None = None
) -> dict[str, int]:
    """Appends parts and their EXPOSURE rows into exposures.parquet and sequences/ of ``folder``; returns counts."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = SequenceWriter(folder / "sequences")
    with pq.ParquetWriter(folder / "exposures.parquet", EXPOSURE, compression="zstd") as file:
        for part, exposures in zip(parts, rows, strict=True):
            writer.append(part, features(part, exposures) if features else None)
            file.write_table(exposures, row_group_size=ROW_GROUP)
    counts = writer.close()
    return {
        "exposures": counts["events"],
        "requests": counts["requests"],
        "trained_on": counts["features"],
        "users": counts["users"],
    }


def _map(
    work: Callable[[Path, Path], dict[str, int]],
    jobs: list[tuple[Path, Path]],
    rows: int,
    config: EtlConfig,
    progress: Progress | None,
) -> None:
    """Runs ``work(source, target)`` of every job, here or in Ray Data; errors end it."""
    uses_ray = config.executor == "ray" or (config.executor == "auto" and rows >= config.ray_rows)
    done = _in_ray(work, jobs, config) if uses_ray else (work(*job) for job in jobs)
    for number, _ in enumerate(done, 1):
        if progress is not None:
            progress(number, len(jobs))


def _in_ray(
    work: Callable[[Path, Path], dict[str, int]], jobs: list[tuple[Path, Path]], config: EtlConfig
) -> Iterator[Any]:
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address=config.ray_address or None,
            num_cpus=None if config.ray_address else config.threads,
            include_dashboard=False if not config.ray_address else None,
            log_to_driver=False,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        rows = [{"source": str(source), "target": str(target)} for source, target in jobs]
        mapped = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            lambda row: {**row, **work(Path(row["source"]), Path(row["target"]))}
        )
        yield from mapped.iter_rows()
    finally:
        if started:
            ray.shutdown()


def _name(column: str) -> str:
    """A column in SQL."""
    return '"' + column.replace('"', '""') + '"'


def _text(value: object) -> str:
    """A string in SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def _where(window: tuple[datetime, datetime] | None) -> str:
    if window is None:
        return ""
    start, end = (f"TIMESTAMPTZ '{time.isoformat()}'" for time in window)
    return f" WHERE event_time >= {start} AND event_time < {end}"
