"""Feast's off-line store, for real: DuckDB over Parquet, a file registry, the `feast` command itself."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import offline
from features.histories.context import hash_static
from features.histories.lifelong import DAY_MS, daily_lifelong, events_of_lists
from features.online import OnlineFeatures
from features.repository import REPOSITORY, open_store
from features.schema import USER
from features.settings import Settings

DAY = 19_000 * DAY_MS  # some midnight


def lifelong_rows(rows: list[tuple[str, int, list[int]]]) -> pa.Table:
    """(user, midnight, event times) as rows of the lifelong snapshot."""
    times = pa.array([row[2] for row in rows], pa.list_(pa.int64()))
    names = pa.array([[f"i{time}" for time in row[2]] for row in rows], pa.list_(pa.string()))
    columns = {
        "user_id": [row[0] for row in rows],
        "event_timestamp": pa.array([row[1] for row in rows]).cast(pa.timestamp("ms", "UTC")),
        **dict.fromkeys(("ids", "times", "play_ms", "duration_ms", "labels"), times),
        "item_ids": names,
    }
    return pa.table(columns).select(offline.WINDOW_ROWS.names)


def users(*names: str) -> pa.Table:
    return pa.table({"user_id": list(names), "attributes": [[f"name={name}"] for name in names]}, schema=USER)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    rows = [
        ("a", DAY, [1]),
        ("a", DAY + DAY_MS, [1, 2]),
        ("b", DAY, [3]),
    ]
    offline.write_snapshots(tmp_path / "feast", users("a", "b"), lifelong_rows(rows), DAY)
    offline.apply(tmp_path / "feast")
    return tmp_path / "feast"


def test_every_entity_row_comes_back_in_order_as_of_its_time(home: Path) -> None:
    # duplicates, an unknown user, before the first row, exactly at a midnight, one ms before it
    ids = ["b", "a", "stranger", "a", "a", "a", "b", "a"]
    times = DAY + np.array([5, DAY_MS - 1, 5, DAY_MS, -1, 5, 5, 5])
    known = offline.point_in_time(ids, times, home)
    assert known.lifelong["times"].to_pylist() == [[3], [1], [], [1, 2], [], [1], [3], [1]]
    assert known.lifelong["item_ids"].to_pylist()[3] == ["i1", "i2"]
    expected = [hash_static([f"name={name}"]) for name in ids]
    for row, static in enumerate(expected):
        absent = ids[row] == "stranger" or times[row] < DAY
        assert known.static[row].tolist() == (static.tolist() if not absent else [0] * 8)


def test_lifelong_expires_after_60_days_and_static_does_not(home: Path) -> None:
    times = DAY + np.array([60 * DAY_MS, 60 * DAY_MS + 1, 3_000 * DAY_MS])
    known = offline.point_in_time(["b"] * 3, times, home)
    assert known.lifelong["times"].to_pylist() == [[3], [], []]
    assert (known.static[:, 0] > 0).all()


def test_no_entity_rows(home: Path) -> None:
    known = offline.point_in_time([], np.empty(0, np.int64), home)
    assert (len(known.static), known.lifelong.num_rows) == (0, 0)


def test_missing_snapshots_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="onerec ingest"):
        offline.point_in_time(["a"], np.array([1]), tmp_path)


def test_apply_again_keeps_snapshots(home: Path) -> None:
    before = pq.read_table(home / "lifelong.parquet")
    store = offline.apply(home)
    assert pq.read_table(home / "lifelong.parquet").equals(before)
    names = {view.name for view in store.list_feature_views()}
    assert names == {"user_static", "short_term", "positive_feedback", "lifelong"}


def test_thousands_of_rows_match_a_plain_search(make_exposures, tmp_path: Path) -> None:
    exposures = make_exposures(4_000, users=150, days=12)
    names = sorted(set(exposures["user_id"].to_pylist()))
    rows = daily_lifelong(exposures, limit=10)
    offline.write_snapshots(tmp_path, users(*names), rows, 0)
    offline.apply(tmp_path)
    rng = np.random.default_rng(1)
    ids = rng.choice([*names, "stranger"], 3_000)
    times = rng.choice(exposures["event_time"].cast(pa.int64()).to_numpy(), 3_000)
    known = offline.point_in_time(ids, times, tmp_path)
    stamps = rows["event_timestamp"].cast(pa.int64()).to_numpy()
    table = pd.DataFrame({"user_id": rows["user_id"].to_pylist(), "stamp": stamps, "times": rows["times"].to_pylist()})
    by_user = dict(list(table.groupby("user_id")))
    actual = known.lifelong["times"].to_pylist()
    for row in range(0, 3_000, 7):
        own = by_user.get(ids[row])
        earlier = [] if own is None else own[own.stamp <= times[row]].times.tolist()
        assert actual[row] == (earlier[-1] if earlier else [])
    events, counts = events_of_lists(known.lifelong)
    assert (events.times < np.repeat(times, counts)).all()


def test_materialize_writes_the_latest_rows_and_corrections(home: Path, valkey) -> None:
    config = Settings(redis=f"{valkey[0]}:{valkey[1]}", redis_password=valkey[2])
    assert offline.materialize(home, config, now_ms=DAY) == {"user_static": 2, "lifelong": 2}
    online = OnlineFeatures.connect(home, config)
    assert online.read(["a"], DAY)[0].lifelong.times.tolist() == [1]
    offline.materialize(home, config)
    assert online.read(["a"], DAY + DAY_MS)[0].lifelong.times.tolist() == [1, 2]
    # the same midnight again, with a view that was reported late
    offline.write_snapshots(home, users("a", "b"), lifelong_rows([("a", DAY + DAY_MS, [1, 2, 7])]), DAY)
    offline.materialize(home, config)
    assert online.read(["a"], DAY + DAY_MS)[0].lifelong.times.tolist() == [1, 2, 7]
    offline_rows = offline.point_in_time(["a"], np.array([DAY + DAY_MS]), home).lifelong
    assert offline_rows["times"].to_pylist() == [[1, 2, 7]]


def test_feast_command_applies_the_same_repository(tmp_path: Path, valkey) -> None:
    """`feast apply` with the exported variables; what it registers, our store reads."""
    env = {
        **os.environ,
        "ONEREC_HOME": str(tmp_path),
        "ONEREC_REDIS": f"{valkey[0]}:{valkey[1]}",
        "ONEREC_REDIS_PASSWORD": valkey[2],
        "PYTHONPATH": str(REPOSITORY.parents[1]),
        "FEAST_USAGE": "False",
    }
    command = [str(Path(sys.executable).parent / "feast"), "apply"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    config = Settings(home=tmp_path, redis=f"{valkey[0]}:{valkey[1]}", redis_password=valkey[2])
    store = open_store(config=config)
    assert {view.name for view in store.list_feature_views()} == set(offline.SNAPSHOTS)
    assert store.get_feature_view("lifelong").batch_source.path == str(tmp_path / "feast/lifelong.parquet")
    assert OnlineFeatures(store).read(["nobody"], 1)[0].flag == "cold"
