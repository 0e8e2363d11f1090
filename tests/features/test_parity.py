"""Training and serving see the same: all four pathways, random users and times; and nobody sees the future."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features import offline, snapshot
from features.histories.clusters import ItemVectors
from features.histories.context import Context
from features.histories.etl import sequences_of_table
from features.histories.lifelong import DAY_MS, daily_lifelong
from features.histories.sequences import Sequences
from features.histories.windows import Limits
from features.online import OnlineFeatures
from features.schema import EXPOSURE, FEEDBACK, IMPRESSION, USER, conform
from features.settings import Settings
from features.snapshot import training_features
from features.updater import Updater

LIMITS = Limits(short=7, positive=11, lifelong=24)
ITEM_IDS = pa.array([f"i{item}" for item in range(28)])  # two items are unknown to the catalogue
INDEX = pd.Index(ITEM_IDS.to_pylist(), dtype=object)
USERS = [f"parity{user}" for user in range(7)]


@pytest.fixture(scope="module")
def log(make_exposures) -> pa.Table:
    return make_exposures(900, users=7, days=14, prefix="parity")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, valkey, log: pa.Table) -> Settings:
    config = Settings(home=tmp_path_factory.mktemp("home"), redis=f"{valkey[0]}:{valkey[1]}", redis_password=valkey[2])
    write_snapshots(config, log)
    offline.apply(config=config)
    return config


def write_snapshots(config: Settings, log: pa.Table) -> None:
    rng = np.random.default_rng(2)
    vectors = ItemVectors(
        item_ids=np.array([f"i{item}" for item in range(30)], object),
        vectors=rng.normal(size=(30, 6)).astype(np.float32),
        version="v",
    )
    users = pa.table({"user_id": USERS, "attributes": [[f"name={user}", "city=x"] for user in USERS]}, schema=USER)
    rows = daily_lifelong(log, LIMITS.lifelong, vectors)
    assert (rows["clustered_ms"].to_numpy() > 0).sum() > 20, "clusters are part of what is compared"
    since = int(pc.min(log["event_time"]).as_py().timestamp() * 1000)
    offline.write_snapshots(config.home / "feast", users, rows, since)


def asked_at(log: pa.Table, users: list[str], moment: int) -> pa.Table:
    """Exposures of one request by each of ``users`` at ``moment``: a request without exposures has no context."""
    names = [f"asked-{user}" for user in users]
    asked = {"exposure_id": names, "request_id": names, "user_id": users, "event_time": [moment] * len(users)}
    columns = {name: log[name].slice(0, len(users)) for name in log.column_names} | asked
    return conform(pa.table(columns), EXPOSURE)


def as_trained(log: pa.Table, users: list[str], moment: int, config: Settings, folder: Path) -> Context:
    """The contexts of requests at ``moment`` as the data stage freezes them: point-in-time rows, slices of the log."""
    asked = pa.concat_tables([log, asked_at(log, sorted(set(users)), moment)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(snapshot, "feast_home", lambda: config.home / "feast")
        sequences_of_table(asked, ITEM_IDS, folder, lambda part, _: training_features(part, ITEM_IDS, moment))
    sequences, rows = Sequences(folder / "sequences"), np.arange(len(ITEM_IDS))
    later = np.flatnonzero(sequences.requests.times_ms >= moment)
    assert np.array_equal(sequences.trainable, later), "entity rows in == rows out"
    request = {name: row for row, name in enumerate(sequences.request_ids.to_pylist())}
    chosen = np.array([request[f"asked-{user}"] for user in users])
    return Context(
        static=sequences.static(chosen),
        short=sequences.short(chosen, rows, LIMITS.short),
        positive=sequences.positive(chosen, rows, LIMITS.positive),
        lifelong=sequences.lifelong(chosen, rows, LIMITS.lifelong),
    )


def assert_equal(served: Context, trained: Context) -> None:
    np.testing.assert_array_equal(served.static, trained.static)
    for name in ("short", "positive", "lifelong"):
        for field in fields(trained.short):
            pair = (getattr(getattr(context, name), field.name) for context in (served, trained))
            np.testing.assert_array_equal(*pair, err_msg=f"{name}.{field.name}")


def test_served_contexts_equal_those_trained_on(log: pa.Table, config: Settings, tmp_path: Path) -> None:
    """Time passes; at random moments random users, strangers among them, are looked at from both sides."""
    rng = np.random.default_rng(4)
    online, updater = OnlineFeatures.connect(config=config), None
    times = log["event_time"].cast(pa.int64()).to_numpy()
    moments = np.sort(rng.choice(np.unique(times)[20:], 9, replace=False))
    applied, filled = 0, 0
    for moment in moments.tolist():
        updater = updater or Updater(online, LIMITS)
        upto = int(np.searchsorted(times, moment))
        part = log.slice(applied, upto - applied)
        updater.apply(part.select(IMPRESSION.names).cast(IMPRESSION), part.select(FEEDBACK.names).cast(FEEDBACK))
        offline.materialize(config=config, now_ms=moment)
        applied, updater = upto, None if rng.random() < 0.3 else updater  # now and then it restarts
        users = rng.choice([*USERS, "stranger"], 9).tolist()  # with repeats
        served, _ = online.context(users, moment, INDEX, LIMITS)
        assert_equal(served, as_trained(log, users, moment, config, tmp_path / str(moment)))
        filled += int((served.lifelong.item >= 0).sum())
    assert filled > 300


def test_a_planted_future_event_changes_no_context(log: pa.Table, config: Settings, tmp_path: Path) -> None:
    times = log["event_time"].cast(pa.int64()).to_numpy()
    moment = int(times[600])
    before = as_trained(log, USERS, moment, config, tmp_path / "before")
    # what follows the moment becomes something nobody could miss: liked, watched for an hour
    late = pa.array(times >= moment)
    planted = log.set_column(
        log.column_names.index("play_ms"), "play_ms", pc.if_else(late, 3_600_000, log["play_ms"])
    ).set_column(log.column_names.index("like"), "like", pc.or_(late, log["like"]))
    planted = planted.cast(log.schema)
    write_snapshots(config, planted)
    assert_equal(as_trained(planted, USERS, moment, config, tmp_path / "planted"), before)
    after = as_trained(planted, USERS, moment + DAY_MS, config, tmp_path / "after")
    assert (after.positive.play_ms == 3_600_000).any(), "the plant is there, a day later"
    write_snapshots(config, log)


def test_a_future_event_planted_in_a_snapshot_is_caught(log: pa.Table, config: Settings, tmp_path: Path) -> None:
    home = tmp_path / "feast"
    home.mkdir()
    for name in ("user_static.parquet", "lifelong.parquet"):
        (home / name).write_bytes((config.home / "feast" / name).read_bytes())
    offline.apply(home, config)
    rows = pq.read_table(home / "lifelong.parquet")
    stamps = rows["event_timestamp"].cast(pa.int64()).to_numpy()
    moment = int(np.median(stamps)) + 5
    offline.point_in_time(USERS, np.full(7, moment), home, config)
    # each row is stamped a day too early, as a job that is off by a time zone would do
    early = pa.array(stamps - DAY_MS).cast(rows.schema.field("event_timestamp").type)
    pq.write_table(rows.set_column(1, "event_timestamp", early), home / "lifelong.parquet")
    with pytest.raises(offline.FutureLeak, match=r"tells \d+ events at or after .* user 'parity\d' at \d+ of an event"):
        offline.point_in_time(USERS, np.full(7, moment), home, config)
