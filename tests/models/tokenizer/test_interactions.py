import numpy as np
import pyarrow as pa
import pytest

from features.schema import EXPOSURE, FLAGS, conform
from models.tokenizer.interactions import DAY_MS, newest, popularity, strength, user_item


def exposures(**flags: list[bool]) -> pa.Table:
    n = len(next(iter(flags.values())))
    columns = {
        "exposure_id": [f"e{k}" for k in range(n)],
        "request_id": ["r"] * n,
        "user_id": ["u"] * n,
        "item_id": [f"i{k}" for k in range(n)],
        "position": [0] * n,
        "event_time": [DAY_MS * (100 + k) for k in range(n)],
        "source": ["organic"] * n,
        "duration_ms": [60_000] * n,
        "play_ms": [1_000] * n,
        **{flag: flags.get(flag, [False] * n) for flag in FLAGS},
    }
    return conform(pa.table(columns), EXPOSURE)


def test_strength_orders_dislike_impression_long_view_and_like() -> None:
    table = exposures(
        long_view=[False, False, True, True, True],
        like=[False, False, False, True, False],
        dislike=[True, False, False, False, True],
    )
    assert strength(table, impression=0.1).tolist() == pytest.approx([0, 0.1, 1, 2, 0])


def test_popularity_fades_and_ignores_unknown_items() -> None:
    table = exposures(long_view=[True, True, True])
    assert popularity(table, ["i2", "i0", "other"], half_life_days=1).tolist() == pytest.approx([1, 0.25, 0])
    assert popularity(table.slice(0, 0), ["i0"]).tolist() == [0]


def test_newest_keeps_the_latest_of_each_user() -> None:
    users, when = np.array([0, 1, 0, 0]), np.array([3, 1, 1, 2])
    assert newest(users, when, 2).tolist() == [True, True, False, True]


def test_user_item_takes_the_largest_weight_and_drops_the_unknown() -> None:
    matrix = user_item(np.array([0, 0, 1]), np.array([2, 2, -1]), np.array([0.5, 1.0, 1.0]), (2, 3))
    assert matrix.toarray().tolist() == [[0, 0, 1], [0, 0, 0]]
