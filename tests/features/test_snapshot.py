"""The data stage against real storage, Valkey and Feast: the same contexts in memory and partition by partition."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features import catalog
from features.histories.context import hash_static
from features.histories.etl import EtlConfig
from features.histories.lifelong import DAY_MS, WATCHED_MS
from features.histories.sequences import Sequences
from features.intake import exposures as exposure_store
from features.online import OnlineFeatures
from features.runs import Run
from features.schema import ITEM, USER, conform
from features.snapshot import EmptyWindow, freeze, prepare
from features.storage import Storage, connect

ITEMS = pa.array([f"i{item}" for item in range(30)])
LIMIT = 64


@pytest.fixture
def log(environment, make_exposures) -> pa.Table:
    """A log of eight users in the store; users u8 and u9 have attributes and no exposure."""
    table = make_exposures(240, users=8)
    storage = connect()
    catalog.append_items(storage, conform(pa.table({"item_id": ITEMS, "duration_ms": [9] * len(ITEMS)}), ITEM))
    names = [f"u{user}" for user in range(10)]
    users = pa.table({"user_id": names, "attributes": [[f"name={name}"] for name in names]}, schema=USER)
    catalog.append_users(storage, users)
    exposure_store.write(storage, table)
    return table


def window(table: pa.Table) -> tuple[datetime, datetime, datetime]:
    """Start, end and the time of the first target, in the middle."""
    times = table["event_time"].to_pylist()
    return times[0], times[-1] + timedelta(seconds=1), times[len(times) // 2]


def frozen(table: pa.Table, folder: Path, config: EtlConfig | None = None) -> dict[str, int]:
    start, end, targets_from = window(table)
    folder.mkdir()
    return freeze(Run(connect(), "run"), folder, start, end, targets_from, config)


def test_features_are_those_before_the_last_midnight(log: pa.Table, tmp_path: Path) -> None:
    summary = frozen(log, tmp_path / "data")
    sequences = Sequences(tmp_path / "data" / "sequences")
    chosen, grouped = sequences.trainable, sequences.requests
    target_ms = int(window(log)[2].timestamp() * 1000)
    assert chosen.tolist() == np.flatnonzero(grouped.times_ms >= target_ms).tolist()
    assert summary["requests"] == len(chosen) > 10
    lifelong = sequences.lifelong(chosen, np.arange(30), LIMIT)
    names = pq.read_table(tmp_path / "data" / "items.parquet")["item_id"].to_pylist()
    events = log.sort_by([("event_time", "ascending")]).to_pandas()
    times = log.sort_by([("event_time", "ascending")])["event_time"].cast(pa.int64()).to_numpy()
    enough = (events["play_ms"] >= WATCHED_MS) | (2 * events["play_ms"] >= events["duration_ms"])
    for n, request in enumerate(chosen):
        user = grouped.user_ids[request]
        assert sequences.static(chosen)[n].tolist() == hash_static([f"name={user}"]).tolist()
        midnight = grouped.times_ms[request] // DAY_MS * DAY_MS
        expected = events[(events["user_id"] == user) & (times < midnight) & enough]["item_id"].tolist()[-LIMIT:]
        found = [names[item] for item in lifelong.item[n] if item >= 0]
        assert sorted(found) == sorted(expected)


def test_partitions_give_the_contexts_of_one(log: pa.Table, tmp_path: Path) -> None:
    whole = frozen(log, tmp_path / "one")
    online = OnlineFeatures.connect()
    names, now = [f"u{user}" for user in range(10)], int(window(log)[1].timestamp() * 1000)
    before = online.read(names, now)
    parts = frozen(log, tmp_path / "many", EtlConfig(partition_rows=40))
    assert parts == whole
    for mine, theirs in zip(online.read(names, now), before, strict=True):
        assert np.array_equal(mine.static, theirs.static)
        assert mine.lifelong == theirs.lifelong
    one, many = (Sequences(tmp_path / name / "sequences") for name in ("one", "many"))
    names_of = one.requests.request_ids
    order = {(name, user): row for row, (name, user) in enumerate(zip(names_of, one.requests.user_ids, strict=True))}
    again = [order[key] for key in zip(many.requests.request_ids, many.requests.user_ids, strict=True)]
    assert (np.diff(many.requests.times_ms) >= 0).all()
    chosen = many.trainable
    same = np.array(again)[chosen]
    for pathway in ("short", "positive", "lifelong"):
        for field in ("item", "age_s", "labels"):
            mine = getattr(getattr(many, pathway)(chosen, np.arange(30), 9), field)
            theirs = getattr(getattr(one, pathway)(same, np.arange(30), 9), field)
            assert np.array_equal(mine, theirs), (pathway, field)
    assert np.array_equal(many.static(chosen), one.static(same))
    rows = pq.read_table(tmp_path / "many" / "exposures.parquet")
    assert sorted(rows["exposure_id"].to_pylist()) == sorted(log["exposure_id"].to_pylist())


def test_a_run_is_prepared_once_and_names_its_segments(log: pa.Table, s3: Storage) -> None:
    start, end, targets_from = (time.isoformat() for time in window(log))
    digest = prepare("run", start, end, targets_from)
    manifest = s3.get("runs/run/data/manifest.json")
    assert json.loads(manifest)["exposures"] == log.num_rows
    assert sorted(json.loads(manifest)["segments"]) == sorted(s3.keys("exposures/"))
    late = log.slice(0, 1).set_column(0, log.schema.field(0), [["late"]])
    exposure_store.write(s3, late)  # in the window, and after the run froze it
    assert prepare("run", start, end, targets_from) == digest
    assert s3.get("runs/run/data/manifest.json") == manifest


def test_windows_that_cannot_be_learned_from_are_refused(log: pa.Table, s3: Storage, tmp_path: Path) -> None:
    run, (start, end, targets_from) = Run(s3, "run"), window(log)
    later = timedelta(days=4000)  # a clock ten years off: the rows lie in another window
    with pytest.raises(EmptyWindow, match="no exposure lies in"):
        freeze(run, tmp_path, start + later, end + later, targets_from + later)
    one = log.filter(pc.equal(log["user_id"], "u1"))
    first = one["event_time"].to_pylist()[0]
    with pytest.raises(EmptyWindow, match="of 1 user; at least 2"):
        freeze(run, tmp_path, first, first + timedelta(milliseconds=1), first)
    strange = log.slice(0, 1).set_column(log.schema.get_field_index("item_id"), log.schema.field("item_id"), [["new"]])
    strange = strange.set_column(0, log.schema.field(0), [["other"]])
    exposure_store.write(s3, strange)
    with pytest.raises(EmptyWindow, match=r"1 items of the exposures are not in the catalogue \(new\)"):
        freeze(run, tmp_path, start, end, targets_from)


def test_a_past_that_left_the_window_is_still_in_the_lifelong_pathway(log: pa.Table, tmp_path: Path) -> None:
    """The first night sees all; the next one's window begins later, and items of before are known by the catalogue."""
    start, end, targets_from = window(log)
    run = Run(connect(), "run")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    freeze(run, tmp_path / "first", start, end, targets_from)
    later = end - timedelta(days=2)
    freeze(run, tmp_path / "second", later, end, later)
    sequences, names = (
        Sequences(tmp_path / "second" / "sequences"),
        catalog.read_items(connect())["item_id"].to_pylist(),
    )
    pathway = sequences.lifelong(sequences.trainable, np.arange(len(names)), LIMIT)
    shown = set(pq.read_table(tmp_path / "second" / "exposures.parquet")["item_id"].to_pylist())
    told = {names[item] for item in pathway.item[pathway.item >= 0]}
    assert told - shown, "items of the past"
    assert (pathway.item >= 0).sum(1).max() > 5
