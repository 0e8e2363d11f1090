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


DURATION = "expected a whole number of milliseconds above 0, such as 15000"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.xlsx", "", "items are read from .parquet"),
        ("missing.csv", None, "there is no file"),
        ("a.csv", "item_id,duration_ms\n", "it holds no rows"),
        ("a.csv", "", "cannot be read as CSV"),
        ("a.csv", "item_id\nx\n", "column 'duration_ms' is missing"),
        ("a.csv", "item_id,duration_ms,colour\nx,5,red\n", "unknown columns colour; an item has item_id"),
        ("a.csv", "item_id,item_id,duration_ms\nx,y,5\n", "the column item_id twice"),
        ("a.csv", "item_id,duration_ms\nx,5\ny,5\nx,6\n", "item 'x' stands there more than once, in rows 1 and 3"),
        ("a.csv", "item_id,duration_ms\ny,5\nx,-5\n", f"row 2, column 'duration_ms' is '-5'; {DURATION}"),
        ("a.csv", "item_id,duration_ms\nx,9000.0\ny,long\n", f"row 2, column 'duration_ms' is 'long'; {DURATION}"),
        ("a.csv", "item_id,duration_ms\nx,9.5\n", f"row 1, column 'duration_ms' is '9.5'; {DURATION}"),
        ("a.csv", "item_id,duration_ms\nx,1e300\n", f"row 1, column 'duration_ms' is '1e300'; {DURATION}"),
        ("a.csv", "item_id,duration_ms\nx,5\ny,\n", f"row 2, column 'duration_ms' is empty; {DURATION}"),
        ("a.csv", 'item_id,duration_ms\n"",5\n', "row 1, column 'item_id' is empty; expected an id"),
        ("a.csv", "item_id,duration_ms\nx,5\ny\n", "row 2 is 'y', of 1 columns; expected 2, as in the header"),
        ("a.csv", "item_id,duration_ms,upload_time\nx,5,\ny,5,soon\n", "row 2, column 'upload_time' is 'soon'"),
        ("a.csv", "item_id,duration_ms,upload_time\nx,5,1e30\n", "row 1, column 'upload_time' is '1e30'"),
        ("a.jsonl", "{", "line 1 is '{', which is no JSON"),
        ("a.json", "[1]", r"line 1 is '\[1\]'; expected an object a line"),
        ("a.jsonl", '{"item_id": "x", "duration_ms": true}', f"row 1, column 'duration_ms' is 'true'; {DURATION}"),
        (
            "a.jsonl",
            '{"item_id": "x", "duration_ms": 5}\n\n{"item_id": "y", "duration_ms": "long"}',
            f"row 2, column 'duration_ms' is 'long'; {DURATION}",
        ),
        ("a.jsonl", '{"item_id": ["x"], "duration_ms": 5}', r"row 1, column 'item_id' is \['x'\]; expected an id"),
        ("a.jsonl", '{"item_id": "x", "duration_ms": 5, "tags": [{"a": 1}]}', "row 1, column 'tags' is .*; expected"),
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


def test_wrong_cells_of_parquet_are_named_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": ["x", None], "duration_ms": [5.0, 6.0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 2, column 'item_id' is empty"):
        read_items_file(tmp_path / "a.parquet")
    pq.write_table(pa.table({"item_id": ["x", "y"], "duration_ms": [[5], [6]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column 'duration_ms' is of type list.*; expected a whole number"):
        read_items_file(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_what_is_no_text_or_cannot_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b'{"item_id": "\xff"}\n{"item_id": "\xff"}')
    with pytest.raises(ValueError, match="UTF-8"):
        read_items_file(path)
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a file whose reading fails, whoever reads
    with pytest.raises(ValueError, match=f"a.{suffix} cannot be read: .*[iI]nput/output error"):
        read_items_file(path)


def test_times_tags_and_blank_cells(tmp_path: Path) -> None:
    """A time with or without a zone, or as milliseconds; JSON may write tags as one string too."""
    (tmp_path / "a.csv").write_text(
        "item_id,duration_ms,tags,upload_time\na,5.0,x|y,2026-01-01\nb,5,,\nc,5,z,2026-01-01T00:00:00Z\n"
    )
    table = read_items_file(tmp_path / "a.csv")
    assert table["tags"].to_pylist() == [["x", "y"], None, ["z"]]
    first, none, last = table["upload_time"].to_pylist()
    assert (first, none) == (last, None)
    (tmp_path / "a.jsonl").write_text(
        '{"item_id": 7, "duration_ms": 5, "tags": "x|y", "upload_time": 1767225600000}\n'
        '{"item_id": "8", "duration_ms": 5, "tags": ["z", 9]}\n'
    )
    table = read_items_file(tmp_path / "a.jsonl")
    assert table["item_id"].to_pylist() == ["7", "8"]
    assert table["tags"].to_pylist() == [["x", "y"], ["z", "9"]]
    assert table["upload_time"].to_pylist() == [first, None]
