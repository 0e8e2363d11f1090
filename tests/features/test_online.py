"""On-line reads and pushes against a real Valkey, and against none."""

import dataclasses
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from features import offline
from features.histories.context import cold_context, hash_static
from features.histories.lifelong import DAY_MS, daily_lifelong
from features.histories.windows import Limits, Window, empty_window, fold, positives, window_of
from features.online import FeaturesUnavailable, OnlineFeatures
from features.schema import USER
from features.settings import Settings
from pipelines.processes import free_ports


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, valkey) -> Settings:
    home = tmp_path_factory.mktemp("home")
    return Settings(home=home, redis=f"{valkey[0]}:{valkey[1]}", redis_password=valkey[2])


@pytest.fixture(scope="module")
def online(config: Settings) -> OnlineFeatures:
    offline.apply(config=config)
    return OnlineFeatures.connect(config=config)


def window(make_exposures, rows: int, seed: int = 0) -> Window:
    return fold(empty_window(), window_of(make_exposures(rows, users=1, seed=seed)), rows)


def test_windows_come_back_as_pushed(online: OnlineFeatures, make_exposures) -> None:
    short = [window(make_exposures, 20), window(make_exposures, 3, seed=1), window(make_exposures, 1, seed=2)]
    positive = [positives(short[0]), empty_window(), empty_window()]
    names = ["push-1", "push-2", "push-3"]
    online.push_windows(names, short, positive, np.array([each.times[-1] for each in short]))
    # repeated and unknown users, in any order
    users = online.read(["push-2", "nobody", "push-1", "push-3", "push-2"], 1_800_000_000_000)
    assert [user.short for user in users] == [short[1], None, short[0], short[2], short[1]]
    assert [user.positive for user in users] == [empty_window(), None, positive[0], empty_window(), empty_window()]
    assert [user.flag for user in users] == ["", "cold", "", "", ""]
    assert users[0].pushed_ms == short[1].times[-1]
    assert users[0].short.ids.dtype == np.int64
    assert online.read([], 5) == []


def test_values_older_than_their_ttl_are_absent(online: OnlineFeatures, config: Settings, make_exposures) -> None:
    """Feast serves them; the clock that counts is the request's, and the rule is the point-in-time join's."""
    home = config.home / "feast"
    exposures = make_exposures(200, users=1, prefix="ttl")
    rows = daily_lifelong(exposures, 10)
    static = pa.table({"user_id": ["ttl0"], "attributes": [["a=1"]]}, schema=USER)
    offline.write_snapshots(home, static, rows, 1_600_000_000_000)
    offline.materialize(home, config)
    last = rows["event_timestamp"].cast(pa.int64()).to_numpy().max()
    edges = last + 60 * DAY_MS + np.array([0, 1])
    users = online.read(["ttl0", "ttl0"], edges)
    assert users[0].lifelong.times.tolist() == rows["times"].to_pylist()[-1]
    assert users[1].lifelong is None
    assert users[1].expired == ("lifelong",)
    assert [user.flag for user in users] == ["", "degraded"]
    assert users[1].static.tolist() == hash_static(["a=1"]).tolist()
    at_join = offline.point_in_time(["ttl0", "ttl0"], edges, home).lifelong["times"].to_pylist()
    assert at_join == [users[0].lifelong.times.tolist(), []]


def test_context_of_known_and_unknown_users(online: OnlineFeatures, make_exposures) -> None:
    short = window(make_exposures, 9, seed=5)
    online.push_windows(["ctx"], [short], [positives(short)], np.array([short.times[-1]]))
    index, limits = pd.Index(sorted(set(short.item_ids)), dtype=object), Limits(short=5, positive=4, lifelong=3)
    now = int(short.times[-1])
    context, flags = online.context(["ctx", "nobody"], now, index, limits)
    assert flags == ["", "cold"]
    assert context.short.item[0].tolist() == index.get_indexer(short.item_ids[-6:-1]).tolist()  # not the event at `now`
    cold = cold_context(1, limits)
    for name in ("short", "positive", "lifelong"):
        pathway, expected = getattr(context, name).take(slice(1, 2)), getattr(cold, name)
        for field in dataclasses.fields(expected):
            np.testing.assert_array_equal(getattr(pathway, field.name), getattr(expected, field.name))


def test_dead_valkey_is_said_so(config: Settings, online: OnlineFeatures) -> None:
    port = next(free_ports(1))
    dead = OnlineFeatures.connect(config=config.model_copy(update={"redis": f"127.0.0.1:{port}"}))
    with pytest.raises(FeaturesUnavailable, match=rf"Valkey at 127.0.0.1:{port} does not answer .*onerec up"):
        dead.read(["a"], 1)
    with pytest.raises(FeaturesUnavailable, match="onerec up"):
        dead.push_windows(["a"], [empty_window()], [empty_window()], np.array([1]))


def test_silent_valkey_is_given_up(config: Settings, online: OnlineFeatures) -> None:
    """A server that accepts and never answers; without the read's time-out this test would hang."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        dead = OnlineFeatures.connect(config=config.model_copy(update={"redis": address}))
        with pytest.raises(FeaturesUnavailable, match="Timeout"):
            dead.read(["a"], 1)


def test_missing_registry_is_said_so_and_not_created(tmp_path: Path, config: Settings) -> None:
    reader = OnlineFeatures.connect(tmp_path, config)
    with pytest.raises(FeaturesUnavailable, match=r"no feature registry at .*registry.db; run `onerec up`"):
        reader.read(["a"], 1)
    assert list(tmp_path.iterdir()) == []
    offline.apply(tmp_path, config)
    assert reader.read(["someone new"], 1)[0].flag == "cold"
