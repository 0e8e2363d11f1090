"""Rows that break the schema or contradict each other, kept with the reason: nothing is dropped in silence.

They lie as Parquet of (kind, reason, row as JSON) under ``rejected/<stage>/<sha256>.parquet``; the key is
content-addressed, so that repeating a stage rejects nothing twice.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from features.storage import Storage, table_bytes

ROOT = "rejected"

SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("kind", "reason", "row")])


@dataclass(frozen=True)
class Rejected:
    """One refused row; ``row`` is whatever was there, printable as JSON."""

    kind: str
    reason: str
    row: Any


def reject(storage: Storage, stage: str, rows: Sequence[Rejected]) -> str | None:
    """Stores the refused ``rows`` of a stage; returns the key, None when there are none."""
    if not rows:
        return None
    columns = sorted((r.kind, r.reason, json.dumps(r.row, sort_keys=True, default=str)) for r in rows)
    data = table_bytes(pa.table([list(column) for column in zip(*columns, strict=True)], schema=SCHEMA))
    key = f"{ROOT}/{stage}/{hashlib.sha256(data).hexdigest()}.parquet"
    storage.put(key, data, "application/vnd.apache.parquet")
    return key
