"""Item files as people write them, and what is said of those that cannot be used."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.itemfile import read_items_file
from features.schema import ITEM


def test_the_same_items_from_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'item_id,title,tags,duration_ms\n007,"Cats, part 2",pets|kitten,9000\n8,Dogs,pets,12000\n'
    )
    (tmp_path / "a.jsonl").write_text(
        '{"item_id": "007", "title": "Cats, part 2", "tags": ["pets", "kitten"], "duration_ms": 9000}\n'
        '{"item_id": "8", "title": "Dogs", "tags": ["pets"], "duration_ms": 12000}\n'
    )
    expected = read_items_file(tmp_path / "a.jsonl")
    assert expected.schema == ITEM
    assert expected["tags"].to_pylist() == [["pets", "kitten"], ["pets"]]
    pq.write_table(expected, tmp_path / "a.parquet")
    assert read_items_file(tmp_path / "a.csv").equals(expected)
    assert read_items_file(tmp_path / "a.parquet").equals(expected)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.xlsx", "", "items are read from .parquet"),
        ("missing.csv", None, "there is no file"),
        ("a.csv", "item_id,duration_ms\n", "it holds no rows"),
        ("a.csv", "item_id\nx\n", "column 'duration_ms' is missing"),
        ("a.csv", "item_id,duration_ms,colour\nx,5,red\n", "unknown columns colour; an item has item_id"),
        ("a.csv", "item_id,duration_ms\nx,5\nx,6\n", "'x' stands there more than once"),
        ("a.csv", "item_id,duration_ms\nx,-5\n", "duration_ms that is not positive"),
        ("a.csv", 'item_id,duration_ms\n"",5\n', "empty item_id"),
        ("a.csv", "item_id,duration_ms\nx,long\n", "a.csv: "),
        ("a.csv", "item_id,duration_ms\nx\n", "a.csv: "),
        ("a.jsonl", "{", "a.jsonl: "),
        ("a.parquet", "nonsense", "a.parquet: "),
    ],
)
def test_unusable_files_are_named_with_the_reason(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_items_file(tmp_path / name)
    assert name in str(error.value)


def test_numbers_as_ids_are_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": [1, 2], "duration_ms": [5, 6]}), tmp_path / "a.parquet")
    assert read_items_file(tmp_path / "a.parquet")["item_id"].to_pylist() == ["1", "2"]
