import json
import struct

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig

CONFIG = TokenizerConfig(levels=3, codes=12, dim=24, width=32, layers=2, batch=64, max_steps=40, seed=0)


@pytest.fixture(scope="module")
def tokenizer(world) -> Tokenizer:
    return Tokenizer.fit(world.items, world.exposures, CONFIG)


def uploads(world, rows: slice) -> pa.Table:
    table = world.items.slice(rows.start, rows.stop - rows.start)
    names = pa.array(["new" + name for name in table.column("item_id").to_pylist()])
    return table.set_column(0, table.schema.field(0), names)


def test_equal_seeds_give_identical_codebooks_and_sids(tokenizer: Tokenizer, world) -> None:
    again = Tokenizer.fit(world.items, world.exposures, CONFIG)
    assert (again.quantizer.codebooks == tokenizer.quantizer.codebooks).all()
    first, second = (each.catalogue(world.items, world.exposures) for each in (tokenizer, again))
    assert (first.sids == second.sids).all()


def test_quality_of_a_world_with_tastes(tokenizer: Tokenizer, world) -> None:
    catalogue = tokenizer.catalogue(world.items, world.exposures)
    report = tokenizer.quality(catalogue, world.items, world.exposures)
    _, groups = np.unique(catalogue.sids[:, :2], axis=0, return_counts=True)
    assert report["distinct_sids"] == np.minimum(groups, CONFIG.codes).sum()  # unique as far as the codes last
    assert report["utilisation"] == [1, 1, 1]
    assert report["entropy_nats"][0] > 0.99 * report["entropy_max_nats"]
    assert report["mse_share_of_variance"] == sorted(report["mse_share_of_variance"], reverse=True)
    rates = report["neighbour_hit_rate"]
    assert rates["prefix1"] > 2 * rates["prefix1_chance"]
    json.dumps(report)


def test_sids_may_be_shared_when_asked(world) -> None:
    config = TokenizerConfig(levels=2, codes=8, dim=16, unique=False, max_steps=4)
    tokenizer = Tokenizer.fit(world.items, world.exposures, config)
    report = tokenizer.quality(tokenizer.catalogue(world.items, world.exposures), world.items)
    assert report["unique_sid_share"] < 1
    assert report["largest_collision"] > 1


def test_append_leaves_the_old_and_places_the_new_by_content(tokenizer: Tokenizer, world) -> None:
    catalogue = tokenizer.catalogue(world.items, world.exposures)
    longer = tokenizer.append(catalogue, uploads(world, slice(0, 60)))
    assert (longer.sids[:300] == catalogue.sids).all()
    assert len(longer) == 360
    same_taste = [
        (world.taste[catalogue.sids[:, 0] == sid[0]] == kind).mean()
        for sid, kind in zip(longer.sids[300:], world.taste[:60], strict=True)
    ]
    assert np.mean(same_taste) > 0.5  # six tastes: chance is a sixth
    assert tokenizer.append(longer, uploads(world, slice(0, 60))) is longer


def test_saved_and_loaded_it_gives_the_same_sids(tokenizer: Tokenizer, world, tmp_path) -> None:
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    loaded = Tokenizer.load(tmp_path / "tokenizer.safetensors")
    assert loaded.config == CONFIG
    old, new = (each.catalogue(world.items, world.exposures) for each in (tokenizer, loaded))
    assert (old.sids == new.sids).all()
    appended = [each.append(old, uploads(world, slice(0, 9))).sids[300:] for each in (tokenizer, loaded)]
    assert (appended[0] == appended[1]).all()


def test_the_file_holds_only_arrays_and_json(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["tokenizer"])["config"]["codes"] == 12


def test_equal_tokenizers_are_equal_files(tokenizer: Tokenizer, tmp_path) -> None:
    """A stage's digest is that of its files: 20 saves, every second one of a tokenizer that was loaded."""
    files = []
    for number in range(20):
        tokenizer.save(tmp_path / str(number))
        files.append((tmp_path / str(number)).read_bytes())
        tokenizer = Tokenizer.load(tmp_path / str(number)) if number % 2 else tokenizer
    assert len(set(files)) == 1


def test_another_file_is_refused(tmp_path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="this release reads 'onerec-tokenizer-2'"):
        Tokenizer.load(tmp_path / "other")
    header = {"tokenizer": json.dumps({"format": "onerec-tokenizer-1", "config": {}})}
    save_file({"codebooks": np.zeros((1, 2, 4), np.float32)}, tmp_path / "older", header)
    with pytest.raises(ValueError, match="train a new tokenizer"):
        Tokenizer.load(tmp_path / "older")


def test_too_few_items_are_refused(world) -> None:
    with pytest.raises(ValueError, match="10 items for 12 codes"):
        Tokenizer.fit(world.items.slice(0, 10), world.exposures, CONFIG)


def test_items_that_nothing_tells_apart_are_refused(world) -> None:
    same = pa.table({"item_id": [f"x{k}" for k in range(20)], "duration_ms": [1000] * 20})
    with pytest.raises(ValueError, match="nothing tells them apart"):
        Tokenizer.fit(same, world.exposures, CONFIG)


def test_items_alike_in_everything_are_refused(world) -> None:
    same = pa.table({"item_id": [f"x{k}" for k in range(20)], "tags": [["t"]] * 20, "duration_ms": [1000] * 20})
    with pytest.raises(ValueError, match="equal"):
        Tokenizer.fit(same, world.exposures, CONFIG)


def test_identical_items_are_counted(tokenizer: Tokenizer, world) -> None:
    catalogue = tokenizer.catalogue(world.items, world.exposures)
    twins = pa.table({"item_id": ["x", "y"], "tags": [["t1"], ["t1"]], "duration_ms": [9000, 9000]})
    longer = tokenizer.append(catalogue, twins)
    assert tokenizer.quality(longer, twins)["duplicate_embeddings"] == 1
    with pytest.raises(ValueError, match="append them first"):
        tokenizer.quality(catalogue, twins)
