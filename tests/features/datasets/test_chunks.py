"""A log streamed in chunks of whole users gives what the log read at once gives."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from kuairand_files import LOG, T0, USERS, VIDEOS

from features.datasets import load
from features.datasets.dataset import Seen, collect
from features.datasets.kuairand import KuaiRand
from features.schema import EXPOSURE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two log files of 30 users with repeats, bad rows and a malformed one; a statistic file and a random log."""
    rng = np.random.default_rng(0)
    for number in (1, 2):
        rows = [
            f"{rng.integers(30)},{rng.integers(40)},20220425,0,{T0 + int(rng.integers(10**9))},1,0,0,0,0,0,0,"
            f"{rng.integers(9000)},{9000 if rng.random() < 0.95 else 0},0,0,0,0,1"
            for _ in range(400)
        ]
        rows += [*rows[:20], "1,2"]
        (tmp_path / f"log_standard_{number}.csv").write_text("\n".join([LOG, *rows]) + "\n")
    (tmp_path / "video_features_basic_1k.csv").write_text(
        "\n".join([VIDEOS, *(f"{v},{v % 5},NORMAL,2022-04-10,,0,{v % 3}" for v in range(38))]) + "\n"
    )
    (tmp_path / "user_features_1k.csv").write_text(f"{USERS}\n1,full_active,730+,500+,1,1,1,1,1\n")
    (tmp_path / "video_features_statistic_1k.csv").write_text("video_id,show_cnt\n1,9\n")
    (tmp_path / "log_random_1k.csv").write_text(f"{LOG}\n")
    return tmp_path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = KuaiRand.text.fget
    monkeypatch.setattr(KuaiRand, "text", property(lambda log: replace(text(log), chunk_bytes=10_000)))


def rows_of(table: pa.Table) -> list[dict]:
    return sorted(table.to_pylist(), key=lambda row: str(sorted(row.items(), key=str)))


def test_chunks_give_the_whole(folder: Path, tmp_path_factory, monkeypatch, request) -> None:
    whole = load(folder)
    request.getfixturevalue("small_chunks")
    log = KuaiRand(folder)
    assert log.parts > 5
    chunks = list(log.chunks(tmp_path_factory.mktemp("scratch")))
    assert len(chunks) > 3
    users = [set(chunk.exposures["user_id"].to_pylist()) for chunk in chunks]
    assert sum(map(len, users)) == len(set().union(*users)), "a user is in one chunk"
    parts = collect(log, tmp_path_factory.mktemp("again"))
    assert parts.exposures.schema.equals(EXPOSURE)
    for name in ("exposures", "items", "users"):
        assert rows_of(getattr(parts, name)) == rows_of(getattr(whole, name)), name
    assert parts.duplicates == whole.duplicates > 20
    assert sorted(parts.rejected["reason"].to_pylist()) == sorted(whole.rejected["reason"].to_pylist())
    times = parts.exposures["event_time"].cast(pa.int64()).to_numpy()
    assert (np.diff(times) >= 0).all()


def test_chunks_that_are_done_are_left_out(folder: Path, tmp_path_factory, small_chunks) -> None:
    scratch, log = tmp_path_factory.mktemp("scratch"), KuaiRand(folder)
    keys = [chunk.key for chunk in log.chunks(scratch)]
    assert [chunk.key for chunk in log.chunks(scratch, skip=keys[:2])] == keys[2:]
    assert list(KuaiRand(folder).chunks(scratch, skip=keys)) == []


def test_what_is_not_read_is_said(folder: Path) -> None:
    unread = KuaiRand(folder).unread
    assert set(unread) == {"video_features_statistic_1k.csv", "log_random_1k.csv"}
    assert unread["video_features_statistic_1k.csv"].startswith("LEAK")


def test_what_was_seen_adds_up(make_exposures) -> None:
    table, seen, halves = make_exposures(80), Seen(), Seen()
    seen.add(table)
    for start in (0, 40):
        halves.add(table.slice(start, 40))
    for name, column in (("items", "item_id"), ("users", "user_id")):
        assert set(getattr(halves, name)[column].to_pylist()) == set(table[column].to_pylist())
        assert getattr(halves, name).num_rows == getattr(seen, name).num_rows
    durations = seen.durations_of(pa.array(["i1", "nobody"]))
    expected = np.median(table.filter(pc.equal(table["item_id"], "i1"))["duration_ms"].to_numpy())
    assert durations[0] == expected
    assert np.isnan(durations[1])


def test_text_keys_do_not_depend_on_the_scratch(folder: Path, tmp_path_factory) -> None:
    text = replace(KuaiRand(folder).text, chunk_bytes=10_000)
    one, two = ([key for key, _ in text.frames(tmp_path_factory.mktemp("s"))] for _ in range(2))
    assert one == two
