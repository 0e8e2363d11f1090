"""Logs of who took what and when: the order is kept, times rise, and every interaction is a request of its own."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.datasets import check, load
from features.datasets.amazon import load_amazon
from features.datasets.interactions import impressions_table, ordered_times
from features.schema import EXPOSURE

NOON = 1_400_000_000


def amazon(folder: Path, sequences: list[tuple[int, list[int], list[int]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    columns = [list(column) for column in zip(*sequences, strict=True)] or [[], [], []]
    types = (pa.int64(), pa.list_(pa.int64()), pa.list_(pa.int64()))
    log = pa.table([pa.array(c, t) for c, t in zip(columns, types, strict=True)], ["user_id", "item_ids", "timestamps"])
    pq.write_table(log, folder / "interactions.parquet")
    items = {
        "item_id": [1, 2, 3],
        "title": ["Soap &amp; More", "", "Comb"],
        "attributes": [["L&#39;Oreal"], [], ["Hair"]],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    return folder


def movielens(folder: Path, ratings: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
    movies = ['1,"Heat, The (1995)",Action|Crime', "2,Nothing,(no genres listed)"]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n")
    return folder


def orders(exposures: pa.Table) -> dict[str, list[str]]:
    frame = exposures.to_pandas()
    return frame.groupby("user_id")["item_id"].agg(list).to_dict()


def test_the_published_order_is_kept_and_times_rise(tmp_path: Path) -> None:
    day = [NOON, NOON, -1, NOON, NOON + 5]
    data = load(amazon(tmp_path / "beauty", [(7, [3, 1, 9, 2, 1], day), (8, [2], [-1])]))
    assert data.name == "beauty"
    assert orders(data.exposures) == {"7": ["3", "1", "9", "2", "1"], "8": ["2"]}
    of_seven = data.exposures.filter(pc.equal(data.exposures["user_id"], "7"))
    times = of_seven["event_time"].cast(pa.int64()).to_numpy()
    assert (times - NOON * 1000).tolist() == [0, 1, 2, 3, 5000]
    assert len(set(data.exposures["request_id"].to_pylist())) == data.exposures.num_rows
    for flag in ("click", "long_view"):
        assert all(data.exposures[flag].to_pylist())
    assert pc.max(data.exposures["play_ms"]).as_py() == pc.max(data.exposures["duration_ms"]).as_py() == 0
    items = {row["item_id"]: row for row in data.items.to_pylist()}
    assert items["1"]["title"] == "Soap & More"
    assert items["1"]["tags"] == ["L'Oreal"]
    assert (items["2"]["title"], items["2"]["tags"]) == (None, None)
    assert items["9"]["title"] is None, "an item that only the log names is there"


def test_ties_are_shuffled_inside_a_time_only(tmp_path: Path) -> None:
    items = list(range(100, 140))
    path = amazon(tmp_path, [(1, items, [NOON] * 20 + [NOON + 9] * 20), (2, [1], [NOON])])
    plain, one = orders(load_amazon(path).exposures)["1"], orders(load_amazon(path, shuffle_ties=1).exposures)["1"]
    assert one == orders(load_amazon(path, shuffle_ties=1).exposures)["1"] != plain
    assert one != orders(load_amazon(path, shuffle_ties=2).exposures)["1"]
    assert set(one[:20]) == set(plain[:20])


def test_rows_whose_lists_do_not_fit_are_rejected(tmp_path: Path) -> None:
    data = load(amazon(tmp_path, [(1, [1, 2], [NOON]), (2, [3], [NOON]), (3, [1], [NOON * 1000])]))
    assert data.rejected["reason"].to_pylist() == ["item_ids and timestamps have not the same length"]
    assert data.exposures["user_id"].to_pylist() == ["2", "3"]
    with pytest.raises(ValueError, match=r"all 1 rows of the log .* were rejected"):
        load(amazon(tmp_path / "bad", [(1, [1, 2], [NOON])]))


def test_stars_become_flags(tmp_path: Path) -> None:
    ratings = ["5,1,4.0,1000000000", "5,2,3.5,1000000000", "6,1,2.0,1000000001", "6,1,2.0,1000000001"]
    data = load(movielens(tmp_path, ratings))
    rows = {(row["user_id"], row["item_id"]): row for row in data.exposures.to_pylist()}
    assert [rows["5", "1"][flag] for flag in ("click", "like", "long_view", "dislike")] == [True, True, True, False]
    assert [rows["5", "2"][flag] for flag in ("click", "like", "long_view", "dislike")] == [True, False, False, False]
    assert rows["6", "1"]["dislike"]
    assert data.duplicates == 1
    items = {row["item_id"]: row for row in data.items.to_pylist()}
    assert items["1"] | {"title": "Heat, The (1995)", "tags": ["Action", "Crime"]} == items["1"]
    assert items["2"]["tags"] is None


def test_bad_ratings_are_kept_with_the_reason(tmp_path: Path) -> None:
    bad = {
        "rating is not a number from 0 to 5": "1,1,six,1000000000",
        "userId or movieId is empty": ",1,3,1000000000",
        "timestamp is not a positive number": "1,1,3,",
        "timestamp is before 1990: a clock that was never set": "1,1,3,86400",
        "timestamp lies in the future": "1,1,3,4000000000",
        "the number of columns is not the header's": "1,1",
    }
    data = load(movielens(tmp_path, ["1,1,3,1000000000", "2,1,3,1000000000", *bad.values()]))
    assert set(data.rejected["reason"].to_pylist()) == set(bad)
    assert data.exposures.num_rows == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: amazon(f, []), "has no rows; expected one row a user"),
        (lambda f: amazon(f, [(1, [1], [NOON])]), "has 1 user; a recommender is learned from"),
        (lambda f: movielens(f, []), "has no rows; expected ratings"),
        (lambda f: movielens(f, ["1,1,3,1000000000"]), r"has 1 user \('1'\)"),
        (lambda f: (movielens(f, []) / "movies.csv").write_text("id,name\n") and f, "lacks the columns movieId, title"),
        (lambda f: (amazon(f, []) / "items.parquet").write_text("no") and f, "is not a Parquet file"),
    ],
)
def test_bad_folders_are_refused_at_once(make, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    make(folder)
    with pytest.raises(ValueError, match=words):
        check(folder)


def test_a_log_without_play_times_is_refused_where_they_are_needed(tmp_path: Path) -> None:
    folder = movielens(tmp_path, ["1,1,3,1000000000", "2,1,3,1000000000"])
    check(folder)
    with pytest.raises(ValueError, match="has no play times"):
        check(folder, played=True)


def rising(times: list[int], otherwise: int) -> list[int]:
    """One user's times, row by row; ``otherwise`` when none is known."""
    found: list[int] = []
    given = next((time for time in times if time >= 0), otherwise)
    for time in times:
        given = time if time >= 0 else given
        found.append(max(given, found[-1] + 1) if found else given)
    return found


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 12)), max_size=25))
def test_times_are_the_smallest_that_rise(rows: list[tuple[int, int]]) -> None:
    user, times = (np.array(column, np.int64) for column in (zip(*rows, strict=True) if rows else ((), ())))
    found = ordered_times(user, times)
    earliest = min((time for _, time in rows if time >= 0), default=0)
    for each in range(3):
        assert found[user == each].tolist() == rising(times[user == each].tolist(), earliest)


def test_two_users_may_share_a_request_id() -> None:
    user, item = np.array(["a", "b"], object), np.array(["x", "x"], object)
    values = {"duration_ms": np.array([9, 9]), "play_ms": np.array([1, 1])}
    table = impressions_table(user, item, np.array([NOON, NOON]) * 1000, values, np.array(["r", "r"], object))
    assert table.schema.equals(EXPOSURE)
    assert len(set(table["exposure_id"].to_pylist())) == 2


def test_the_published_sets(kuairand: Path) -> None:
    beauty, small = (kuairand.parent / name for name in ("amazon-beauty", "ml-latest-small"))
    if not beauty.is_dir() or not small.is_dir():
        pytest.skip(f"{beauty} and {small} are not both there")
    data = load(beauty)
    assert (data.exposures.num_rows, data.users.num_rows, data.items.num_rows) == (198_502, 22_363, 12_101)
    published = pd.read_parquet(beauty / "interactions.parquet")
    expected = {str(u): [str(i) for i in items] for u, items in zip(published.user_id, published.item_ids, strict=True)}
    assert orders(data.exposures) == expected
    assert (load(small).exposures.num_rows, load(small).rejected.num_rows) == (100_004, 0)
