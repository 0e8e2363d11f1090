import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

from features.storage import ObjectMissing, Storage
from models.bundle import (
    MANIFEST,
    AliasMoved,
    Bundle,
    BundleCorrupt,
    fetch,
    list_versions,
    move_alias,
    publish,
    read_alias,
    read_manifest,
    set_alias,
    version_name,
)
from models.rewards.reward import REWARD, save_reward

TIME = datetime(2026, 1, 2, tzinfo=UTC)


def test_a_published_bundle_comes_back_the_same(s3: Storage, write_bundle, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "made")
    version = publish(s3, folder, data_time=TIME, parents=["p"], lineage={"run": "r1"})
    fetched = fetch(s3, version, tmp_path / "cache")
    assert fetched == tmp_path / "cache" / version
    made, read = Bundle.load(folder), Bundle.load(fetched)
    assert (made.version, read.version) == ("unpublished", version)
    assert read.catalogue.item_ids == made.catalogue.item_ids
    assert read.limits == made.limits
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, read.model.state_dict()[name])
    manifest = read_manifest(s3, version)
    assert (manifest["parents"], manifest["lineage"]) == (["p"], {"run": "r1"})
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_the_version_names_time_and_content_without_metrics(s3: Storage, write_bundle, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "a")
    first = publish(s3, folder, data_time=TIME)
    again = shutil.copytree(folder, tmp_path / "b")
    (again / "metrics.json").write_text('{"other": 1}')
    assert publish(s3, again, data_time=TIME.astimezone(timezone(timedelta(hours=8)))) == first
    assert read_manifest(s3, first)["files"]["metrics.json"]["size"] != (again / "metrics.json").stat().st_size
    assert publish(s3, write_bundle(tmp_path / "c", seed=1), data_time=TIME) != first
    assert first.startswith("20260102T000000-")
    assert len(list_versions(s3)) == 2
    with pytest.raises(ValueError, match="time zone"):
        version_name(datetime(2026, 1, 1), "0" * 64)


def test_a_half_published_bundle_is_invisible(s3: Storage, write_bundle, tmp_path: Path) -> None:
    version = publish(s3, write_bundle(tmp_path / "a"), data_time=TIME)
    s3.remove(f"models/onerec/{version}/{MANIFEST}")
    assert list_versions(s3) == []
    with pytest.raises(ObjectMissing, match="no complete bundle"):
        fetch(s3, version, tmp_path / "cache")
    with pytest.raises(ObjectMissing):
        set_alias(s3, "production", version)


