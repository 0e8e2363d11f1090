"""The catalogue in object storage: appended parts of ITEM and USER rows, a later part wins per id; and item vectors.

Parts live under ``catalog/items/`` and ``catalog/users/``, named by the sha256 of their rows, so a repeated append
changes nothing but the order. The order is the append time kept in the Parquet metadata, because S3's own
modification time has a resolution of one second. ``catalog/vectors/<version>.parquet`` holds what a bundle's tokenizer
makes of its items, for whoever needs to compare items without loading a model (``features.histories.clusters``).
Left out: deletion (taking an item down is a delta, ``features.deltas``).
"""

import hashlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.histories.clusters import ItemVectors
from features.intake.partitions import in_parallel
from features.schema import ITEM, USER, conform
from features.storage import Storage, table_bytes

ITEMS = "catalog/items"
USERS = "catalog/users"
VECTORS = "catalog/vectors"

_APPENDED = b"onerec.appended_ns"


def append_items(storage: Storage, table: pa.Table) -> str | None:
    """Stores ITEM rows as a new part; returns its key, None when there are no rows; raises ValueError on bad rows."""
    return _append(storage, ITEMS, conform(table, ITEM), "item_id")


def append_users(storage: Storage, table: pa.Table) -> str | None:
    """Stores USER rows as a new part; returns its key, None when there are no rows; raises ValueError on bad rows."""
    return _append(storage, USERS, conform(table, USER), "user_id")


def read_items(storage: Storage) -> pa.Table:
    """All items (ITEM), the latest row of each, sorted by item_id."""
    return _read(storage, ITEMS, ITEM, "item_id")


def read_users(storage: Storage) -> pa.Table:
    """All users (USER), the latest row of each, sorted by user_id."""
    return _read(storage, USERS, USER, "user_id")


def write_vectors(storage: Storage, vectors: ItemVectors) -> str:
    """Stores the vectors of one version, replacing that version's; returns the key."""
    size = vectors.vectors.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors.vectors, np.float32).reshape(-1))
    columns = {
        "item_id": pa.array(vectors.item_ids, pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(flat, size),
    }
    key = f"{VECTORS}/{vectors.version}.parquet"
    storage.put_table(key, pa.table(columns))
    return key


def read_vectors(storage: Storage) -> ItemVectors | None:
    """The vectors of the newest version (versions sort by the time of their data); None before the first."""
    keys = [key for key in storage.keys(f"{VECTORS}/") if key.endswith(".parquet")]
    if not keys:
        return None
    table = storage.get_table(keys[-1])
    vector = table.column("vector").combine_chunks()
    return ItemVectors(
        item_ids=table.column("item_id").to_pandas().to_numpy(object),
        vectors=vector.flatten().to_numpy().reshape(table.num_rows, vector.type.list_size),
        version=keys[-1].removeprefix(f"{VECTORS}/").removesuffix(".parquet"),
    )


def _append(storage: Storage, root: str, table: pa.Table, id_column: str) -> str | None:
    if not table.num_rows:
        return None
    empty = pc.sum(pc.equal(table.column(id_column), "")).as_py()
    if empty:
        raise ValueError(f"{empty} of {table.num_rows} rows have an empty {id_column}; give each row its id")
    rows = table.combine_chunks()
    key = f"{root}/{hashlib.sha256(table_bytes(rows)).hexdigest()}.parquet"
    storage.put_table(key, rows.replace_schema_metadata({_APPENDED: str(time.time_ns())}))
    return key


def _read(storage: Storage, root: str, schema: pa.Schema, id_column: str) -> pa.Table:
    keys = [key for key in storage.keys(f"{root}/") if key.endswith(".parquet")]
    parts = list(zip(keys, in_parallel(storage.get_table, keys), strict=True))
    parts.sort(key=lambda part: (_appended_ns(part[1]), part[0]))
    tables = [conform(table, schema).replace_schema_metadata(None) for _, table in parts]
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    codes = pc.dictionary_encode(table.column(id_column).combine_chunks()).indices.to_numpy()
    # The last row of an id is the first one of the reversed table.
    _, last = np.unique(codes[::-1], return_index=True)
    return table.take(pa.array(table.num_rows - 1 - last)).sort_by(id_column).combine_chunks()


def _appended_ns(table: pa.Table) -> int:
    return int((table.schema.metadata or {}).get(_APPENDED, 0))
