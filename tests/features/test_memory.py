"""The lifelong rows from night to night in object storage."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from features import catalog, memory
from features.histories.clusters import ItemVectors
from features.histories.lifelong import DAY_MS, LIFELONG_ROWS, daily_lifelong
from features.histories.sequences import Sequences
from features.intake import exposures as exposure_store
from features.memory import Memory
from features.online import OnlineFeatures
from features.runs import Run
from features.schema import ITEM, USER, conform
from features.settings import settings
from features.snapshot import freeze
from features.storage import Storage, connect


def night(storage: Storage, folder: Path, known: pa.Table, end_ms: int, parts: int = 1) -> dict[str, object]:
    """One night's rows, as the data stage asks for them."""
    folder.mkdir()
    told = Memory(storage, folder, end_ms, limit=30)
    users = pc.unique(known["user_id"]).to_pylist()
    for part in range(parts):
        own = pa.array(sorted(users)[part::parts])
        told.rows(known.filter(pc.is_in(known["user_id"], own)))
    return told.close()


def nights(table: pa.Table) -> range:
    times = table["event_time"].cast(pa.int64()).to_numpy()
    return range(int(times.min()) // DAY_MS + 1, int(times.max()) // DAY_MS + 2)


def stored(storage: Storage) -> pa.Table:
    rows = storage.get_table(memory.KEY).replace_schema_metadata(None).cast(LIFELONG_ROWS)
    return rows.sort_by([("user_id", "ascending"), ("event_timestamp", "ascending")])


def between(table: pa.Table, start_ms: int, end_ms: int) -> pa.Table:
    times = table["event_time"].cast(pa.int64()).to_numpy()
    return table.filter(pa.array((times >= start_ms) & (times < end_ms)))


def publish_vectors(storage: Storage, version: str = "v1") -> ItemVectors:
    rng = np.random.default_rng(0)
    names = np.array([f"i{item}" for item in range(30)], object)
    vectors = ItemVectors(item_ids=names, vectors=rng.normal(size=(30, 5)).astype(np.float32), version=version)
    catalog.write_vectors(storage, vectors)
    return vectors


def test_vectors_come_back_as_published_the_newest_version_first(s3: Storage) -> None:
    assert catalog.read_vectors(s3) is None
    publish_vectors(s3, "20260101T000000-aa")
    newest = publish_vectors(s3, "20260102T000000-aa")
    found = catalog.read_vectors(s3)
    assert found is not None
    assert found.version == "20260102T000000-aa"
    assert found.item_ids.tolist() == newest.item_ids.tolist()
    np.testing.assert_array_equal(found.vectors, newest.vectors)


def test_a_window_that_moves_on_does_not_forget_what_it_has_told(s3: Storage, make_exposures, tmp_path: Path) -> None:
    """Each night sees four days only, and the last row still stands for every view since the beginning."""
    table = make_exposures(900, users=5, days=14)
    vectors = publish_vectors(s3)
    for end in nights(table):
        window = between(table, (end - 4) * DAY_MS, end * DAY_MS)
        night(s3, tmp_path / str(end), window, end * DAY_MS, parts=1 + end % 3)
    whole = daily_lifelong(table, 30, vectors)
    assert stored(s3).equals(whole)
    last = whole.filter(pc.equal(whole["user_id"], "u1")).to_pylist()[-1]
    watched = daily_lifelong(table, 10_000).filter(pc.equal(whole["user_id"], "u1")).to_pylist()[-1]
    assert sum(last["counts"]) == len(watched["times"]) > 100


def test_a_night_clusters_only_users_whose_places_are_used_up(s3: Storage, make_exposures, tmp_path: Path) -> None:
    table = make_exposures(1500, users=12, days=25)
    publish_vectors(s3)
    clustered = users = 0
    for end in nights(table):
        counts = night(s3, tmp_path / str(end), between(table, 0, end * DAY_MS), end * DAY_MS)
        if end > nights(table).start + 15:
            # settled rows are two nights old: three days are new each night
            clustered, users = clustered + int(str(counts["clustered"])), users + int(str(counts["rows"]))
    assert 0 < clustered < 0.6 * users


def test_a_repeated_night_changes_nothing_and_an_older_one_does_not_overwrite(
    s3: Storage, make_exposures, tmp_path: Path
) -> None:
    table = make_exposures(500, users=4, days=8)
    end = nights(table)[-1]
    assert night(s3, tmp_path / "a", table, end * DAY_MS - 5)["stored"]
    before = stored(s3)
    assert night(s3, tmp_path / "b", table, end * DAY_MS - 5)["stored"]
    assert stored(s3).equals(before)
    old = night(s3, tmp_path / "c", between(table, 0, (end - 3) * DAY_MS), (end - 3) * DAY_MS)
    assert not old["stored"]
    assert stored(s3).equals(before)


def test_users_without_exposures_in_the_window_keep_their_rows(s3: Storage, make_exposures, tmp_path: Path) -> None:
    early, late = make_exposures(80, users=2, prefix="early"), make_exposures(80, users=2, prefix="late")
    end = nights(early)[-1] * DAY_MS
    night(s3, tmp_path / "a", early, end)
    rows = stored(s3)
    night(s3, tmp_path / "b", late, end)
    assert stored(s3).filter(pc.starts_with(stored(s3)["user_id"], "early")).equals(rows)
    memory.forget(s3)
    night(s3, tmp_path / "c", late, end)
    assert set(stored(s3)["user_id"].to_pylist()) == {"late0", "late1"}


def test_nights_of_the_data_stage_serve_what_they_train_on(
    environment, make_exposures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First by recency, then, with the vectors of a first version, by clusters: on-line as in the frozen data."""
    monkeypatch.setenv("ONEREC_PATHWAYS", "20,64,16")
    settings.cache_clear()
    storage, table = connect(), make_exposures(900, users=6, days=14)
    items = pa.table({"item_id": [f"i{item}" for item in range(30)], "duration_ms": [9] * 30})
    catalog.append_items(storage, conform(items, ITEM))
    catalog.append_users(storage, pa.table({"user_id": ["u0"], "attributes": [["a=b"]]}, schema=USER))
    exposure_store.write(storage, table)
    ends = list(nights(table))
    for number, end in enumerate(ends[-3:]):
        if number == 1:
            publish_vectors(storage)
        start, midnight, folder = ends[0] - 1, datetime.fromtimestamp(end * 86_400, UTC), tmp_path / str(end)
        folder.mkdir()
        begin = datetime.fromtimestamp((start + 2 * number) * 86_400, UTC)  # the window moves on
        freeze(Run(storage, str(end)), folder, begin, midnight, midnight - timedelta(days=4))
        assert json.loads((folder / "manifest.json").read_text())["item_vectors"] == ("v1" if number else None)
    counts = stored(storage).to_pylist()
    assert any(max(row["counts"]) > 1 for row in counts)
    newest = {row["user_id"]: row for row in counts if row["event_timestamp"] <= midnight}
    for user in OnlineFeatures.connect().read(sorted(newest), end * DAY_MS):
        assert user.lifelong is not None
        assert user.lifelong.ids.tolist() == newest[user.user_id]["ids"]
        assert user.lifelong.times.tolist() == newest[user.user_id]["times"]
    sequences = Sequences(folder / "sequences")
    chosen = sequences.trainable[-5:]
    pathway = sequences.lifelong(chosen, np.arange(30), 16)
    for row, request in enumerate(chosen):
        time = int(sequences.requests.times_ms[request])
        rows = [each for each in counts if each["user_id"] == sequences.requests.user_ids[request]]
        known = [each for each in rows if each["event_timestamp"].timestamp() * 1000 <= time][-1]
        ages = pathway.age_s[row][pathway.item[row] >= 0]
        np.testing.assert_allclose(ages, (time - np.array(known["times"])) / 1000, rtol=1e-5)
