"""The world: users and items have tastes; a matching item is watched to its end, any other for two seconds."""

import numpy as np
import pyarrow as pa
import pytest

from features.schema import EXPOSURE, FLAGS, ITEM, conform
from models.baselines import EngagementLog, Popularity
from models.cascade import Cascade, CascadeConfig, _logged_features
from models.cascade_features import FEATURES, Items, Statistics

START = 1_767_225_600_000
DAY = 86_400_000
NOW = START + 10 * DAY
TASTES = 5
CONFIG = CascadeConfig(trees=40)


def catalogue(rows: range, uploaded: int) -> pa.Table:
    columns = {
        "item_id": [f"i{k}" for k in rows],
        "tags": [[f"t{k % TASTES}"] for k in rows],
        "author_id": [f"a{k % 50}" for k in rows],
        "duration_ms": [20_000 + 1_000 * (k % 7) for k in rows],
        "upload_time": [uploaded] * len(rows),
    }
    return conform(pa.table(columns), ITEM)


def exposures(users: np.ndarray, rows: np.ndarray, when: np.ndarray) -> pa.Table:
    duration = 20_000 + 1_000 * (rows % 7)
    liked = users % TASTES == rows % TASTES
    columns = {
        "exposure_id": [f"e{time}-{user}" for time, user in zip(when, users, strict=True)],
        "request_id": [f"r{time}" for time in when],
        "user_id": [f"u{user}" for user in users],
        "item_id": [f"i{row}" for row in rows],
        "position": np.zeros(len(rows), np.int32),
        "event_time": when,
        "source": ["organic"] * len(rows),
        "duration_ms": duration,
        "play_ms": np.where(liked, duration, 2_000),
        **{flag: liked if flag == "long_view" else np.zeros(len(rows), bool) for flag in FLAGS},
    }
    return conform(pa.table(columns), EXPOSURE)


ITEMS = catalogue(range(400), START - 30 * DAY)


@pytest.fixture(scope="module")
def log() -> pa.Table:
    rng = np.random.default_rng(0)
    n = 6_000
    popular = np.minimum(rng.exponential(100, n).astype(int), 399)
    return exposures(rng.integers(0, 200, n), popular, np.sort(rng.integers(START, NOW, n)))


@pytest.fixture(scope="module")
def cascade(log: pa.Table) -> Cascade:
    return Cascade.fit(log, ITEMS, now_ms=NOW, config=CONFIG)


def matching(users: list[str], ranked: list[list[tuple[str, float]]]) -> float:
    """Share of recommended items that serve their user's taste."""
    hits = [
        int(user[1:]) % TASTES == int(item[1:]) % TASTES
        for user, items in zip(users, ranked, strict=True)
        for item, _ in items
    ]
    return float(np.mean(hits))


USERS = [f"u{k}" for k in range(60)]


def test_it_finds_the_taste_that_popularity_cannot(cascade: Cascade, log: pa.Table) -> None:
    popular = Popularity.fit(log, ITEMS, now_ms=NOW)
    assert matching(USERS, popular.recommend(USERS, NOW, 10)) < 0.4
    assert matching(USERS, cascade.recommend(USERS, NOW, 10)) > 0.9


def test_scores_are_seconds_of_play(cascade: Cascade) -> None:
    best = [items[0][1] for items in cascade.recommend(USERS, NOW, 5)]
    assert 15 < np.median(best) < 30


def test_the_long_view_objective_gives_probabilities(log: pa.Table) -> None:
    config = CascadeConfig(trees=40, objective="long_view")
    ranked = Cascade.fit(log, ITEMS, now_ms=NOW, config=config).recommend(USERS, NOW, 10)
    assert matching(USERS, ranked) > 0.9
    assert all(0 <= score <= 1 for items in ranked for _, score in items)


