import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.leave_one_out import Histories, ItemIds, TrainingConfig, accuracy, popularity_ranking, rank, train
from features.schema import EXPOSURE, FLAGS, conform
from models.onerec_v2 import OneRecV2, V2Config
from models.tokenizer.vocabulary import Catalogue

ITEMS, USERS, LENGTH = 24, 30, 8


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    items = pa.table({"item_id": [f"i{k}" for k in range(ITEMS)], "duration_ms": [0] * ITEMS})
    sids = np.stack([np.arange(ITEMS) // 6, np.arange(ITEMS) % 6], axis=1)
    return Catalogue.from_items(items, sids=sids, codes=6, popularity=np.arange(ITEMS))


@pytest.fixture(scope="module")
def exposures() -> pa.Table:
    """Every user walks round the items one by one from a start of their own; one more user is too short."""
    users = np.repeat(np.arange(USERS), LENGTH)
    step = np.tile(np.arange(LENGTH), USERS)
    rows = (users * 5 + step) % ITEMS
    users, step, rows = (np.append(a, b) for a, b in ((users, [USERS, USERS]), (step, [0, 1]), (rows, [0, 1])))
    n = len(users)
    order = np.random.default_rng(0).permutation(n)
    table = pa.table(
        {
            "exposure_id": [f"e{k}" for k in range(n)],
            "request_id": [f"r{k}" for k in range(n)],
            "user_id": [f"u{user}" for user in users[order]],
            "item_id": [f"i{row}" for row in rows[order]],
            "position": np.zeros(n, np.int32),
            "event_time": 1_700_000_000_000 + step[order] * 60_000,
            "source": ["organic"] * n,
            "duration_ms": np.zeros(n, np.int64),
            "play_ms": np.zeros(n, np.int64),
            **{flag: np.full(n, flag in ("click", "long_view")) for flag in FLAGS},
        }
    )
    return conform(table, EXPOSURE)


@pytest.fixture(scope="module")
def histories(exposures: pa.Table, catalogue: Catalogue) -> Histories:
    return Histories.from_exposures(exposures, catalogue, limit=5)


def test_each_user_in_order_and_the_short_one_left_out(histories: Histories) -> None:
    assert len(histories.test()) == USERS
    assert (np.diff(histories.starts) == LENGTH).all()
    for start, end in zip(histories.starts[:-1], histories.starts[1:], strict=True):
        assert (np.diff(histories.item[start:end]) % ITEMS == 1).all()


def test_training_never_sees_the_last_two(histories: Histories) -> None:
    place = histories.training() % LENGTH
    assert set(place) == set(range(1, LENGTH - 2))


def test_contexts_hold_what_came_strictly_before(histories: Histories) -> None:
    positions = np.array([1, LENGTH - 1, LENGTH + 2])
    context = histories.contexts(positions).short
    for row, position in enumerate(positions):
        earlier = histories.seen(position)[-5:]
        assert context.item[row].tolist() == [-1] * (5 - len(earlier)) + earlier.tolist()
        assert (np.diff(context.age_s[row][context.item[row] >= 0]) < 0).all()
    assert (context.age_s[context.item >= 0] >= 60).all()


def test_a_sample_of_users(exposures: pa.Table, catalogue: Catalogue) -> None:
    sample = Histories.from_exposures(exposures, catalogue, users=7, seed=1)
    assert len(sample.test()) == 7
    with pytest.raises(ValueError, match="leave-one-out needs them"):
        Histories.from_exposures(exposures.slice(0, 1), catalogue)


def test_accuracy_counts_places() -> None:
    ranked = np.array([[3, 1, 2, 9, 8, 7], [4, 5, 6, 0, 1, 2], [-1] * 6])
    found = accuracy(ranked, np.array([3, 2, 1]))
    assert found["recall@5"] == pytest.approx(1 / 3)
    assert found["recall@10"] == pytest.approx(2 / 3)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / np.log2(7)) / 3)


@pytest.mark.parametrize("by_id", [False, True])
def test_a_small_model_learns_the_walk_and_repeats_nothing(
    histories: Histories, catalogue: Catalogue, by_id: bool
) -> None:
    torch.manual_seed(0)
    config = V2Config(codes=6, levels=2, d_model=32, layers=1, heads=2, kv_groups=2, embed=8, s_kv=2)
    model = OneRecV2(config)
    inputs = ItemIds(catalogue) if by_id else catalogue
    if isinstance(inputs, ItemIds):
        inputs.give_table(model)
    train(model, histories, catalogue.sids, inputs, TrainingConfig(steps=120, batch=64, learning_rate=1e-2, warmup=5))
    positions = histories.test()
    ranked = rank(model, histories, positions, catalogue, inputs, width=ITEMS)
    scores = accuracy(ranked, histories.item[positions])
    often = np.bincount(histories.item[histories.training()], minlength=ITEMS)
    floor = accuracy(popularity_ranking(histories, positions, often), histories.item[positions])
    assert scores["recall@5"] > 0.8 > floor["recall@5"]
    for row, position in enumerate(positions):
        assert not set(ranked[row]) & set(histories.seen(position))
        assert len(set(ranked[row])) == len(ranked[row])
