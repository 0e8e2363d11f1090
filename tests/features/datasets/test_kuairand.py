"""Loading KuaiRand's layout: what is kept, what is rejected and what is said about bad input."""

from pathlib import Path

import pyarrow.compute as pc
import pytest
from kuairand_files import LOG, T0, USERS, VIDEOS

from features.datasets import load
from features.schema import EXPOSURE, ITEM, USER

MINUTE = 60_000


def row(
    user: int = 1, video: int = 10, time: int = T0, play: str = "5000", duration: str = "10000", like: int = 0
) -> str:
    return f"{user},{video},20220425,0,{time},1,{like},0,0,0,0,0,{play},{duration},0,0,0,0,1"


def write(folder: Path, rows: list[str], name: str = "log_standard_1.csv", header: str = LOG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    videos = ['10,7,NORMAL,2022-04-10,10000.0,99,"39,68"', "11,8,NORMAL,2022-04-10,,0,", "12,8,NORMAL,,,0,"]
    (folder / "video_features_basic_pure.csv").write_text("\n".join([VIDEOS, *videos]) + "\n")
    (folder / "user_features_pure.csv").write_text(f'{USERS}\n1,full_active,730+,500+,"[100,1k)","[30,60)",1,1,1\n')
    return folder


def test_tables_have_the_schemas_and_are_sorted_by_time(tmp_path: Path) -> None:
    rows = [row(time=T0 + MINUTE), row(user=2, video=11, time=T0, like=1)]
    data = load(write(tmp_path / "KuaiRand-Pure" / "data", rows).parent)
    assert data.name == "KuaiRand-Pure"
    assert (data.exposures.schema, data.items.schema, data.users.schema) == (EXPOSURE, ITEM, USER)
    assert data.exposures["user_id"].to_pylist() == ["2", "1"]
    assert data.exposures["like"].to_pylist() == [True, False]
    items = {i["item_id"]: i for i in data.items.to_pylist()}
    assert items["10"]["tags"] == ["39", "68"]
    assert items["11"]["duration_ms"] == 10_000, "a missing duration comes from the log"
    assert items["11"]["music_id"] is None
    users = {u["user_id"]: u["attributes"] for u in data.users.to_pylist()}
    assert "user_active_degree=full_active" in users["1"]
    assert users["2"] == []


def test_views_less_than_half_an_hour_apart_share_a_request(tmp_path: Path) -> None:
    times = [T0, T0 + 29 * MINUTE, T0 + 58 * MINUTE, T0 + 88 * MINUTE]
    exposures = load(write(tmp_path, [row(time=t, play=str(k)) for k, t in enumerate(times)])).exposures
    requests = exposures["request_id"].to_pylist()
    assert requests[0] == requests[1] == requests[2] != requests[3]
    assert exposures["position"].to_pylist() == [0, 1, 2, 0]
    assert len(set(exposures["exposure_id"].to_pylist())) == 4


def test_exact_duplicates_are_removed_and_counted_across_files(tmp_path: Path) -> None:
    write(tmp_path, [row(), row(), row(play="1")])
    assert load(write(tmp_path, [row()], "log_standard_2.csv")).duplicates == 2
    assert load(tmp_path).exposures.num_rows == 2


def test_bad_rows_are_kept_with_the_reason(tmp_path: Path) -> None:
    bad = {
        "duration_ms is not positive": row(duration="0"),
        "play_time_ms is negative": row(play="-1"),
        "play_time_ms is not a number": row(play="soon"),
        "is_like is neither 0 nor 1": row(like=2),
        "the number of columns is not the header's": "1,2,3",
    }
    data = load(write(tmp_path, [row(), *bad.values()]))
    assert data.exposures.num_rows == 1
    rejected = data.rejected.to_pandas().set_index("reason")
    assert set(rejected.index) == {*bad, "video_duration is not a positive number"}
    assert rejected.loc["play_time_ms is not a number", "play_time_ms"] == "soon"
    assert rejected.loc["the number of columns is not the header's", "malformed"] == "1,2,3"
    assert rejected.loc[["video_duration is not a positive number"], "video_id"].tolist() == ["11", "12"]


def test_messages_say_what_was_given_and_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no log that is understood.*log_standard"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"has no rows"):
        load(write(tmp_path / "empty", []))
    with pytest.raises(ValueError, match=r"lacks the columns time_ms, play_time_ms"):
        load(write(tmp_path / "columns", ["1,2"], header="user_id,video_id"))
    with pytest.raises(ValueError, match=r"all 1 rows .* rejected.*duration_ms is not positive"):
        load(write(tmp_path / "bad", [row(duration="0")]))
    (write(tmp_path / "half", [row()]) / "user_features_pure.csv").unlink()
    with pytest.raises(ValueError, match=r"user_features"):
        load(tmp_path / "half")


def test_every_row_of_the_release_is_accounted_for(kuairand: Path) -> None:
    data = load(kuairand)
    lines = sum(len(p.read_text().splitlines()) - 1 for p in kuairand.glob("data/log_standard*.csv"))
    from_log = pc.sum(pc.starts_with(data.rejected["file"], "log_standard")).as_py()
    assert data.exposures.num_rows + data.duplicates + from_log == lines
    assert pc.min(data.exposures["duration_ms"]).as_py() > 0