def test_seen_and_excluded_items_never_come(cascade: Cascade, log: pa.Table) -> None:
    first = cascade.recommend(["u1"], NOW, 20)[0]
    seen = set(log.filter(pa.compute.equal(log.column("user_id"), "u1")).column("item_id").to_pylist())
    assert not seen & {item for item, _ in first}
    assert len(first) == 20
    again = cascade.recommend(["u1"], NOW, 20, exclude=[{item for item, _ in first}])[0]
    assert not {item for item, _ in first} & {item for item, _ in again}


def test_strangers_and_nobody(cascade: Cascade) -> None:
    assert len(cascade.recommend(["stranger"], NOW, 10)[0]) == 10
    assert cascade.recommend([], NOW, 10) == []


def test_the_future_changes_nothing(cascade: Cascade, log: pa.Table) -> None:
    rng = np.random.default_rng(1)
    future = exposures(rng.integers(0, 200, 500), rng.integers(0, 400, 500), NOW + np.arange(500))
    leaking = Cascade.fit(pa.concat_tables([log, future]), ITEMS, now_ms=NOW, config=CONFIG)
    assert leaking.recommend(USERS, NOW, 10) == cascade.recommend(USERS, NOW, 10)


def test_training_features_do_not_see_their_own_label(log: pa.Table) -> None:
    items = Items.of(ITEMS)
    half = START + 5 * DAY
    engaged = EngagementLog.of(log, items.ids)
    rows = np.flatnonzero(engaged.times >= half)[:200]

    def inputs(table: pa.Table) -> np.ndarray:
        known = EngagementLog.of(table, items.ids)
        past = known.before(half)
        similarity = Cascade.fit(log, ITEMS, now_ms=half, config=CONFIG)._statistics.similarity
        return _logged_features(known, rows, items, Statistics.of(past, items, half, 5.0, similarity), CONFIG)

    plain = inputs(log)
    assert plain.shape == (200, len(FEATURES))
    # The last event of every user is nobody's past: its outcome must not be visible in any feature.
    last = dict(zip(engaged.users, engaged.times, strict=True))
    final = {(engaged.user_ids[user], time) for user, time in last.items()}
    times = log.column("event_time").cast(pa.int64()).to_pylist()
    is_final = [pair in final for pair in zip(log.column("user_id").to_pylist(), times, strict=True)]
    flipped = np.where(is_final, 999_000, log.column("play_ms").to_numpy())
    position = log.schema.get_field_index("play_ms")
    assert sum(is_final) > 100
    assert np.array_equal(plain, inputs(log.set_column(position, "play_ms", pa.array(flipped))), equal_nan=True)


def test_observed_events_move_a_stranger_towards_their_taste(log: pa.Table) -> None:
    cascade = Cascade.fit(log, ITEMS, now_ms=NOW, config=CONFIG)
    users = np.full(15, 1003)  # taste 3
    rows = np.arange(15) + 100
    cascade.observe(exposures(users, rows, NOW + np.arange(15) * 60_000))
    ranked = cascade.recommend(["u1003"], NOW + DAY // 24, 10)
    assert matching(["u1003"], ranked) > 0.8
    assert not {item for item, _ in ranked[0]} & {f"i{row}" for row in rows}


def test_uploads_are_recommended_without_a_refit(log: pa.Table) -> None:
    cascade = Cascade.fit(log, ITEMS, now_ms=NOW, config=CONFIG)
    cascade.add_items(pa.concat_tables([catalogue(range(400, 430), NOW - DAY), ITEMS.slice(0, 3)]))
    new = [
        (int(user[1:]) % TASTES == int(item[1:]) % TASTES, score)
        for user, items in zip(USERS, cascade.recommend(USERS, NOW, 420), strict=True)
        for item, score in items
        if int(item[1:]) >= 400
    ]
    wanted, unwanted = ([score for matches, score in new if matches is kind] for kind in (True, False))
    assert len(new) > len(USERS)
    assert np.mean(wanted) > 2 * np.mean(unwanted)


def test_too_little_to_learn_from_is_refused(log: pa.Table) -> None:
    with pytest.raises(ValueError, match="at least 100"):
        Cascade.fit(log, ITEMS, now_ms=START)
