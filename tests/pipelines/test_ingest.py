"""`onerec ingest`: the quality card, refused leaks, and going on after a kill."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from kuairand_files import T0, USERS, VIDEOS
from typer.testing import CliRunner

import pipelines.ingest
from features import catalog
from features.datasets import load
from features.datasets.kuairand import KuaiRand
from features.intake import exposures as exposure_store
from features.online import OnlineFeatures
from features.settings import Settings
from features.storage import Storage
from pipelines.__main__ import app
from pipelines.ingest import fingerprint, ingest, ingest_log

LOG = (
    "user_id,video_id,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,"
    "duration_ms,is_profile_enter"
)
HOUR = 3_600_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        f"{rng.integers(12)},{rng.integers(20)},{T0 + int(rng.integers(50)) * HOUR},1,0,0,0,0,0,1,"
        f"{rng.integers(9000)},{9000 if n % 20 else 0},0"
        for n in range(300)
    ]
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "log_standard_1.csv").write_text("\n".join([LOG, *rows, *rows[:5]]) + "\n")
    (folder / "user_features_pure.csv").write_text(f"{USERS}\n0,full_active,730+,500+,0,0,1,1,1\n")
    (folder / "video_features_basic_pure.csv").write_text(f"{VIDEOS}\n0,7,NORMAL,2022-04-10,9000.0,99,39\n")
    return folder


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and a group of every two or three."""
    text = KuaiRand.text.fget
    monkeypatch.setattr(KuaiRand, "text", property(lambda log: replace(text(log), chunk_bytes=2_000)))
    monkeypatch.setattr(pipelines.ingest, "GROUP_ROWS", 60)


class Stop(Exception):
    """A kill."""


class Watcher:
    """Counts what is stored; stops the ingest after ``groups`` groups."""

    def __init__(self, groups: int = 10**9) -> None:
        self.left, self.notes, self.moved = groups, [], []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, done: int, total: int) -> None:
        self.moved.append((done, total))
        self.left -= 1
        if not self.left:
            raise Stop


def stored(storage: Storage, users: list[str]) -> dict[str, Any]:
    """Everything an ingest leaves, apart from when."""
    online = OnlineFeatures.connect()
    read = online.read(users, T0 + 100 * HOUR)
    return {
        "exposures": exposure_store.read(storage).to_pylist(),
        "items": catalog.read_items(storage).to_pylist(),
        "users": catalog.read_users(storage).to_pylist(),
        "static": [each.static.tolist() for each in read],
        "windows": [(each.short, each.positive, each.lifelong) for each in read],
    }


def test_an_interrupted_ingest_goes_on(folder: Path, environment: Settings, s3: Storage, small_groups) -> None:
    log, home, users = KuaiRand(folder), environment.home, [str(n) for n in range(12)]
    with pytest.raises(Stop):
        ingest_log(log, s3, home, Watcher(groups=2))
    state = [key for key in s3.keys("ingest/") if key.endswith(".json")]
    assert len(state) >= 1
    kept = [key for record in state for key in s3.get_json(record)["keys"]]
    assert next(iter(s3.keys("catalog/")), None) is None, "items and users come when all of the log is known"
    watcher = Watcher()
    counts = ingest_log(log, s3, home, watcher)
    assert watcher.notes[0] == f"{len(kept)} chunks were stored before, going on"
    assert watcher.moved[0][0] > len(kept)
    assert watcher.moved[-1][0] == watcher.moved[-1][1]
    assert list(s3.keys("ingest/")) == []
    assert not list((home / "work").glob("ingest-*"))

    whole = load(folder)
    assert counts["exposures"] == whole.exposures.num_rows == 285
    assert counts["rejected"] == whole.rejected.num_rows
    assert counts["duplicates_removed"] == whole.duplicates
    assert counts["users"] == whole.users.num_rows
    found = stored(s3, users)
    again = ingest_log(log, s3, home)
    assert again["exposures"] == 285
    assert stored(s3, users) == found, "repeating it changes nothing"
    ingest(whole, s3, home)
    assert stored(s3, users) == found, "nor does storing it at once"


