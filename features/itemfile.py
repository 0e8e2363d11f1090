"""Reads a file of items (the ITEM schema) that a person wrote: Parquet, CSV or JSON lines.

``item_id`` and ``duration_ms`` are required; title, tags, author_id, music_id and upload_time may be left out. In CSV,
tags are separated by ``|``. Left out: other column names (an importer's column map does that, ``features.datasets``).
"""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from features.schema import ITEM, conform

TEXT = ("item_id", "title", "author_id", "music_id")


def _read_csv(path: str) -> pa.Table:
    # As text from the start: an id such as 007 must not become a number.
    types = dict.fromkeys((*TEXT, "tags"), pa.string())
    return pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=types))


READERS = {".parquet": pq.read_table, ".csv": _read_csv, ".jsonl": pa.json.read_json, ".json": pa.json.read_json}


def read_items_file(path: Path) -> pa.Table:
    """ITEM rows of ``path``; raises ValueError saying what is wrong with it and what is expected."""
    if path.suffix not in READERS:
        raise ValueError(f"{path.name}: items are read from {', '.join(READERS)} files; give one of these")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a file of items")
    try:
        table = READERS[path.suffix](str(path))
        if not table.num_rows:
            raise ValueError("it holds no rows")
        unknown = sorted(set(table.column_names) - set(ITEM.names))
        if unknown:
            raise ValueError(f"it has unknown columns {', '.join(unknown)}; an item has {', '.join(ITEM.names)}")
        items = conform(_typed(table), ITEM)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    _check(items, path)
    return items


def _typed(table: pa.Table) -> pa.Table:
    """``table`` with ids that look like numbers as text, and tags of one string split."""
    for name in TEXT:
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, table.column(name).cast(pa.string()))
    if "tags" in table.column_names and not pa.types.is_list(table.column("tags").type):
        tags = pc.split_pattern(table.column("tags").cast(pa.string()), "|")
        table = table.set_column(table.column_names.index("tags"), "tags", tags)
    return table


def _check(items: pa.Table, path: Path) -> None:
    ids = items.column("item_id").to_pylist()
    if not all(ids):
        raise ValueError(f"{path}: {ids.count('')} rows have an empty item_id; give each item its id")
    repeated = [item for item, times in Counter(ids).items() if times > 1]
    if repeated:
        raise ValueError(f"{path}: item {repeated[0]!r} stands there more than once; give each item one row")
    short = pc.sum(pc.less_equal(items.column("duration_ms"), 0)).as_py()
    if short:
        raise ValueError(f"{path}: {short} items have a duration_ms that is not positive; durations are milliseconds")
