"""Deltas applied to a bundle and written for a version, on real object storage."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features import catalog, deltas
from features.histories.context import cold_context
from features.schema import ITEM, conform
from features.storage import Storage
from models.bundle import Bundle, fetch, publish, set_alias
from models.deltas import DeltaReader, catch_up, catch_up_served
from models.serving.recommender import Recommender

TIME = datetime(2026, 1, 2, tzinfo=UTC)


def new_items(*ids: str) -> pa.Table:
    columns = {"item_id": list(ids), "tags": [["t1"]] * len(ids), "author_id": ["a2"] * len(ids)}
    return conform(pa.table({**columns, "duration_ms": [20_000] * len(ids)}), ITEM)


@pytest.fixture
def version(s3: Storage, write_bundle: Callable[..., Path], tmp_path: Path) -> str:
    return publish(s3, write_bundle(tmp_path / "made"), data_time=TIME)


@pytest.fixture
def bundle(s3: Storage, version: str, tmp_path: Path) -> Bundle:
    return Bundle.load(fetch(s3, version, tmp_path / "cache"))


def shown(bundle: Bundle) -> list[str]:
    (answer,) = Recommender(bundle).recommend(cold_context(1, bundle.limits), num_items=500, beam_width=512)
    return answer.item_ids


def test_catching_up_gives_sids_once_and_never_changes_those_there_are(
    s3: Storage, version: str, bundle: Bundle, tmp_path: Path
) -> None:
    catalog.append_items(s3, bundle.catalogue.items)
    assert catch_up(s3, version, tmp_path / "cache") == 0
    catalog.append_items(s3, new_items("n1", "n2"))
    assert catch_up(s3, version, tmp_path / "cache") == 2
    catalog.append_items(s3, new_items("n2", "n3"))
    assert catch_up(s3, version, tmp_path / "cache") == 1
    assert catch_up(s3, version, tmp_path / "cache") == 0
    reader = DeltaReader(s3)
    moved = reader.apply(bundle, reader.keys(version))
    assert (moved.appended, moved.blocked, moved.problems) == (3, 0, ())
    assert moved.bundle.catalogue.item_ids == [*bundle.catalogue.item_ids, "n1", "n2", "n3"]
    assert (moved.bundle.catalogue.sids[: len(bundle.catalogue)] == bundle.catalogue.sids).all()
    assert {"n1", "n2", "n3"} <= set(shown(moved.bundle))
    assert "n1" not in shown(bundle), "the published bundle stays as it was"
    reader.apply(bundle, ())
    assert not reader._items, "a server that runs for months does not hold the deltas of every version it served"


def test_what_is_taken_down_is_never_shown_and_comes_back_when_unblocked(
    s3: Storage, version: str, bundle: Bundle
) -> None:
    # i0 shares its SID with i110; i5 is alone in many searches; "later" is not in the catalogue yet
    deltas.block(s3, ["i0", "i5", "later"])
    reader = DeltaReader(s3)
    moved = reader.apply(bundle, reader.keys(version))
    assert moved.blocked == 2
    before, after = shown(bundle), shown(moved.bundle)
    assert set(before) - set(after) == {"i0", "i5"}
    assert "i110" in after
    recommender = Recommender(moved.bundle)
    for mode in ("beam", "sample"):
        answers = recommender.recommend(
            cold_context(3, bundle.limits), num_items=200, beam_width=200, mode=mode, seed=1
        )
        assert not {"i0", "i5"} & {item for answer in answers for item in answer.item_ids}
    deltas.unblock(s3, ["i0"])
    moved = reader.apply(bundle, reader.keys(version))
    assert set(before) - set(shown(moved.bundle)) == {"i5"}


def test_a_new_item_that_is_blocked_is_not_shown(s3: Storage, version: str, bundle: Bundle, tmp_path: Path) -> None:
    catalog.append_items(s3, new_items("n1"))
    catch_up(s3, version, tmp_path / "cache")
    deltas.block(s3, ["n1"])
    reader = DeltaReader(s3)
    assert "n1" not in shown(reader.apply(bundle, reader.keys(version)).bundle)


def test_what_cannot_be_applied_is_told_and_the_rest_is_applied(s3: Storage, version: str, bundle: Bundle) -> None:
    good = deltas.write_delta(s3, version, new_items("n1"), np.array([[1, 2, 3]]))
    deltas.write_delta(s3, version, new_items("n2"), np.array([[1, 2]]))
    deltas.write_delta(s3, version, new_items("n3"), np.array([[1, 2, 99]]))
    corrupt = deltas.write_delta(s3, version, new_items("n4"), np.array([[1, 2, 4]]))
    s3.put(corrupt, b"nonsense")
    twice = deltas.write_delta(s3, version, new_items("n1", "i3"), np.array([[1, 2, 5], [0, 0, 0]]))
    deltas.block(s3, ["i7"])
    reader = DeltaReader(s3)
    moved = reader.apply(bundle, reader.keys(version))
    assert (moved.appended, moved.blocked, len(moved.problems)) == (1, 1, 3)
    assert any("2 levels" in problem for problem in moved.problems)
    assert any(corrupt in problem for problem in moved.problems)
    assert moved.bundle.catalogue.sids[-1].tolist() == [1, 2, 3], f"{good} comes before {twice}"


def test_every_version_that_an_alias_names_catches_up(
    s3: Storage, version: str, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    other = publish(s3, write_bundle(tmp_path / "other", seed=1), data_time=TIME)
    unserved = publish(s3, write_bundle(tmp_path / "unserved", seed=2), data_time=TIME)
    set_alias(s3, "production", version)
    set_alias(s3, "frozen", other)
    catalog.append_items(s3, new_items("n1"))
    assert catch_up_served(s3, tmp_path / "cache") == {version: 1, other: 1}
    assert deltas.delta_keys(s3, unserved) == []
