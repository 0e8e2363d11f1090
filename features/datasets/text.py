"""CSV and Parquet files of a log read as text: a row that does not parse must be shown as it was, not as NaN.

A log that is small is one frame in memory. A larger one is streamed through DuckDB into partitions of whole users, and
each partition is a frame of the same columns: memory stays that of one partition. Left out: compressed CSV.
"""

import csv
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from features.datasets.dataset import Chunk
from features.histories.etl import EtlConfig, partition_by_user

CHUNK_BYTES = 64_000_000
"""Files of so many bytes together are one frame: about a million rows, 1.5 GB as Python strings."""
BLOCK_BYTES = 8_000_000
BATCH_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Log files of one layout; ``required`` columns must be in each of them."""

    files: Sequence[Path]
    required: tuple[str, ...]
    user: str
    chunk_bytes: int = CHUNK_BYTES

    @property
    def partitions(self) -> int:
        """How many frames there are, at most."""
        return max(1, math.ceil(sum(file.stat().st_size for file in self.files) / self.chunk_bytes))

    def frames(self, scratch: Path, skip: Collection[str] = ()) -> Iterator[tuple[str, pd.DataFrame]]:
        """(key, all columns as strings with the ``file`` and ``malformed``), whole users in each, without ``skip``."""
        names = list(dict.fromkeys(name for file in self.files for name in header(file, self.required)))
        names += [name for name in ("file", "malformed") if name not in names]
        if self.partitions == 1:
            if "all" not in skip:
                batches = [batch for file in self.files for batch in text_batches(file, names)]
                yield "all", pa.Table.from_batches(batches, _text(names)).to_pandas()
            return
        stream = (batch for file in self.files for batch in text_batches(file, names))
        reader = pa.RecordBatchReader.from_batches(_text(names), stream)
        query, folder = "SELECT * FROM streamed", scratch / "rows"
        for path in partition_by_user(query, self.user, self.partitions, folder, EtlConfig(), rows=reader):
            if path.name not in skip:
                yield path.name, pq.read_table(path, partitioning=None).to_pandas()

    def first_users(self, distinct: int) -> set[str]:
        """The first ``distinct`` different users, fewer when the files end before; raises ValueError on bad columns."""
        found: set[str] = set()
        for file in self.files:
            names = header(file, self.required)
            for batch in text_batches(file, names):
                users = batch.column(names.index(self.user))
                found |= set(users.filter(pc.not_equal(users, "")).unique().to_pylist())
                if len(found) >= distinct:
                    return set(sorted(found)[:distinct])
        return found


def header(path: Path, required: tuple[str, ...] = ()) -> list[str]:
    """The names of the columns; raises ValueError when one of ``required`` is not among them."""
    if path.suffix == ".parquet":
        try:
            names = pq.read_schema(path).names
        except (pa.ArrowInvalid, OSError) as error:
            said = getattr(error, "strerror", None) or error
            raise ValueError(f"{path} is not a Parquet file: {said}") from error
    else:
        try:
            with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
                names = next(csv.reader(file), [])
        except (OSError, csv.Error) as error:
            why = error.strerror if isinstance(error, OSError) else f"its first line is no header: {error}"
            raise ValueError(f"{path} cannot be read: {why}; give a CSV file that this user can read") from error
    missing = [name for name in required if name not in names]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise ValueError(
            f"{path} lacks the column{plural} {', '.join(missing)}; it has {', '.join(filter(None, names)) or 'none'}: "
            "give the file as it was published, header included"
        )
    return names


def read_text(path: Path, required: tuple[str, ...]) -> pd.DataFrame:
    """A whole file as text."""
    names = [*header(path, required), "file", "malformed"]
    return pa.Table.from_batches(text_batches(path, names), _text(names)).to_pandas()


def text_batches(path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a file as strings in the columns ``names``, "" for nulls and for columns it lacks.

    ``file`` is its name; a CSV row of another length than the header stands whole in ``malformed``.
    """
    parquet = path.suffix == ".parquet"
    for batch, malformed in _parquet(path) if parquet else _csv(path):
        columns = {name: batch.column(name) for name in batch.schema.names}
        empty = pa.array([""] * batch.num_rows, pa.string())
        columns |= {"file": pa.array([path.name] * batch.num_rows, pa.string())}
        yield pa.record_batch([as_strings(columns[name]) if name in columns else empty for name in names], _text(names))
        if malformed:
            rows = [dict.fromkeys(names, "") | {"file": path.name, "malformed": text} for text in malformed]
            yield pa.RecordBatch.from_pylist(rows, _text(names))
            malformed.clear()


def _csv(path: Path) -> Iterator[tuple[pa.RecordBatch, list[str]]]:
    names = header(path)
    if not names:
        return
    malformed: list[str] = []

    def keep_malformed(row: pa.csv.InvalidRow) -> str:
        malformed.append(row.text)
        return "skip"

    convert = pa.csv.ConvertOptions(column_types={n: pa.string() for n in names}, strings_can_be_null=False)
    parse = pa.csv.ParseOptions(invalid_row_handler=keep_malformed)
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    try:
        with pa.csv.open_csv(path, read_options=read, parse_options=parse, convert_options=convert) as reader:
            for batch in reader:
                yield batch, malformed
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}); give it comma-separated and in UTF-8") from error


def _parquet(path: Path) -> Iterator[tuple[pa.RecordBatch, list[str]]]:
    for batch in parquet_batches(path):
        yield batch, []


def parquet_batches(
    path: Path, columns: Sequence[str] | None = None, rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet file with a sound footer; raises ValueError where its pages are damaged."""
    batches = pq.ParquetFile(path).iter_batches(batch_size=rows, columns=columns)
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is damaged ({reason}); copy it again, or write it anew") from error


def as_strings(column: pa.Array) -> pa.Array:
    """``column`` as strings without nulls, which become ""."""
    if pa.types.is_string(column.type) and not column.null_count:
        return column
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_nested(column.type):
        return pa.array([str(value) for value in column.to_pylist()], pa.string())
    return column.cast(pa.string()).fill_null("")


def _text(names: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def text_chunks(
    frames: Iterable[tuple[str, pd.DataFrame]],
    parse: Callable[[pd.DataFrame], tuple[pd.DataFrame, pd.Series]],
    exposures: Callable[[pd.DataFrame], pa.Table],
) -> Iterator[Chunk]:
    """A chunk of each of ``TextFiles.frames``, exact repeats removed.

    ``parse`` gives the columns that are read and, per row, why it is rejected ("" = valid); ``exposures`` makes
    EXPOSURE rows of the columns of valid rows.
    """
    for key, rows in frames:
        duplicated = rows.drop(columns="file").duplicated()
        raw = rows[~duplicated].reset_index(drop=True)
        log, reasons = parse(raw)
        valid = reasons == ""
        yield Chunk(
            key=key,
            exposures=exposures(log[valid]),
            rejected=as_text(raw[~valid].assign(reason=reasons[~valid])),
            duplicates=int(duplicated.sum()),
            raw=raw[valid],
        )


def as_text(rejected: pd.DataFrame) -> pa.Table:
    """``rejected`` as a table of strings."""
    fields = [pa.field(str(name), pa.string()) for name in rejected.columns]
    return pa.Table.from_pandas(rejected, schema=pa.schema(fields), preserve_index=False)


def reject(reasons: pd.Series, wrong: pd.Series, reason: str) -> None:
    """Writes ``reason`` where ``wrong`` holds and no reason stands yet: the first that applies wins."""
    reasons[wrong & (reasons == "")] = reason
