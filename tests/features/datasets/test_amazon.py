"""Sequences as others write them: ids, times and lists of other types, items that say little, damaged files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.datasets import check, load
from features.datasets.amazon import Amazon
from features.datasets.card import quality_card
from features.schema import EXPOSURE

START = 1_400_000_000
DAY = 86_400
ROWS = [[1, 2, 3], [3, 1], [2, 3, 1, 4]]
SECONDS = [[START + DAY * step for step in range(len(row))] for row in ROWS]


def write(folder: Path, *, items: dict[str, Any] | None = None, **log: Any) -> Path:
    """``log`` and ``items`` replace columns, None takes them away."""
    columns = {"user_id": [7, 8, 9], "item_ids": ROWS, "timestamps": SECONDS} | log
    described: dict[str, Any] = {"item_id": [1, 2, 3], "title": ["a", "b", None], "attributes": [["x"], None, []]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("interactions", columns), ("items", described | (items or {}))):
        given = {key: value for key, value in table.items() if value is not None}
        pq.write_table(pa.table(given), folder / f"{name}.parquet")
    return folder


def seconds_of(folder: Path) -> list[list[float]]:
    """By user, in order."""
    exposures = load(folder).exposures
    frame = exposures.select(["user_id"]).to_pandas()
    frame["seconds"] = exposures["event_time"].cast(pa.int64()).to_numpy() / 1000
    found: list[list[float]] = frame.groupby("user_id")["seconds"].agg(list).tolist()
    return found


def each(change: Callable[[int], Any]) -> list[list[Any]]:
    return [[change(second) for second in row] for row in SECONDS]


@pytest.mark.parametrize(
    "times",
    [
        each(float),
        each(str),
        each(lambda s: s * 1000),
        each(lambda s: s * 10**6),
        each(lambda s: s * 10**9),
        pa.array(each(lambda s: s * 1000), pa.list_(pa.timestamp("ms"))),
        pa.array(each(lambda s: s), pa.large_list(pa.int64())),
        each(lambda s: str(np.datetime64(s, "s"))),
    ],
    ids=["float", "text", "ms", "us", "ns", "timestamp", "large list", "iso"],
)
def test_times_of_any_unit_mean_the_same(times: Any, tmp_path: Path) -> None:
    assert seconds_of(write(tmp_path, timestamps=times)) == SECONDS
    assert load(tmp_path).untimed == 0


def test_whole_days_are_days(tmp_path: Path) -> None:
    days = seconds_of(write(tmp_path, timestamps=each(lambda s: s // DAY)))
    assert days == each(lambda s: s // DAY * DAY)


@pytest.mark.parametrize("times", [None, each(lambda _: -1), each(lambda s: s % 7), each(lambda _: 2014)])
def test_what_is_no_time_is_counted(times: Any, tmp_path: Path) -> None:
    data = load(write(tmp_path, timestamps=times))
    assert data.untimed == data.exposures.num_rows == sum(map(len, ROWS))
    assert [len(row) for row in seconds_of(tmp_path)] == [3, 2, 4]


def test_some_times_may_lack_and_some_run_backwards(tmp_path: Path) -> None:
    times: list[list[int | None]] = [[START, None, START + DAY], [START + DAY, START], [-1, START, -1, START]]
    data = load(write(tmp_path, timestamps=times))
    assert (data.untimed, data.unordered, data.duplicates) == (3, 1, 0)
    warnings = " ".join(quality_card(Amazon(tmp_path), tmp_path)["warnings"])
    assert "3 rows have no time" in warnings
    assert "times of 1 users run backwards" in warnings
    shown = data.exposures.to_pandas().groupby("user_id")["item_id"].agg(list)
    assert shown.tolist() == [[str(item) for item in row] for row in ROWS], "the order of the lists counts"


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (lambda k: f"B{k:03d}é", lambda k: f"B{k:03d}é"),
        (lambda k: k - 1, lambda k: k - 1),
        (lambda k: float(k), lambda k: k),
        (lambda k: k, lambda k: str(k)),
    ],
    ids=["text", "from 0", "float", "text and number"],
)
def test_ids_may_be_numbers_or_text(ids: Callable[[int], Any], named: Callable[[int], Any], tmp_path: Path) -> None:
    rows = [[ids(item) for item in row] for row in ROWS]
    data = load(
        write(tmp_path, user_id=["u", "ü", "1"], item_ids=rows, items={"item_id": [named(k) for k in (1, 2, 3)]})
    )
    assert data.items.num_rows == 4
    assert data.items["title"].to_pylist() == ["a", "b", None, None], "the item that only the log names comes last"


@pytest.mark.parametrize(
    ("given", "titles", "tags"),
    [
        ({"title": None, "attributes": None}, [None] * 3, [None] * 3),
        ({"attributes": ["x|y &amp; z", "", "w"]}, ["a", "b", None], [["x", "y & z"], None, ["w"]]),
        ({"attributes": [[1, 2], [], None]}, ["a", "b", None], [["1", "2"], None, None]),
        ({"attributes": [["x", None], [None], None]}, ["a", "b", None], [["x"], None, None]),
        ({"title": [1.5, None, 2.0]}, ["1.5", None, "2"], [["x"], None, None]),
        ({"title": pa.nulls(3), "attributes": pa.nulls(3)}, [None] * 3, [None] * 3),
        ({"title": ["商品 💄", "", " "]}, ["商品 💄", None, " "], [["x"], None, None]),
    ],
)
def test_items_say_what_they_say(given: dict[str, Any], titles: list[Any], tags: list[Any], tmp_path: Path) -> None:
    items = load(write(tmp_path, items=given)).items.to_pylist()[:3]
    assert [item["title"] for item in items] == titles
    assert [item["tags"] for item in items] == tags


def test_what_cannot_be_read_is_kept_with_the_reason(tmp_path: Path) -> None:
    log = {
        "user_id": ["a", "b", None, "", "c", "d"],
        "item_ids": [["1", "2"], ["1", None], ["1"], ["1"], [], None],
        "timestamps": None,
    }
    items = {"item_id": ["1", "2", "1", None], "title": ["a", "b", "again", "c"], "attributes": None}
    data = load(write(tmp_path, items=items, **log))
    assert set(data.exposures["user_id"].to_pylist()) == {"a"}
    assert data.items.to_pydict()["title"] == ["a", "b"]
    reasons = data.rejected["reason"].to_pylist()
    assert reasons.count("user_id or an item id is empty") == 3
    assert reasons.count("item_ids is empty") == 2
    assert sum(reason.startswith("item_id") for reason in reasons) == 4


def test_what_is_delivered_twice_counts_once(tmp_path: Path) -> None:
    twice = [[item for item in row for _ in range(2)] for row in ROWS]
    data = load(write(tmp_path, item_ids=twice, timestamps=[[s for s in row for _ in range(2)] for row in SECONDS]))
    assert (data.duplicates, data.exposures.num_rows) == (9, 9)
    assert seconds_of(tmp_path) == SECONDS
    untimed = load(write(tmp_path, item_ids=twice, timestamps=None))
    assert (untimed.duplicates, untimed.exposures.num_rows) == (0, 18), "without times it may be two"


def damaged(folder: Path, name: str) -> Path:
    """Pages of noise between a sound beginning and a sound footer."""
    path = write(folder, item_ids=[list(range(k, k + 400)) for k in range(3)], timestamps=None) / name
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content[4:-900])) + content[-900:])
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: write(f) and (f / "items.parquet").unlink(), r"no items\.parquet; put it there, one row an item"),
        (lambda f: write(f, user_id=[1, 2, 3], item_ids=[1, 2, 3], timestamps=[1, 2, 3]), "--map user_id="),
        (lambda f: write(f, timestamps=[START] * 3), "timestamps of type int64; expected one row a user"),
        (lambda f: write(f, user_id=[], item_ids=[], timestamps=[]), "has no rows; expected one row a user"),
        (lambda f: write(f, items={"item_id": ["x1", "x2", "x3"]}), "describes none of the 4 items .*'1' there, 'x1'"),
        (lambda f: damaged(f, "interactions.parquet"), r"interactions\.parquet is damaged .*copy it again"),
        (lambda f: (write(f) / "interactions.parquet").write_bytes(b""), r"is not a Parquet file"),
    ],
    ids=["no items", "one row an interaction", "one time a user", "no rows", "other ids", "damaged", "empty file"],
)
def test_what_cannot_be_learned_from_is_refused(make: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_a_check_needs_no_titles(tmp_path: Path) -> None:
    check(write(tmp_path, items={"title": None, "attributes": None}))
    assert load(tmp_path).exposures.schema.equals(EXPOSURE)
