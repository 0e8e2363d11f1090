"""Reads a file of items (the ITEM schema) that a person wrote: Parquet, CSV or JSON lines.

``item_id`` and ``duration_ms`` are required; title, tags, author_id, music_id and upload_time may be left out. In CSV,
tags are separated by ``|``. Every value is looked at as text, so that a wrong one can be named as it stands there, with
its row (counted from 1, a CSV header is none) and column. Left out: other column names (an importer's column map does
that, ``features.datasets``).
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from features.datasets.columns import milliseconds
from features.schema import ITEM, TIME, conform

TEXT = ("item_id", "title", "author_id", "music_id")
EXPECTED = {
    "item_id": "an id that no other row has",
    **dict.fromkeys(("title", "author_id", "music_id"), "text"),
    "tags": "a list of words; in CSV separated by |",
    "duration_ms": "a whole number of milliseconds above 0, such as 15000",
    "upload_time": "a time, such as 2026-01-15T00:00:00Z",
}
LONGEST_MS = 2**53
"""Beyond it a float64 is no exact number."""
LATEST_MS = 253_402_300_800_000
"""The year 10000."""


def read_items_file(path: Path) -> pa.Table:
    """ITEM rows of ``path``; raises ValueError saying what is wrong with it, where, and what is expected."""
    if path.suffix not in READERS:
        raise ValueError(f"{path.name}: items are read from {', '.join(READERS)} files; give one of these")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a file of items")
    try:
        table = READERS[path.suffix](path)
        if not table.num_rows:
            raise ValueError("it holds no rows")
        names = table.column_names
        if unknown := sorted(set(names) - set(ITEM.names)):
            raise ValueError(f"it has unknown columns {', '.join(unknown)}; an item has {', '.join(ITEM.names)}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"it has the column {', '.join(twice)} twice; give each column once")
        return conform(pa.table({name: _column(name, table.column(name)) for name in names}), ITEM)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); give it in UTF-8") from error
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_csv(path: Path) -> pa.Table:
    rejected: list[pa.csv.InvalidRow] = []

    def keep(row: pa.csv.InvalidRow) -> str:
        rejected.append(row)
        return "skip"

    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        names = next(csv.reader(file), [])
    try:
        table = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False),  # only then rows have numbers
            parse_options=pa.csv.ParseOptions(invalid_row_handler=keep),
            # As text from the start: an id such as 007 must not become a number.
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"it cannot be read as CSV ({error}); give it comma-separated and in UTF-8") from error
    if rejected:
        row = rejected[0]
        raise ValueError(
            f"row {row.number - 1} is {row.text!r}, of {row.actual_columns} columns; "
            f"expected {row.expected_columns}, as in the header"
        )
    return table


def _read_json(path: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_object(number, line.strip()))
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _json_column(name, [row.get(name) for row in rows]) for name in names})


def _object(number: int, line: str) -> dict[str, Any]:
    shown = f"line {number} is {line[:60]!r}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{shown}, which is no JSON ({error}); expected an object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f'{shown}; expected an object a line, such as {{"item_id": "a", "duration_ms": 15000}}')
    return row


def _json_column(name: str, values: list[Any]) -> pa.Array:
    """Text, of numbers and the like as they are written; ``tags`` are lists of it."""
    for row, value in enumerate(values, 1):
        parts = value if isinstance(value, list) and name == "tags" else [value]
        if any(isinstance(part, list | dict) for part in parts):
            raise _wrong(name, row, value)
    if name == "tags":
        return pa.array([_tags(value) for value in values], pa.list_(pa.string()))
    return pa.array([None if value is None else _written(value) for value in values], pa.string())


def _tags(value: Any) -> list[str] | None:
    if isinstance(value, list):
        return [_written(part) for part in value]
    return _written(value).split("|") if value else None


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".parquet": pq.read_table,
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
}


def _column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """The column as ITEM has it; raises ValueError naming the first row whose value cannot be."""
    if name == "tags" and pa.types.is_list(column.type):
        return column
    try:
        text = column.cast(pa.string())
    except pa.ArrowException:
        raise ValueError(f"column {name!r} is of type {column.type}; expected {EXPECTED[name]}") from None
    if name == "tags":
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.list_(pa.string())), pc.split_pattern(text, "|"))
    if name == "item_id":
        return _ids(text)
    if name in TEXT:
        return text
    return _durations(text) if name == "duration_ms" else _times(text)


def _ids(text: pa.ChunkedArray) -> pa.ChunkedArray:
    values = text.to_pandas()
    _refuse("item_id", values, values.isna() | (values == ""))
    repeated = values.duplicated()
    if repeated.any():
        row = int(np.argmax(repeated))
        first = int(np.argmax(values == values[row]))
        raise ValueError(
            f"item {values[row]!r} stands there more than once, in rows {first + 1} and {row + 1}; "
            "give each item one row"
        )
    return text


def _durations(text: pa.ChunkedArray) -> pa.Array:
    values = text.to_pandas()
    number = pd.to_numeric(values, errors="coerce")
    _refuse("duration_ms", values, ~((number > 0) & (number < LONGEST_MS) & (number % 1 == 0)))
    return pa.array(number.to_numpy(np.int64))


def _times(text: pa.ChunkedArray) -> pa.Array:
    values = text.to_pandas()
    stamps = milliseconds(values.fillna(""))
    _refuse("upload_time", values, ~(stamps.abs() < LATEST_MS) & values.notna() & (values != ""))
    return pa.array(stamps.to_numpy(), from_pandas=True).cast(pa.int64()).cast(TIME)


def _refuse(name: str, values: pd.Series, wrong: pd.Series) -> None:
    """Raises ValueError for the first row that is ``wrong``."""
    if wrong.any():
        row = int(np.argmax(wrong))
        value = values[row]
        raise _wrong(name, row + 1, "" if value is None or value != value else value)


def _wrong(name: str, row: int, value: Any) -> ValueError:
    told = repr(value) if value != "" else "empty"
    return ValueError(f"row {row}, column {name!r} is {told}; expected {EXPECTED[name]}")
