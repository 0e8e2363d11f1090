import numpy as np
import pyarrow as pa
import pytest

from models.tokenizer.embedding import ItemEmbedder


def renamed(items: pa.Table, prefix: str) -> pa.Table:
    names = pa.array([prefix + name for name in items.column("item_id").to_pylist()])
    return items.set_column(0, items.schema.field(0), names)


def taste_agreement(x: np.ndarray, anchors: np.ndarray, taste: np.ndarray) -> float:
    """Share of rows whose nearest other anchor serves the same taste."""
    gaps = ((x[:, None] - anchors[None]) ** 2).sum(2)
    np.fill_diagonal(gaps, np.inf)
    return float((taste[gaps.argmin(1)] == taste).mean())


@pytest.fixture(scope="module")
def embedder(world) -> ItemEmbedder:
    return ItemEmbedder.fit(world.items, world.exposures, dim=32, seed=0)


def test_neighbours_serve_the_same_taste(embedder: ItemEmbedder, world) -> None:
    x = embedder.encode(world.items)
    assert x.shape == (300, 32)
    assert x.dtype == np.float32
    assert taste_agreement(x, x, world.taste) > 0.9


def test_engagement_alone_tells_tastes_apart(world) -> None:
    bare = world.items.drop_columns(["tags", "author_id"])
    bare = bare.append_column("tags", pa.nulls(300, pa.list_(pa.string())))
    bare = bare.append_column("author_id", pa.nulls(300, pa.string()))
    x = ItemEmbedder.fit(bare, world.exposures, dim=32).encode(bare)
    assert taste_agreement(x, x, world.taste) > 0.8


def test_new_items_land_beside_those_they_resemble(embedder: ItemEmbedder, world) -> None:
    new = embedder.encode(renamed(world.items, "new"))
    assert taste_agreement(new, embedder.encode(world.items), world.taste) > 0.8


def test_vectors_do_not_depend_on_the_batch(embedder: ItemEmbedder, world) -> None:
    whole = embedder.encode(world.items)
    assert np.allclose(whole[100:110], embedder.encode(world.items.slice(100, 10)), atol=1e-6)
    assert embedder.encode(world.items.slice(0, 0)).shape == (0, 32)


def test_equal_seeds_give_equal_vectors(embedder: ItemEmbedder, world) -> None:
    again = ItemEmbedder.fit(world.items, world.exposures, dim=32, seed=0)
    assert (again.encode(world.items) == embedder.encode(world.items)).all()


def test_state_is_complete(embedder: ItemEmbedder, world) -> None:
    state = embedder.state_dict()
    assert (ItemEmbedder.from_state(state).encode(world.items) == embedder.encode(world.items)).all()
    with pytest.raises(ValueError, match="lacks"):
        ItemEmbedder.from_state({name: array for name, array in state.items() if name != "idf"})


def test_without_any_exposure_content_decides(world) -> None:
    x = ItemEmbedder.fit(world.items, world.exposures.slice(0, 0), dim=16).encode(world.items)
    tagged = np.array([tags is not None for tags in world.items.column("tags").to_pylist()])
    assert np.isfinite(x).all()
    assert taste_agreement(x[tagged], x[tagged], world.taste[tagged]) > 0.95


def test_nothing_to_embed_is_refused(world) -> None:
    with pytest.raises(ValueError, match="at least one item"):
        ItemEmbedder.fit(world.items.slice(0, 0), world.exposures)
