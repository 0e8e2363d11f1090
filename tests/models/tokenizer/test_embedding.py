from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from models.tokenizer.alignment import AlignmentConfig
from models.tokenizer.checkpoint import CHECKPOINT, checkpoint_step
from models.tokenizer.contrast import make_folds
from models.tokenizer.embedding import ItemEmbedder
from models.tokenizer.modalities.images import VECTOR


def renamed(items: pa.Table, prefix: str) -> pa.Table:
    names = pa.array([prefix + name for name in items.column("item_id").to_pylist()])
    return items.set_column(0, items.schema.field(0), names)


def taste_agreement(x: np.ndarray, anchors: np.ndarray, taste: np.ndarray) -> float:
    """Share of rows whose nearest other anchor serves the same taste."""
    gaps = ((x[:, None] - anchors[None]) ** 2).sum(2)
    np.fill_diagonal(gaps, np.inf)
    return float((taste[gaps.argmin(1)] == taste).mean())


CONFIG = AlignmentConfig(dim=32, width=32, layers=2, batch=64, max_steps=60, checkpoint_every=20)
SHORT = replace(CONFIG, max_steps=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def embedder(world) -> ItemEmbedder:
    return ItemEmbedder.fit(world.items, world.exposures, CONFIG)


def test_neighbours_serve_the_same_taste(embedder: ItemEmbedder, world) -> None:
    x = embedder.encode(world.items)
    assert x.shape == (300, 32)
    assert x.dtype == np.float32
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    assert taste_agreement(x, x, world.taste) > 0.9


def test_engagement_alone_tells_tastes_apart(world) -> None:
    x = ItemEmbedder.fit(world.items, world.exposures, replace(CONFIG, modalities=("collaborative",))).encode(
        world.items
    )
    assert taste_agreement(x, x, world.taste) > 0.75


def test_new_items_land_beside_those_they_resemble(embedder: ItemEmbedder, world) -> None:
    new = embedder.encode(renamed(world.items, "new"))
    tagged = np.array([tags is not None for tags in world.items.column("tags").to_pylist()])
    agreement = taste_agreement(new, embedder.encode(world.items), world.taste)
    assert agreement > 0.8
    assert taste_agreement(new[tagged], new[tagged], world.taste[tagged]) > 0.9


def test_vectors_do_not_depend_on_the_batch(embedder: ItemEmbedder, world) -> None:
    whole = embedder.encode(world.items)
    assert np.allclose(whole[100:110], embedder.encode(world.items.slice(100, 10)), atol=1e-5)
    assert embedder.encode(world.items.slice(0, 0)).shape == (0, 32)


def test_equal_seeds_give_equal_vectors(world) -> None:
    first, second, other = (
        ItemEmbedder.fit(world.items, world.exposures, replace(SHORT, seed=seed)).encode(world.items)
        for seed in (0, 0, 1)
    )
    assert (first == second).all()
    assert not np.allclose(first, other)


def test_state_is_complete(embedder: ItemEmbedder, world) -> None:
    state, names = embedder.state_dict(), list(embedder.modalities)
    restored = ItemEmbedder.from_state(state, CONFIG, names)
    assert (restored.encode(world.items) == embedder.encode(world.items)).all()
    assert (restored.encode(renamed(world.items, "new")) == embedder.encode(renamed(world.items, "new"))).all()
    with pytest.raises(ValueError, match="does not fit"):
        ItemEmbedder.from_state({k: a for k, a in state.items() if k != "qformer.null"}, CONFIG, names)


def test_without_any_exposure_content_decides(world) -> None:
    x = ItemEmbedder.fit(world.items, world.exposures.slice(0, 0), CONFIG).encode(world.items)
    tagged = np.array([tags is not None for tags in world.items.column("tags").to_pylist()])
    assert np.isfinite(x).all()
    assert taste_agreement(x[tagged], x[tagged], world.taste[tagged]) > 0.9


def test_nothing_to_embed_is_refused(world) -> None:
    with pytest.raises(ValueError, match="at least one item"):
        ItemEmbedder.fit(world.items.slice(0, 0), world.exposures)
    bare = pa.table({"item_id": [f"x{k}" for k in range(20)], "duration_ms": [1000] * 20})
    with pytest.raises(ValueError, match="nothing tells them apart"):
        ItemEmbedder.fit(bare, world.exposures)


def test_an_item_without_any_modality_has_the_place_of_the_null_token(embedder: ItemEmbedder) -> None:
    bare = pa.table({"item_id": ["x", "y"], "duration_ms": [0, 0]})
    told = pa.table({"item_id": ["x", "y"], "tags": [["t1"], None], "duration_ms": [0, 0]})
    x = embedder.encode(bare)
    assert (x[0] == x[1]).all()
    assert np.isfinite(x).all()
    assert embedder.bare(bare).tolist() == [True, True]
    assert embedder.bare(told).tolist() == [False, True]


@pytest.mark.parametrize("off", ["u2i", "i2i", "caption", "tags", "author", "numbers", "collaborative"])
def test_every_loss_and_modality_can_be_switched_off(world, off: str) -> None:
    losses: dict[str, float] = {}
    kept = tuple(name for name in SHORT.modalities if name != off)
    config = replace(SHORT, modalities=kept, **({off: 0.0} if off in ("u2i", "i2i", "caption") else {}))
    fitted = ItemEmbedder.fit(world.items, world.exposures, config, report=losses.update)
    assert off not in losses
    assert off not in fitted.modalities
    assert {"u2i", "i2i", "caption"} - {off} <= set(losses)
    assert np.isfinite(fitted.encode(world.items)).all()


def test_folds_without_pairs_of_the_only_loss_teach_nothing(world) -> None:
    """Two users of one fold who share two items are rare in a small log: Swing has nothing to say there."""
    users = pa.array([f"u{k}" for k in range(20)])
    few = world.exposures.filter(pc.is_in(world.exposures.column("user_id"), users))
    config = replace(SHORT, u2i=0.0)
    _, folds = make_folds(world.items, few, config.folds, config.dim, config.seed)
    assert min(len(fold.i2i) for fold in folds) == 0 < max(len(fold.i2i) for fold in folds)
    losses: dict[str, float] = {}
    ItemEmbedder.fit(world.items, few, config, report=losses.update)
    assert {"i2i", "caption"} <= set(losses)


def test_images_are_a_modality_like_any_other(world) -> None:
    vectors = np.eye(6)[world.taste] + 0.1 * np.random.default_rng(0).normal(size=(300, 6))
    pictured = world.items.append_column(VECTOR, pa.array(vectors.tolist()))
    x = ItemEmbedder.fit(pictured, world.exposures, replace(CONFIG, modalities=("image",)))
    assert list(x.modalities) == ["image"]
    assert taste_agreement(x.encode(pictured), x.encode(pictured), world.taste) > 0.9


class Killed(Exception):
    pass


def test_a_killed_fit_goes_on_and_ends_where_an_uninterrupted_one_does(world, tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=24, checkpoint_every=6)

    def kill(record: Mapping[str, float]) -> None:
        if record["step"] >= 20:
            raise Killed

    with pytest.raises(Killed):
        ItemEmbedder.fit(world.items, world.exposures, config, keep=tmp_path, report=kill)
    assert checkpoint_step(tmp_path) == 18
    resumed = ItemEmbedder.fit(world.items, world.exposures, config, keep=tmp_path)
    whole = ItemEmbedder.fit(world.items, world.exposures, config)
    assert (resumed.encode(world.items) == whole.encode(world.items)).all()


def test_a_checkpoint_of_other_data_is_refused(world, tmp_path: Path) -> None:
    ItemEmbedder.fit(world.items, world.exposures, SHORT, keep=tmp_path)
    assert (tmp_path / CHECKPOINT).exists()
    with pytest.raises(ValueError, match="other data or settings"):
        ItemEmbedder.fit(world.items.slice(0, 200), world.exposures, SHORT, keep=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_fit(world) -> None:
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        ItemEmbedder.fit(world.items, world.exposures, replace(SHORT, learning_rate=1e30))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modalities": ("smell",)}, "smell"),
        ({"modalities": ()}, "none"),
        ({"text": "runes"}, "ngrams"),
        ({"width": 30, "heads": 4}, "the heads divide"),
        ({"dim": 2}, "dim"),
        ({"temperature": 0.0}, "temperature"),
        ({"u2i": 0.0, "i2i": 0.0}, "keep one of them"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(**wrong)  # type: ignore[arg-type]
