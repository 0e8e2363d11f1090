"""Sequences on disk: the same contexts as the fold gives, however the log was cut."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.histories.columns import Growing, read_columns
from features.histories.context import Pathway
from features.histories.etl import EtlConfig, build_parts, read_parts, sequences_of_files, sequences_of_table
from features.histories.parts import Part, part_of
from features.histories.requests import requests
from features.histories.sequences import PartFeatures, Sequences, SequenceWriter
from features.histories.windows import Limits
from features.schema import EXPOSURE

ITEM_IDS = pa.array([f"i{item}" for item in range(25)])  # five of the thirty items are unknown
INDEX = pd.Index(ITEM_IDS.to_pylist(), dtype=object)
LIMITS = Limits(short=6, positive=4)


def assert_same(actual: Pathway, expected: Pathway) -> None:
    for name in ("item", "age_s", "play_ms", "duration_ms", "labels"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
        assert getattr(actual, name).dtype == getattr(expected, name).dtype, name


def check_against_the_fold(folder: Path, table: pa.Table, folded: Callable[..., tuple[Pathway, Pathway]]) -> None:
    sequences = Sequences(folder / "sequences")
    found = sequences.requests
    chosen = np.arange(len(found))
    expected = folded(table, found.user_ids.tolist(), found.times_ms, INDEX, LIMITS)
    item_rows = np.arange(len(ITEM_IDS))
    assert_same(sequences.short(chosen, item_rows, LIMITS.short), expected[0])
    assert_same(sequences.positive(chosen, item_rows, LIMITS.positive), expected[1])


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), rows=st.integers(0, 150), users=st.integers(1, 6))
def test_pathways_equal_the_fold(make_exposures, folded, tmp_path_factory, seed: int, rows: int, users: int) -> None:
    table = make_exposures(rows, seed=seed, users=users)
    folder = tmp_path_factory.mktemp("run")
    shuffled = table.take(np.random.default_rng(seed).permutation(rows))
    repeated = pa.concat_tables([shuffled, table.slice(0, rows // 3)])
    counts = sequences_of_table(repeated, ITEM_IDS, folder)
    assert counts["exposures"] == rows
    check_against_the_fold(folder, table, folded)


def test_the_index_is_that_of_requests(make_exposures, tmp_path: Path) -> None:
    table = make_exposures(300)
    sequences_of_table(table, ITEM_IDS, tmp_path)
    rows, found = pq.read_table(tmp_path / "exposures.parquet"), Sequences(tmp_path / "sequences").requests
    assert rows.schema.equals(EXPOSURE)
    expected = requests(rows)
    for name in ("request_ids", "user_ids", "times_ms", "offsets", "rows"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert found.rows_of(3).tolist() == expected.rows_of(3).tolist()


def test_no_request_sees_itself_or_the_future(make_exposures, tmp_path: Path) -> None:
    """Later events planted into the log of every user leave all contexts up to them as they were."""
    table = make_exposures(200)
    sequences_of_table(table, ITEM_IDS, tmp_path / "clean")
    clean = Sequences(tmp_path / "clean" / "sequences")
    moment = int(clean.requests.times_ms[len(clean.requests) // 2])
    rows = [
        {
            **table.to_pylist()[0],
            "exposure_id": f"planted-{user}",
            "request_id": f"planted-{user}",
            "user_id": user,
            "event_time": moment,
            "like": True,
        }
        for user in set(table["user_id"].to_pylist())
    ]
    types = EXPOSURE.set(EXPOSURE.get_field_index("event_time"), pa.field("event_time", pa.int64()))
    planted = pa.Table.from_pylist(rows, schema=types).cast(EXPOSURE)
    sequences_of_table(pa.concat_tables([table, planted]), ITEM_IDS, tmp_path / "planted")
    leaky, item_rows = Sequences(tmp_path / "planted" / "sequences"), np.arange(len(ITEM_IDS))
    names = {name: row for row, name in enumerate(leaky.requests.request_ids)}
    own = np.array([names[name] for name in clean.requests.request_ids])
    before, chosen = clean.requests.times_ms <= moment, np.arange(len(own))
    for pathway in ("short", "positive"):
        mine = getattr(clean, pathway)(chosen, item_rows, LIMITS.short)
        theirs = getattr(leaky, pathway)(own, item_rows, LIMITS.short)
        assert_same(theirs.take(before), mine.take(before))
        assert (theirs.item[~before] != mine.item[~before]).any()


@pytest.mark.parametrize("executor", ["process", pytest.param("ray", marks=pytest.mark.long)])
def test_many_partitions_give_the_contexts_of_one(
    make_exposures: Callable[..., pa.Table], folded, tmp_path: Path, executor: str
) -> None:
    table = make_exposures(400, users=12)
    files = []
    for number, start in enumerate(range(0, 400, 90)):
        files.append(tmp_path / f"{number}.parquet")
        pq.write_table(table.slice(start, 120), files[-1])  # files overlap: rows repeat
    config = EtlConfig(partition_rows=60, executor=executor)
    moved: list[tuple[int, int]] = []
    counts = sequences_of_files(
        files, ITEM_IDS, tmp_path / "many", scratch=tmp_path / "s", config=config, progress=lambda *n: moved.append(n)
    )
    assert len(moved) > 3
    assert moved[-1][0] == moved[-1][1]
    whole = sequences_of_table(table, ITEM_IDS, tmp_path / "one")
    assert counts == whole
    check_against_the_fold(tmp_path / "many", table, folded)
    one, many = (Sequences(tmp_path / name / "sequences").requests for name in ("one", "many"))
    assert np.array_equal(one.times_ms, many.times_ms)
    assert dict(zip(one.request_ids, np.diff(one.offsets), strict=True)) == dict(
        zip(many.request_ids, np.diff(many.offsets), strict=True)
    )
    exposures = pq.read_table(tmp_path / "many" / "exposures.parquet")
    items = pc.index_in(exposures["item_id"], value_set=ITEM_IDS).fill_null(-1).to_numpy()
    assert np.array_equal(items, Sequences(tmp_path / "many" / "sequences").events["item"])


def test_a_killed_run_goes_on_with_the_parts_it_has(
    make_exposures, folded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_exposures(200, users=12)
    pq.write_table(table, tmp_path / "log.parquet")
    config, built = EtlConfig(partition_rows=50), []

    def stop_after_two(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    arguments = ([tmp_path / "log.parquet"], ITEM_IDS, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        sequences_of_files(*arguments, scratch=tmp_path / "s", config=config, progress=stop_after_two)
    import features.histories.etl as etl

    original = etl.write_part
    monkeypatch.setattr(etl, "write_part", lambda *a: built.append(a[1].name) or original(*a))
    counts = sequences_of_files(*arguments, scratch=tmp_path / "s", config=config)
    parts = [path.name for path in (tmp_path / "s" / "parts").iterdir()]
    assert 0 < len(built) == len(parts) - 2
    assert counts["exposures"] == 200
    check_against_the_fold(tmp_path / "run", table, folded)


def test_a_window_cuts_the_log(make_exposures, tmp_path: Path) -> None:
    table = make_exposures(100)
    pq.write_table(table, tmp_path / "log.parquet")
    files, times = [tmp_path / "log.parquet"], table["event_time"].to_pylist()
    window = (times[20], times[70])
    inside = sum(window[0] <= time < window[1] for time in times)
    for rows in (1000, 20):
        parts = build_parts(files, ITEM_IDS, tmp_path / str(rows), window=window, config=EtlConfig(partition_rows=rows))
        assert (len(parts) > 1) == (rows == 20)
        assert sum(len(part.user) for part in read_parts(parts)) == inside
    nothing = (times[-1].replace(year=2040), times[-1].replace(year=2041))
    assert build_parts(files, ITEM_IDS, tmp_path / "t", window=nothing) == []
    assert build_parts([], ITEM_IDS, tmp_path / "u") == []


def test_unknown_items_are_named(make_exposures) -> None:
    table = make_exposures(200)
    part, _ = part_of(table, ITEM_IDS)
    assert set(part.unknown_items.to_pylist()) == set(table["item_id"].to_pylist()) - set(ITEM_IDS.to_pylist()) != set()


def test_features_are_stored_once_per_list_and_read_per_request(make_exposures, tmp_path: Path) -> None:
    part, _ = part_of(make_exposures(40, users=2), ITEM_IDS)
    chosen = np.arange(2, len(part.request_time))
    counts = np.full(len(chosen), 2)
    value = np.repeat(np.arange(len(chosen)) // 3, 2)  # three requests in a row share a list
    events = {name: value.astype(np.int64) for name in ("item", "play_ms", "duration_ms", "labels")}
    static = np.arange(len(chosen) * 8).reshape(-1, 8)
    writer = SequenceWriter(tmp_path)
    writer.append(
        part, PartFeatures(request=chosen, static=static, counts=counts, events=events | {"time_ms": value * 10})
    )
    sizes = writer.close()
    assert sizes["lifelong"] == -(-len(chosen) // 3) < sizes["features"] == len(chosen)
    sequences = Sequences(tmp_path)
    assert sequences.trainable.tolist() == chosen.tolist()
    assert sequences.static(chosen).tolist() == static.tolist()
    pathway = sequences.lifelong(chosen, np.arange(25), 3)
    assert pathway.item.tolist() == [[-1, n // 3, n // 3] for n in range(len(chosen))]
    assert np.allclose(pathway.age_s[:, 1], (part.request_time[chosen] - value[::2] * 10) / 1000)
    with pytest.raises(AssertionError, match="without features"):
        sequences.static(np.array([0]))


def test_parts_survive_the_disk(make_exposures, tmp_path: Path) -> None:
    part, _ = part_of(make_exposures(30), ITEM_IDS)
    part.save(tmp_path / "part.arrow")
    again = Part.load(tmp_path / "part.arrow")
    assert again.user_ids.equals(part.user_ids)
    assert np.array_equal(again.target, part.target)


def test_missing_and_damaged_files_are_named(make_exposures, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks events\.arrow, .*prepare the run's data first"):
        Sequences(tmp_path)
    sequences_of_table(make_exposures(20), ITEM_IDS, tmp_path)
    sequences_of_table(make_exposures(10), ITEM_IDS, tmp_path / "other")
    (tmp_path / "other/sequences/targets.arrow").replace(tmp_path / "sequences/targets.arrow")
    with pytest.raises(ValueError, match="not written whole"):
        Sequences(tmp_path / "sequences")


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="partition_rows 0"):
        EtlConfig(partition_rows=0)
    with pytest.raises(ValueError, match="give auto, process or ray"):
        EtlConfig(executor="spark")  # type: ignore[arg-type]


def test_columns_grow_and_are_mapped(tmp_path: Path) -> None:
    schema = pa.schema([("name", pa.large_string()), ("pair", pa.list_(pa.int64(), 2)), ("n", pa.int32())])
    growing = Growing(tmp_path / "g", schema)
    growing.append({"name": pa.array(["é", "", "abc"]), "pair": np.arange(6).reshape(3, 2), "n": np.arange(3)})
    growing.append({"name": pa.array([], pa.string()), "pair": np.empty((0, 2)), "n": np.empty(0)})
    growing.append({"name": pa.array(["x", "yy", "z"]).slice(1, 2), "pair": np.ones((2, 2)), "n": np.array([7, 8])})
    growing.finish(tmp_path / "file.arrow")
    batch = read_columns(tmp_path / "file.arrow")
    assert batch.to_pydict() == {
        "name": ["é", "", "abc", "yy", "z"],
        "pair": [[0, 1], [2, 3], [4, 5], [1, 1], [1, 1]],
        "n": [0, 1, 2, 7, 8],
    }
    assert not (tmp_path / "g").exists()