@pytest.mark.parametrize("name", ["model.safetensors", "sids.parquet", "metrics.json"])
def test_a_changed_file_is_named(s3: Storage, write_bundle, tmp_path: Path, name: str) -> None:
    version = publish(s3, write_bundle(tmp_path / "a"), data_time=TIME)
    key = f"models/onerec/{version}/{name}"
    good = s3.get(key)
    s3.put(key, good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BundleCorrupt, match=rf"{name} is corrupt: sha256 is [0-9a-f]{{64}}, expected [0-9a-f]{{64}}"):
        fetch(s3, version, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    s3.remove(key)
    with pytest.raises(BundleCorrupt, match="not stored"):
        fetch(s3, version, tmp_path / "cache")
    s3.put(key, good)
    assert fetch(s3, version, tmp_path / "cache").exists()


def test_a_forged_manifest_is_refused(s3: Storage, write_bundle, tmp_path: Path) -> None:
    version = publish(s3, write_bundle(tmp_path / "a"), data_time=TIME)
    key = f"models/onerec/{version}/{MANIFEST}"
    manifest = s3.get_json(key)
    for change in ({"version": "other"}, {"files": {**manifest["files"], "../x": {"sha256": "0"}}}, {"files": {}}):
        s3.put_json(key, manifest | change)
        with pytest.raises(BundleCorrupt, match=r"manifest\.json"):
            fetch(s3, version, tmp_path / "cache")
    s3.put(key, b"{")
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        fetch(s3, version, tmp_path / "cache")


def test_a_damaged_cache_is_fetched_again(s3: Storage, write_bundle, tmp_path: Path) -> None:
    version = publish(s3, write_bundle(tmp_path / "a"), data_time=TIME)
    cached = fetch(s3, version, tmp_path / "cache")
    (cached / "sids.parquet").write_bytes(b"")
    (cached / "config.json").unlink()
    assert Bundle.load(fetch(s3, version, tmp_path / "cache")).version == version


@pytest.mark.parametrize("version", ["", ".", "..", "../mine", "20260101T000000-ab12cd34/.."])
def test_a_version_that_is_none_touches_no_folder(s3: Storage, tmp_path: Path, version: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ObjectMissing, match="no complete bundle"):
        fetch(s3, version, tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()
    assert (tmp_path / "mine").read_text() == "kept"


def test_parts_that_do_not_fit_are_refused(write_bundle, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["d_model"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleCorrupt, match="cannot be loaded"):
        Bundle.load(folder)


def test_a_folder_that_is_no_bundle_is_not_published(s3: Storage, write_bundle, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "a")
    (folder / "evil.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"evil\.pkl"):
        publish(s3, folder, data_time=TIME)
    (folder / "evil.pkl").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        publish(s3, folder, data_time=TIME)


def test_an_alias_moves(s3: Storage, write_bundle, tmp_path: Path) -> None:
    first = publish(s3, write_bundle(tmp_path / "a"), data_time=TIME)
    second = publish(s3, write_bundle(tmp_path / "b", seed=1), data_time=TIME)
    assert read_alias(s3, "production") is None
    for version in (first, second, first):
        set_alias(s3, "production", version)
        assert read_alias(s3, "production") == version
    assert sorted(list_versions(s3)) == sorted([first, second])
    with pytest.raises(ValueError, match="lower-case"):
        set_alias(s3, "../x", first)


def test_an_alias_moves_only_from_what_was_known(s3: Storage, write_bundle, tmp_path: Path) -> None:
    old, new, other = [publish(s3, write_bundle(tmp_path / str(seed), seed=seed), data_time=TIME) for seed in range(3)]
    with pytest.raises(AliasMoved, match="production is nothing now"):
        move_alias(s3, "production", new, only_from=[old])
    move_alias(s3, "production", old, only_from=[None])
    with pytest.raises(AliasMoved, match=f"production is {old} now"):
        move_alias(s3, "production", new, only_from=[None, other])
    for _ in range(2):  # the second time it is there already
        move_alias(s3, "production", new, only_from=[old])
    assert read_alias(s3, "production") == new
    with pytest.raises(ObjectMissing, match="no complete bundle"):
        move_alias(s3, "production", "20260101T000000-00000000", only_from=[new])


@pytest.mark.parametrize("known", [False, True])
def test_of_those_who_move_an_alias_at_once_one_wins(s3: Storage, write_bundle, tmp_path: Path, known: bool) -> None:
    """None replaces a model that it never compared with, however close they are."""
    first = publish(s3, write_bundle(tmp_path / "first"), data_time=TIME)
    rivals = [publish(s3, write_bundle(tmp_path / str(seed), seed=seed), data_time=TIME) for seed in range(1, 5)]
    if known:
        set_alias(s3, "production", first)
    together = threading.Barrier(len(rivals))

    def move(version: str) -> str:
        together.wait()
        try:
            move_alias(s3, "production", version, only_from=[first if known else None])
        except AliasMoved as error:
            return f"lost to {error.now}"
        return version

    with ThreadPoolExecutor(len(rivals)) as pool:
        told = list(pool.map(move, rivals))
    winner = read_alias(s3, "production")
    assert sorted(told) == sorted([str(winner), *[f"lost to {winner}"] * (len(rivals) - 1)])


def test_a_reward_model_travels_with_its_bundle_and_no_other(write_bundle, random_reward, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    plain = Bundle.load(folder)
    assert plain.reward is None
    save_reward(folder / REWARD, random_reward(plain.catalogue))
    carried = Bundle.load(folder).reward
    assert carried is not None
    assert carried.sids == random_reward(plain.catalogue).sids
    sids = plain.catalogue.sids.copy()
    sids[[0, 1]] = sids[[1, 0]]
    assert (sids[0] != sids[1]).any()
    save_reward(folder / REWARD, random_reward(replace(plain.catalogue, sids=sids)))
    with pytest.raises(BundleCorrupt, match="RewardMismatch: the reward model was trained on 120 items"):
        Bundle.load(folder)
