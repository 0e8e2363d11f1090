"""Any CSV or Parquet by a map of columns: what is read, and what is said about bad maps and bad rows."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.datasets import ColumnMap, check, load, read_map

PLAIN = "user_id=uid,item_id=iid,event_time=ts"
T0 = 1_650_000_000


def write(path: Path, rows: list[str], header: str = "uid,iid,ts") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_plain_csv_is_interactions(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [f"a,x,{T0 + 60}", f"a,y,{T0}", f"b,x,{T0}"])
    data = load(path, read_map(PLAIN))
    assert [(r["user_id"], r["item_id"], r["long_view"]) for r in data.exposures.to_pylist()] == [
        ("a", "y", True),
        ("b", "x", True),
        ("a", "x", True),
    ]
    assert sorted(data.items["item_id"].to_pylist()) == ["x", "y"]
    assert sorted(data.users["user_id"].to_pylist()) == ["a", "b"]


def test_play_times_make_impressions_with_sessions(tmp_path: Path) -> None:
    rows = [f"a,x,{T0},9000,100,1,r", f"a,y,{T0 + 60},9000,8000,0,r", f"b,x,{T0},9000,0,true,r"]
    path = write(tmp_path / "log.csv", rows, "uid,iid,ts,length,watched,liked,req")
    fields = f"{PLAIN},duration_ms=length,play_ms=watched,like=liked"
    data = load(path, read_map(fields))
    assert len(set(data.exposures["request_id"].to_pylist())) == 2
    assert sorted(data.exposures["like"].to_pylist()) == [False, True, True]
    assert data.items["duration_ms"].to_pylist() == [9000, 9000], "taken from the log"
    given = load(path, read_map(f"{fields},request_id=req"))
    assert set(given.exposures["request_id"].to_pylist()) == {"r"}
    assert len(set(given.exposures["exposure_id"].to_pylist())) == 3


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_folder_of_parquet_with_items(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "log").mkdir()
    stamps = [datetime(2024, 1, 1, hour, tzinfo=UTC) for hour in (3, 4)]
    for number, user in enumerate(["a", "b"]):
        table = pa.table({"uid": [user], "iid": [7], "ts": stamps[number : number + 1], "tags": [["not", "read"]]})
        pq.write_table(table, tmp_path / "log" / f"{number}.parquet")
    write(tmp_path / "log" / "things.csv", ["7,Lamp,a|b,2023-12-01", "8,Chair,,", ",Nobody,,"], "id,name,kinds,born")
    columns = {"user_id": "uid", "item_id": "iid", "event_time": "ts"}
    items = {"file": "things.csv", "item_id": "id", "title": "name", "tags": "kinds", "upload_time": "born"}
    path = tmp_path / f"map.{suffix}"
    as_toml = "\n".join(
        [
            f"[{name}]\n" + "\n".join(f'{k} = "{v}"' for k, v in table.items())
            for name, table in (("columns", columns), ("items", items))
        ]
    )
    path.write_text(as_toml if suffix == "toml" else json.dumps({"columns": columns, "items": items}))
    data = load(tmp_path / "log", read_map(str(path)))
    assert data.exposures["event_time"].to_pylist() == stamps
    rows = {row["item_id"]: row for row in data.items.to_pylist()}
    assert (rows["7"]["title"], rows["7"]["tags"]) == ("Lamp", ["a", "b"])
    assert rows["7"]["upload_time"] == datetime(2023, 12, 1, tzinfo=UTC)
    assert rows["8"]["tags"] is None
    assert data.rejected["reason"].to_pylist() == ["id is empty"]


def test_times_in_any_unit_mean_the_same(tmp_path: Path) -> None:
    given = [f"{T0}", f"{T0}000", f"{T0}000000", f"{T0}000000000", "2022-04-15T05:20:00Z", "2022-04-15T13:20:00+08:00"]
    data = load(write(tmp_path / "log.csv", [f"u{n},x,{time}" for n, time in enumerate(given)]), read_map(PLAIN))
    assert set(data.exposures["event_time"].to_pylist()) == {datetime.fromtimestamp(T0, UTC)}
    assert data.exposures.num_rows == len(given)


def test_mixed_types_and_wrong_clocks_are_kept_with_the_reason(tmp_path: Path) -> None:
    bad = {
        "ts is no time": "a,x,soon,9,1,0",
        "ts is before 1990: a clock never set": "a,x,3600,9,1,0",
        "ts lies in the future": f"a,x,{T0 + 10 * 366 * 86_400},9,1,0",
        "iid is empty": f"a,,{T0},9,1,0",
        "length is not positive": f"a,x,{T0},0,1,0",
        "watched is negative": f"a,x,{T0},9,-1,0",
        "watched is not a number": f"a,x,{T0},9,long,0",
        "liked is neither true nor false": f"a,x,{T0},9,1,maybe",
        "the number of columns is not the header's": "a,x",
    }
    path = write(tmp_path / "l.csv", [f"a,x,{T0},9,1,0", *bad.values()], "uid,iid,ts,length,watched,liked")
    data = load(path, read_map(f"{PLAIN},duration_ms=length,play_ms=watched,like=liked"))
    assert data.exposures.num_rows == 1
    assert set(data.rejected["reason"].to_pylist()) == set(bad)


def test_a_clock_ten_years_slow_is_read_and_shown(tmp_path: Path) -> None:
    from features.datasets import open_log
    from features.datasets.card import quality_card

    slow = T0 - 10 * 365 * 86_400
    path = write(tmp_path / "l.csv", [f"u{n % 7},x{n},{T0 + n * 3600}" for n in range(60)] + [f"u1,x1,{slow}"])
    card = quality_card(open_log(path, read_map(PLAIN)), tmp_path)
    assert card["rows"] == 61
    assert any("a clock was off: 1 rows lie 3,650 days from all others" in warning for warning in card["warnings"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("user_id=uid,item_id=iid", "the map lacks event_time"),
        (f"{PLAIN},stars=x", "columns name stars; the fields are user_id"),
        (f"{PLAIN},like=uid", "use uid for two fields"),
        (f"{PLAIN},user_id=other", "names user_id twice"),
        (f"{PLAIN},play_ms=p", "one of duration_ms and play_ms"),
        ("user_id=,item_id=i,event_time=t", "each field needs the name of one column"),
        ("nowhere.toml", "neither pairs .* nor a .toml or .json file that exists"),
    ],
)
def test_bad_maps_are_refused(given: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_map(given)


def test_bad_map_files_are_refused(tmp_path: Path) -> None:
    for text, words in (("[columns", "cannot be read"), ('[rows]\na = "b"', "must hold a table `columns`")):
        (tmp_path / "map.toml").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_map(str(tmp_path / "map.toml"))
    with pytest.raises(ValueError, match="need a file and a column for item_id"):
        ColumnMap(columns=read_map(PLAIN).columns, items={"title": "name"})


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    columns = read_map(PLAIN)
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "nowhere.csv", "does not exist; give a CSV or Parquet file"),
        (tmp_path / "empty", "holds no .csv or .parquet file"),
        (write(tmp_path / "other.csv", ["1"], "user"), "lacks the columns uid, iid, ts; it has user"),
        (write(tmp_path / "none.csv", []), "has no rows with a uid"),
        (write(tmp_path / "void.csv", [], ""), "lacks the columns uid, iid, ts; it has none"),
        (write(tmp_path / "one.csv", [f"a,x,{T0}"]), r"has 1 user \('a'\)"),
    ):
        with pytest.raises(ValueError, match=words):
            check(path, columns)
    with pytest.raises(ValueError, match="or any CSV or Parquet files with a map"):
        check(tmp_path / "empty")


def test_types_of_parquet_may_differ_between_files(tmp_path: Path) -> None:
    for number, uid in enumerate([[1, 2], ["1", "3"]]):
        pq.write_table(pa.table({"uid": uid, "iid": ["x", "y"], "ts": [T0, T0]}), tmp_path / f"{number}.parquet")
    data = load(tmp_path, read_map(PLAIN))
    assert set(data.users["user_id"].to_pylist()) == {"1", "2", "3"}
    assert pd.Series(data.exposures["user_id"].to_pylist()).value_counts()["1"] == 1, "the same row twice is a repeat"


def test_a_byte_order_mark_is_no_part_of_a_name_and_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + f"uid,iid,ts\na,x,{T0}\nb,x,{T0}\n".encode())
    assert load(tmp_path / "bom.csv", read_map(PLAIN)).exposures.num_rows == 2
    (tmp_path / "latin.csv").write_bytes(f"uid,iid,ts\na,caf\xe9,{T0}\nb,x,{T0}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv cannot be read as CSV .*UTF-8"):
        load(tmp_path / "latin.csv", read_map(PLAIN))


def test_strange_names_of_files_and_columns_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from features.datasets import text

    folder = tmp_path / "it's"
    rows = [f"u{n % 5},x{n % 3},{T0 + n}" for n in range(200)]
    path = write(folder / 'a "log".csv', rows, 'the user\'s ""id,part,ts')
    (folder / 'a "log".csv').write_text(path.read_text().replace('the user\'s ""id', '"the user\'s ""id"""'))
    columns = ColumnMap(columns={"user_id": 'the user\'s "id"', "item_id": "part", "event_time": "ts"})
    whole = load(path, columns)
    monkeypatch.setattr(text.TextFiles, "partitions", property(lambda files: 3))
    parts = load(path, columns)
    assert parts.exposures.num_rows == whole.exposures.num_rows == 200
    assert sorted(parts.exposures["exposure_id"].to_pylist()) == sorted(whole.exposures["exposure_id"].to_pylist())
