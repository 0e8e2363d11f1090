"""What changes in the catalogue between bundles: new items of one version, take-downs in all of them.

``catalog/<version>/<n>-<digest>.parquet`` holds ITEM rows with the SIDs that the version's frozen codebooks gave them;
``catalog/blocks/<n>-<digest>.json`` blocks or unblocks items whatever version is served, so that a take-down survives
retraining and rollback. Each is one object, hence atomic; the digest of the content in its name lets a reader refuse
an altered one, and keeps two writers that chose the same number apart. Readers follow the names, which never change
their meaning. Left out: changing or removing a row of the catalogue, and merging many small deltas.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.schema import ITEM, conform
from features.storage import Storage, table_bytes

ROOT = "catalog"
BLOCKS = f"{ROOT}/blocks"
DELTA = pa.schema([*ITEM, pa.field("sid", pa.list_(pa.int32()), nullable=False)])
"""An item and its SID."""

_NAME = re.compile(r"(\d{6,})-([0-9a-f]{16})\.(?:parquet|json)")


class DeltaCorrupt(ValueError):
    """A stored delta is altered or unreadable; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Why and since when an item is taken down."""

    item_id: str
    reason: str
    at: str


def write_delta(storage: Storage, version: str, items: pa.Table, sids: np.ndarray) -> str:
    """Stores ITEM rows with their SIDs [n, levels] as the next delta of ``version``; returns its key."""
    if not items.num_rows or sids.ndim != 2 or len(sids) != items.num_rows:
        raise ValueError(f"{items.num_rows} items and SIDs of shape {sids.shape}; expected a SID for each of them")
    flat = pa.array(np.ascontiguousarray(sids, np.int32).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, sids.shape[1]).cast(pa.list_(pa.int32()))
    table = conform(conform(items, ITEM).append_column("sid", lists), DELTA)
    return _put(storage, f"{ROOT}/{version}", table_bytes(table.combine_chunks()), "parquet")


def delta_keys(storage: Storage, version: str) -> list[str]:
    """The deltas of ``version``, oldest first."""
    return _keys(storage, f"{ROOT}/{version}")


def read_delta(storage: Storage, key: str) -> tuple[pa.Table, np.ndarray]:
    """The ITEM rows of a delta and their SIDs int32 [n, levels]; raises DeltaCorrupt."""
    data = _get(storage, key)
    try:
        table = conform(pq.read_table(pa.BufferReader(data)), DELTA)
        sid = table.column("sid").combine_chunks()
        return table.select(ITEM.names), sid.flatten().to_numpy().reshape(table.num_rows, -1)
    except (pa.ArrowException, ValueError) as error:
        raise DeltaCorrupt(
            f"delta {key} cannot be read ({error}); its items are not servable, add them again"
        ) from error


def block(storage: Storage, item_ids: Iterable[str], reason: str = "") -> str:
    """Takes items down in every version; returns the key. Raises ValueError for no ids or an empty one."""
    return _put_blocks(storage, "block", item_ids, reason)


def unblock(storage: Storage, item_ids: Iterable[str], reason: str = "") -> str:
    """Lets items be served again; returns the key. Raises ValueError for no ids or an empty one."""
    return _put_blocks(storage, "unblock", item_ids, reason)


def block_keys(storage: Storage) -> list[str]:
    """All take-downs and their withdrawals, oldest first."""
    return _keys(storage, BLOCKS)


def read_block(storage: Storage, key: str) -> dict[str, Any]:
    """``action`` (block or unblock), ``item_ids``, ``reason`` and ``at`` of one take-down; raises DeltaCorrupt."""
    try:
        record: dict[str, Any] = json.loads(_get(storage, key))
        if record["action"] not in ("block", "unblock") or not isinstance(record["item_ids"], list):
            raise ValueError(f"the action is {record['action']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaCorrupt(f"take-down {key} cannot be read ({error}); block its items again") from error
    return record


def fold_blocks(records: Iterable[dict[str, Any]]) -> dict[str, Block]:
    """Item id -> its block, after ``records`` in the order they were made."""
    blocked: dict[str, Block] = {}
    for record in records:
        for item_id in record["item_ids"]:
            if record["action"] == "block":
                blocked[item_id] = Block(item_id=item_id, reason=str(record["reason"]), at=str(record["at"]))
            else:
                blocked.pop(item_id, None)
    return blocked


def blocked(storage: Storage) -> dict[str, Block]:
    """Every item that is taken down now; raises DeltaCorrupt."""
    return fold_blocks(read_block(storage, key) for key in block_keys(storage))


def _put_blocks(storage: Storage, action: str, item_ids: Iterable[str], reason: str) -> str:
    ids: Sequence[str] = sorted(set(item_ids))
    if not ids or not all(ids):
        raise ValueError(
            f"no item to {action}: {len(ids)} ids were given, one of them empty" if ids else "no item given"
        )
    record = {"action": action, "item_ids": ids, "reason": reason, "at": datetime.now(UTC).isoformat()}
    return _put(storage, BLOCKS, json.dumps(record, sort_keys=True).encode(), "json")


def _put(storage: Storage, root: str, data: bytes, suffix: str) -> str:
    numbers = [int(match[1]) for key in _keys(storage, root) if (match := _NAME.search(key))]
    number = max(numbers, default=0) + 1
    key = f"{root}/{number:06d}-{hashlib.sha256(data).hexdigest()[:16]}.{suffix}"
    storage.put(key, data)
    return key


def _get(storage: Storage, key: str) -> bytes:
    data = storage.get(key)
    match = _NAME.search(key)
    if match is None or hashlib.sha256(data).hexdigest()[:16] != match[2]:
        raise DeltaCorrupt(
            f"{key} is corrupt: its content is not what its name says; write it again and remove this one"
        )
    return data


def _keys(storage: Storage, root: str) -> list[str]:
    return [key for key in storage.keys(f"{root}/") if _NAME.search(key)]
