import numpy as np
import pyarrow as pa
import torch

from models.tokenizer.contrast import content_pairs, info_nce, make_folds, same_items, user_pairs
from models.tokenizer.cooccurrence import engagements


def test_user_pairs_take_the_most_similar_recent_positive(world) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    pairs, users = user_pairs(world.items, world.exposures, vectors)
    rows = {name: row for row, name in enumerate(world.items.column("item_id").to_pylist())}
    liked = world.exposures.filter(world.exposures.column("long_view"))
    histories: dict[str, list[int]] = {}
    expected = []
    for user, item in zip(liked.column("user_id").to_pylist(), liked.column("item_id").to_pylist(), strict=True):
        target, history = rows[item], histories.setdefault(user, [])
        recent = [row for row in history[-20:] if row != target]
        if recent:
            expected.append((max(recent, key=lambda row: vectors[row] @ vectors[target]), target))
        history.append(target)
    assert sorted(map(tuple, pairs.tolist())) == sorted(expected)
    assert len(users) == len(pairs)


def test_pairs_share_a_taste(world) -> None:
    _, folds = make_folds(world.items, world.exposures, 1, 16, 0)
    for pairs in (folds[0].u2i, folds[0].i2i):
        assert (world.taste[pairs[:, 0]] == world.taste[pairs[:, 1]]).mean() > 0.8


def test_folds_split_the_pairs_and_hide_their_users(world) -> None:
    whole, folds = make_folds(world.items, world.exposures, 4, 16, 0)
    _, one = make_folds(world.items, world.exposures, 1, 16, 0)
    split = sorted(tuple(pair) for fold in folds for pair in fold.u2i.tolist())
    assert split == sorted(map(tuple, one[0].u2i.tolist()))
    total = np.asarray(engagements(world.items, world.exposures).sum(0)).ravel()
    seen = sum(fold.log.engagement for fold in folds)
    assert np.allclose(seen, 3 * total)  # each user is outside three folds of four
    agreement = [np.einsum("nd,nd->n", fold.log.vectors, whole.vectors).mean() for fold in folds]
    assert min(agreement) > 0.5  # in the coordinates of the whole


def test_info_nce_falls_with_agreement_and_ignores_the_same_item() -> None:
    left = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    none = torch.zeros(8, 8, dtype=torch.bool)
    assert info_nce(left, left, none, 0.1) < info_nce(left, left.flip(0), none, 0.1)
    rows, others = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 0, 4, 5])
    same = same_items(rows, others)
    assert not same.diagonal().any()
    assert same[0, 3]  # both pairs hold item 0 on the left
    assert same[0, 1]  # item 0 left of pair 0, right of pair 1
    assert not same[0, 2]
    everything = ~torch.eye(8, dtype=torch.bool)
    assert float(info_nce(left, left, everything, 0.1)) == 0


def test_content_pairs_are_alike_and_never_the_item_itself(world) -> None:
    pairs = content_pairs(world.items)
    tagged = np.array([tags is not None for tags in world.items.column("tags").to_pylist()])
    assert (pairs[:, 0] != pairs[:, 1]).all()
    both = tagged[pairs].all(1)
    assert (world.taste[pairs[both, 0]] == world.taste[pairs[both, 1]]).mean() > 0.95


def test_content_pairs_of_too_little() -> None:
    bare = pa.table({name: [None, None] for name in ("title", "tags", "author_id", "music_id")})
    assert content_pairs(bare).shape == (0, 2)
    two = bare.set_column(0, "title", pa.array(["red shoes", "blue shoes"]))
    assert content_pairs(two).tolist() == [[0, 1], [1, 0]]
