import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from features.schema import EXPOSURE, FLAGS, ITEM, conform
from models.baselines import EngagementLog, ItemKNN, KNNConfig, Popularity, top

DAY = 86_400_000
NOW = 1_767_225_600_000


def views(*rows: tuple[str, str, float, bool]) -> pa.Table:
    """EXPOSURE rows of (user, item, days before NOW, watched to the end)."""
    users, items, days, watched = zip(*rows, strict=True)
    columns = {
        "exposure_id": [f"e{k}" for k in range(len(rows))],
        "request_id": ["r"] * len(rows),
        "user_id": users,
        "item_id": items,
        "position": [0] * len(rows),
        "event_time": [NOW - int(day * DAY) for day in days],
        "source": ["organic"] * len(rows),
        "duration_ms": [60_000] * len(rows),
        "play_ms": [60_000 if full else 500 for full in watched],
        **{flag: list(watched) if flag == "long_view" else [False] * len(rows) for flag in FLAGS},
    }
    return conform(pa.table(columns), EXPOSURE)


def catalogue(*names: str) -> pa.Table:
    return conform(pa.table({"item_id": names, "duration_ms": [60_000] * len(names)}), ITEM)


ITEMS = catalogue("cat1", "cat2", "cat3", "dog1", "dog2", "dog3", "hit")
LOG = views(
    *[(f"c{k}", item, 3, True) for k in range(4) for item in ("cat1", "cat2", "cat3")],
    *[(f"d{k}", item, 3, True) for k in range(4) for item in ("dog1", "dog2", "dog3")],
    *[(f"x{k}", "hit", 2, True) for k in range(8)],
    ("me", "cat1", 1, True),
    ("me", "dog1", 1.5, False),
)


def names(ranked: list[tuple[str, float]]) -> list[str]:
    return [name for name, _ in ranked]


def test_popularity_prefers_recent_engagement_and_hides_the_seen() -> None:
    log = views(("a", "x", 9, True), ("b", "x", 9, True), ("a", "y", 1, True), ("a", "z", 1, False))
    model = Popularity.fit(log, catalogue("x", "y", "z"), now_ms=NOW)
    (everyone, b) = model.recommend(["stranger", "b"], NOW, 3)
    assert names(everyone) == ["y", "x", "z"]
    assert names(b) == ["y", "z"]


def test_knn_follows_what_was_watched_not_what_was_skipped() -> None:
    ranked = ItemKNN.fit(LOG, ITEMS, now_ms=NOW).recommend(["me"], NOW, 7)[0]
    assert set(names(ranked)[:2]) == {"cat2", "cat3"}
    assert not {"cat1", "dog1"} & set(names(ranked))
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)


def test_knn_follows_the_newest_history() -> None:
    later = views(("me", "dog1", 8, True), ("me", "cat1", 1, True))
    ranked = ItemKNN.fit(pa.concat_tables([LOG.slice(0, 32), later]), ITEMS, now_ms=NOW).recommend(["me"], NOW, 4)[0]
    assert set(names(ranked)[:2]) == {"cat2", "cat3"}
    assert set(names(ranked)[2:]) == {"dog2", "dog3"}


def test_knn_gives_strangers_the_popular() -> None:
    assert names(ItemKNN.fit(LOG, ITEMS, now_ms=NOW).recommend(["stranger"], NOW, 1)[0]) == ["hit"]


def test_events_at_or_after_now_are_not_used() -> None:
    future = views(*[(f"f{k}", "dog3", -0.5, True) for k in range(50)], ("me", "cat2", 0, True))
    for fit in (Popularity.fit, ItemKNN.fit):
        plain, leaking = (fit(table, ITEMS, now_ms=NOW) for table in (LOG, pa.concat_tables([LOG, future])))
        assert plain.recommend(["me", "c0"], NOW, 5) == leaking.recommend(["me", "c0"], NOW, 5)


def test_excluded_items_never_come() -> None:
    model = ItemKNN.fit(LOG, ITEMS, now_ms=NOW)
    mine, other = model.recommend(["me", "c0"], NOW, 7, exclude=[{"cat2", "no such item"}, set()])
    assert "cat2" not in names(mine)
    assert names(mine)[0] == "cat3"
    assert len(other) == 4
    with pytest.raises(ValueError, match="1 sets for 2 users"):
        model.recommend(["me", "c0"], NOW, 7, exclude=[set()])


def test_histories_are_those_before_the_moment() -> None:
    log = EngagementLog.of(LOG, pd.Index(ITEMS.column("item_id").to_pylist()))
    users = log.rows_of(["me", "nobody", "me", "me"])
    moments = np.array([NOW, NOW, NOW - DAY, NOW - int(1.5 * DAY)])
    query, event, rank = log.histories(users, moments, limit=64)
    assert query.tolist() == [0, 0, 2]
    assert log.items[event].tolist() == [3, 0, 3]
    assert rank.tolist() == [1, 0, 0]
    assert log.histories(users, moments, limit=1)[0].tolist() == [0, 2]


def test_a_view_delivered_twice_counts_once() -> None:
    index = pd.Index(ITEMS.column("item_id").to_pylist())
    log = EngagementLog.of(LOG, index)
    assert len(log.extended(EngagementLog.of(LOG, index))) == len(log) == LOG.num_rows
    newer = log.extended(EngagementLog.of(views(("new", "hit", 0, True), ("me", "hit", 0, True)), index))
    assert len(newer) == len(log) + 2
    assert newer.rows_of(["new"])[0] >= 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="of 1 ids"):
        Popularity.fit(LOG, catalogue("a", "a"), now_ms=NOW)
    with pytest.raises(ValueError, match="num_items is 0"):
        top(np.zeros((1, 2)), pd.Index(["a", "b"]), 0)
    with pytest.raises(ValueError, match="must be positive"):
        KNNConfig(neighbours=0)
