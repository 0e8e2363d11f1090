"""Deltas and take-downs in real object storage: what is written is read, in order, and never altered unnoticed."""

import numpy as np
import pyarrow as pa
import pytest

from features import deltas
from features.deltas import DeltaCorrupt
from features.schema import ITEM, conform


def items(*ids: str) -> pa.Table:
    return conform(pa.table({"item_id": list(ids), "duration_ms": [9_000] * len(ids)}), ITEM)


def test_deltas_of_a_version_come_back_in_order(s3) -> None:
    keys = [deltas.write_delta(s3, "v1", items(f"i{n}", f"j{n}"), np.array([[n, 1, 2], [n, 3, 4]])) for n in range(12)]
    deltas.write_delta(s3, "v10", items("other"), np.array([[0, 0, 0]]))
    assert deltas.delta_keys(s3, "v1") == keys
    table, sids = deltas.read_delta(s3, keys[11])
    assert table.equals(items("i11", "j11"))
    assert sids.tolist() == [[11, 1, 2], [11, 3, 4]]
    assert deltas.delta_keys(s3, "v2") == []


def test_take_downs_fold_in_the_order_they_were_made(s3) -> None:
    deltas.block(s3, ["a", "b", "b"], "stolen")
    deltas.unblock(s3, ["b", "never blocked"])
    deltas.block(s3, ["c"])
    deltas.block(s3, ["a"], "stolen twice")
    found = deltas.blocked(s3)
    assert sorted(found) == ["a", "c"]
    assert found["a"].reason == "stolen twice"
    assert deltas.delta_keys(s3, "v1") == [], "they belong to no version"


def test_two_writers_of_one_number_lose_nothing(s3) -> None:
    first = deltas.block(s3, ["a"])
    data = s3.get(first)
    s3.remove(first)
    second = deltas.block(s3, ["b"])  # as if it had not seen the first
    s3.put(first, data)
    assert first.split("-")[0] == second.split("-")[0]
    assert sorted(deltas.blocked(s3)) == ["a", "b"]


def test_altered_and_unreadable_objects_are_refused(s3) -> None:
    key = deltas.write_delta(s3, "v1", items("a"), np.array([[1, 2, 3]]))
    data = s3.get(key)
    s3.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DeltaCorrupt, match=r"v1/000001-.* is corrupt: its content is not what its name says"):
        deltas.read_delta(s3, key)
    taken_down = deltas.block(s3, ["a"])
    s3.put(taken_down, b"{}")
    with pytest.raises(DeltaCorrupt, match="corrupt"):
        deltas.blocked(s3)
    s3.put("catalog/v1/note.txt", b"not one of ours")
    assert deltas.delta_keys(s3, "v1") == [key]


def test_bad_deltas_are_not_written(s3) -> None:
    with pytest.raises(ValueError, match="expected a SID for each"):
        deltas.write_delta(s3, "v1", items("a", "b"), np.array([[1, 2, 3]]))
    with pytest.raises(ValueError, match="no item given"):
        deltas.block(s3, [])
    with pytest.raises(ValueError, match="one of them empty"):
        deltas.block(s3, ["a", ""])
    assert list(s3.keys("")) == []
