import pyarrow as pa
import pytest

from features import catalog
from features.schema import ITEM, USER
from features.storage import Storage


def items(*rows: tuple[str, str]) -> pa.Table:
    return pa.Table.from_pylist([{"item_id": i, "title": t, "duration_ms": 1} for i, t in rows], schema=ITEM)


def test_a_later_part_wins_per_item(s3: Storage) -> None:
    assert catalog.read_items(s3).equals(ITEM.empty_table())
    old = items(("b", "old"), ("a", "kept"))
    catalog.append_items(s3, old)
    catalog.append_items(s3, items(("b", "draft"), ("c", "new"), ("b", "final")))
    table = catalog.read_items(s3)
    assert table.schema == ITEM
    assert dict(zip(*table.select(["item_id", "title"]).to_pydict().values(), strict=True)) == {
        "a": "kept",
        "b": "final",
        "c": "new",
    }
    catalog.append_items(s3, old)
    assert catalog.read_items(s3).column("title").to_pylist() == ["kept", "old", "new"]
    assert len(list(s3.keys("catalog/items/"))) == 2


def test_users_are_kept_apart(s3: Storage) -> None:
    users = pa.Table.from_pylist([{"user_id": "u", "attributes": ["age=20"]}], schema=USER)
    catalog.append_users(s3, users)
    assert catalog.read_users(s3).equals(users)
    assert catalog.read_items(s3).num_rows == 0


def test_bad_rows_are_refused_and_none_stored(s3: Storage) -> None:
    assert catalog.append_items(s3, ITEM.empty_table()) is None
    with pytest.raises(ValueError, match="empty item_id"):
        catalog.append_items(s3, items(("", "nameless")))
    with pytest.raises(ValueError, match="duration_ms"):
        catalog.append_items(s3, items(("a", "t")).drop(["duration_ms"]))
    assert list(s3.keys("catalog/")) == []