def test_other_files_are_another_log(folder: Path) -> None:
    one = fingerprint(KuaiRand(folder))
    assert fingerprint(KuaiRand(folder)) == one
    path = folder / "log_standard_1.csv"
    path.write_text(path.read_text() + "1,2\n")
    assert fingerprint(KuaiRand(folder)) != one


def onerec(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_check_shows_the_card_and_stores_nothing(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    result = onerec("ingest", str(folder), "--check", "--json", "--home", str(home))
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert (card["rows"], card["duplicates"]) == (285, 5)
    assert card["rejected"]["duration_ms is not positive"] == 15
    shown = onerec("ingest", str(folder), "--check", "--home", str(home)).stdout
    assert "warning: " in shown
    assert "15 duration_ms is not positive" in shown
    assert not home.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--statistic",), "features counted over the whole period are refused"),
        (("--map", "user_id=u"), "the map lacks item_id, event_time"),
        (("--map", "user_id=u,item_id=i,event_time=t"), "lacks the columns u, i, t"),
    ],
)
def test_leaks_and_bad_maps_are_refused(folder: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    for more in ((), ("--check",)):
        result = onerec("ingest", str(folder), *arguments, *more, "--home", str(tmp_path / "home"))
        assert result.exit_code == 2
        assert words in result.stderr
        assert not (tmp_path / "home").exists()


@pytest.fixture
def one_valid_user(folder: Path) -> KuaiRand:
    """Two users, but all rows of one are rejected."""
    rows = [f"1,2,{T0},1,0,0,0,0,0,1,10,9000,0", f"2,2,{T0},1,0,0,0,0,0,1,10,0,0"]
    (folder / "log_standard_1.csv").write_text("\n".join([LOG, *rows]) + "\n")
    return KuaiRand(folder)


def test_one_valid_user_is_refused_before_anything_is_stored(
    one_valid_user, environment: Settings, s3: Storage
) -> None:
    one_valid_user.check()
    with pytest.raises(ValueError, match="has 1 user; a recommender is learned from"):
        ingest_log(one_valid_user, s3, environment.home)
    assert list(s3.keys("")) == []


def test_interactions_are_stored_with_their_titles(environment: Settings, s3: Storage, tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,5,1000000000\n2,1,1,1000000000\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,Heat (1995),Action\n")
    counts = ingest(load(tmp_path), s3, environment.home)
    assert counts["exposures"] == 2
    assert catalog.read_items(s3)["title"].to_pylist() == ["Heat (1995)"]
    assert exposure_store.read(s3)["dislike"].to_pylist().count(True) == 1
    assert pa.types.is_string(catalog.read_users(s3)["user_id"].type)


def test_an_ingest_leaves_what_others_keep_in_the_work_folder(folder: Path, environment: Settings, s3: Storage) -> None:
    checkpoint = environment.home / "work" / "run-pretrain" / "checkpoint"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    ingest_log(KuaiRand(folder), s3, environment.home)
    assert checkpoint.exists()
    ingest(load(folder), s3, environment.home)
    assert checkpoint.exists(), "a data set in memory has no files to name a folder of its own by"


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
import pipelines.ingest
from features.datasets.kuairand import KuaiRand
from features.storage import connect

folder, home = map(Path, sys.argv[1:])
text = KuaiRand.text.fget
KuaiRand.text = property(lambda log: replace(text(log), chunk_bytes=2_000))
pipelines.ingest.GROUP_ROWS = 20
pipelines.ingest.ingest_log(KuaiRand(folder), connect(), home)
"""


@pytest.mark.long
def test_kills_at_any_moment_lose_and_double_nothing(
    folder: Path, environment: Settings, s3: Storage, small_groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.ingest, "GROUP_ROWS", 20)
    rng = np.random.default_rng(0)
    command = [sys.executable, "-c", KILLED, str(folder), str(environment.home)]
    for _ in range(6):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=float(rng.uniform(2, 8)))
            child.kill()
    ingest_log(KuaiRand(folder), s3, environment.home)
    whole = load(folder)
    found = exposure_store.read(s3)
    assert sorted(found["exposure_id"].to_pylist()) == sorted(whole.exposures["exposure_id"].to_pylist())
    assert catalog.read_items(s3).num_rows == whole.items.num_rows
    assert list(s3.keys("ingest/")) == []
