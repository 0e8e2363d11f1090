from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from features.schema import ITEM, conform
from models.tokenizer.alignment import AlignmentConfig
from models.tokenizer.detail import AXES, Detail
from models.tokenizer.embedding import ItemEmbedder

SHADES = ["ruby", "coral", "plum", "rose", "mauve", "nude", "cherry", "berry", "wine", "peach"]


def shop(products: int = 40) -> pa.Table:
    """Every product in ten shades, and two items of which no title is known."""
    names = ["".join(chr(97 + (number * step) % 26) for step in (3, 5, 7, 11)) for number in range(products)]
    titles = [f"{name} nail lacquer {shade}" for name in names for shade in SHADES]
    table = {"item_id": [f"i{k}" for k in range(len(titles) + 2)], "title": [*titles, None, " "]}
    return conform(pa.table({**table, "duration_ms": [0] * (len(titles) + 2)}), ITEM)


def families(items: pa.Table, dim: int = 32) -> np.ndarray:
    """Unit vectors that hardly know shades: one place a product, and the untitled items each in a place of its own."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(items.num_rows // len(SHADES) + 2, dim)) * np.geomspace(4, 0.1, dim)
    product = np.append(np.repeat(np.arange(len(centres) - 2), len(SHADES)), [len(centres) - 2, len(centres) - 1])
    x = centres[product] + 0.01 * rng.normal(size=(items.num_rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def gaps(x: np.ndarray) -> tuple[float, float]:
    """Mean distance of the first shades of a product, and of products."""
    return float(np.linalg.norm(x[:400:10] - x[1:400:10], axis=1).mean()), float(
        np.linalg.norm(x[:390:10] - x[10:400:10], axis=1).mean()
    )


def test_shades_of_a_product_part_and_products_stay_where_they_were() -> None:
    items = shop()
    x = families(items)
    y = Detail.fit(items, x, 0.4, seed=0)(items, x)
    (shades, products), (shades_then, products_then) = gaps(x), gaps(y)
    assert shades_then > 5 * shades
    assert products_then < 1.2 * products
    assert np.allclose(np.linalg.norm(y, axis=1), 1, atol=1e-5)
    assert (np.einsum("nd,nd->n", x, y) > 0.85).all()


def test_items_without_a_title_stay() -> None:
    items = shop()
    x = families(items)
    y = Detail.fit(items, x, 0.4, seed=0)(items, x)
    assert (y[400:] == x[400:]).all()
    assert (y[:400] != x[:400]).any(1).all()


def test_words_go_where_vectors_hardly_vary() -> None:
    x = families(shop())
    detail = Detail.fit(shop(), x, 0.4, seed=0)
    _, directions = np.linalg.eigh(np.cov(x.T))
    assert np.allclose(detail.basis @ detail.basis.T, 0.16 * np.eye(AXES), atol=1e-5)
    assert np.abs(detail.basis @ directions[:, AXES:]).max() < 1e-4


def test_rows_alone_are_treated_as_in_the_catalogue_and_state_is_complete() -> None:
    items = shop()
    x = families(items)
    detail = Detail.fit(items, x, 0.4, seed=0)
    restored = Detail.from_state(detail.state())
    assert np.allclose(restored(items.slice(7, 5), x[7:12]), detail(items, x)[7:12], atol=1e-6)
    assert restored(items.slice(0, 0), x[:0]).shape == (0, 32)


def test_the_embedder_adds_it_keeps_it_and_leaves_it_out(world) -> None:
    titles = pa.array([f"clip {SHADES[k % 10]} {k}" for k in range(300)])
    items = world.items.set_column(world.items.column_names.index("title"), "title", titles)
    config = AlignmentConfig(dim=16, width=16, layers=1, batch=32, max_steps=2, detail=0)
    plain = ItemEmbedder.fit(items, world.exposures, config)
    detailed = ItemEmbedder.fit(items, world.exposures, replace(config, detail=0.4))
    untold = tuple(name for name in config.modalities if name != "text")
    x, y = plain.encode(items), detailed.encode(items)
    assert np.allclose(detailed.detail(items, x), y, atol=1e-6)
    assert not np.allclose(x, y, atol=0.1)
    restored = ItemEmbedder.from_state(detailed.state_dict(), config, list(detailed.modalities))
    assert (restored.encode(items) == y).all()
    older = {name: array for name, array in detailed.state_dict().items() if not name.startswith("detail.")}
    before = ItemEmbedder.from_state(older, replace(config, detail=0.4), list(detailed.modalities))
    assert np.allclose(before.encode(items), x, atol=1e-6)  # a tokenizer that was fitted before there was detail
    assert ItemEmbedder.fit(items, world.exposures, replace(config, detail=0.4, modalities=untold)).detail is None


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_weights_that_make_no_sense_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="detail is"):
        AlignmentConfig(detail=weight)
