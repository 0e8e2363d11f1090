"""Hierarchical K-means: bounds, determinism, equal items, and how good the clusters are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.histories.clusters import ItemVectors, clusters, compress, parts
from features.histories.windows import Window


def views(items: np.ndarray, vectors: np.ndarray) -> tuple[Window, ItemVectors]:
    n = len(items)
    names = np.array([f"i{k}" for k in range(len(vectors))], object)
    window = Window(
        ids=np.arange(n) + 7,
        item_ids=names[items],
        times=1_700_000_000_000 + 60_000 * np.arange(n),
        play_ms=np.arange(n) * 10,
        duration_ms=np.full(n, 30_000),
        labels=np.arange(n) % 512,
    )
    return window, ItemVectors(item_ids=names, vectors=vectors.astype(np.float32), version="v")


@given(st.integers(0, 400), st.integers(1, 60), st.integers(1, 40), st.integers(0, 10))
def test_every_point_is_in_one_of_at_most_limit_clusters(n: int, limit: int, distinct: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(distinct, 3))[rng.integers(0, distinct, n)]
    number, central = clusters(x, limit)
    assert len(central) <= limit
    assert len(number) == n
    if n:
        assert sorted(set(number.tolist())) == list(range(len(central)))
        assert (number[central] == np.arange(len(central))).all()


def test_the_largest_sets_are_split_first_into_the_cube_root() -> None:
    assert [parts(n) for n in (2, 7, 8, 26, 27, 1000, 100_000)] == [2, 2, 2, 2, 3, 10, 46]
    x = np.random.default_rng(0).normal(size=(8000, 8))
    number, central = clusters(x, 500)
    sizes = np.bincount(number)
    assert len(central) == 500
    assert sizes.max() < 8 * sizes.mean()


def test_centres_are_nearest_to_the_mean_and_clusters_are_good() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 20, 1500)
    x = (8 * rng.normal(size=(20, 6)))[truth] + rng.normal(size=(1500, 6))
    number, central = clusters(x, 60)
    for k in range(60):
        own = np.flatnonzero(number == k)
        distance = ((x[own] - x[own].mean(0)) ** 2).sum(1)
        assert distance[own == central[k]] == pytest.approx(distance.min(), rel=1e-4)
    within = sum(((x[number == k] - x[number == k].mean(0)) ** 2).sum() for k in range(60))
    shuffled = rng.permutation(number)
    chance = sum(((x[shuffled == k] - x[shuffled == k].mean(0)) ** 2).sum() for k in range(60))
    assert within < 0.05 * chance


def test_equal_views_give_equal_clusters_and_repeated_items_are_one_point() -> None:
    rng = np.random.default_rng(2)
    window, vectors = views(rng.integers(0, 40, 3000), rng.normal(size=(40, 5)))
    first, counts = compress(window, np.ones(3000, np.int64), vectors, 50)
    assert len(first) == 40, "40 distinct items fit: each is a cluster of its own"
    assert len(set(first.item_ids)) == 40
    again, _ = compress(window, np.ones(3000, np.int64), vectors, 50)
    assert first == again
    assert counts.sum() == 3000
    # sparse fields are those of the newest view of the item
    for row in range(40):
        assert first.ids[row] == window.ids[window.item_ids == first.item_ids[row]].max()


def test_continuous_fields_are_weighted_means_and_sparse_ones_are_inherited() -> None:
    x = np.array([[0.0, 0.0], [0.1, 0.0], [9.0, 0.0], [9.2, 0.0], [9.1, 0.0]])
    window, vectors = views(np.arange(5), x)
    out, counts = compress(window, np.array([3, 1, 1, 1, 2]), vectors, 2)
    assert counts.tolist() == [4, 4]
    assert out.item_ids[1] == "i4", "9.1 lies nearest the middle"
    assert out.labels[1] == window.labels[4]
    assert out.play_ms.tolist() == [(3 * 0 + 10) // 4, (20 + 30 + 2 * 40) // 4]
    assert out.times.tolist() == [1_700_000_000_000 + 15_000, 1_700_000_000_000 + (120 + 180 + 480) * 1000 // 4]


def test_items_without_vector_keep_at_most_half_the_places_the_newest_first() -> None:
    rng = np.random.default_rng(3)
    window, vectors = views(rng.integers(0, 100, 500), rng.normal(size=(100, 4)))
    half = ItemVectors(item_ids=vectors.item_ids[:50], vectors=vectors.vectors[:50], version="v")
    out, _ = compress(window, np.ones(500, np.int64), half, 20)
    unknown = [int(item[1:]) >= 50 for item in out.item_ids]
    assert sum(unknown) == 10
    newest = window.ids[[int(item[1:]) >= 50 for item in window.item_ids]][-10:]
    assert sorted(out.ids[unknown]) == sorted(newest)
    none = ItemVectors(item_ids=np.empty(0, object), vectors=np.empty((0, 4), np.float32), version="v")
    alone, _ = compress(window, np.ones(500, np.int64), none, 20)
    assert alone == window.take(slice(480, 500))


def test_bad_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one row an item"):
        ItemVectors(item_ids=np.array(["a"], object), vectors=np.zeros((2, 3), np.float32), version="v")
    with pytest.raises(ValueError, match="not all finite"):
        ItemVectors(item_ids=np.array(["a"], object), vectors=np.full((1, 3), np.nan, np.float32), version="v")
    with pytest.raises(ValueError, match="at least one cluster"):
        clusters(np.zeros((3, 2)), 0)
