"""The updater against a real Valkey: what it leaves on-line equals what training folds from the log."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from features import offline
from features.histories.context import Pathway
from features.histories.windows import Limits, empty_window, fold, window_of
from features.online import OnlineFeatures
from features.schema import FEEDBACK, FLAGS, IMPRESSION
from features.settings import Settings
from features.updater import Updater, seed_windows

LIMITS = Limits(short=6, positive=9, lifelong=4)
INDEX = pd.Index([f"i{item}" for item in range(25)], dtype=object)
NO_IMPRESSIONS, NO_FEEDBACK = IMPRESSION.empty_table(), FEEDBACK.empty_table()


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory, valkey) -> OnlineFeatures:
    home: Path = tmp_path_factory.mktemp("home")
    config = Settings(home=home, redis=f"{valkey[0]}:{valkey[1]}", redis_password=valkey[2])
    offline.apply(config=config)
    return OnlineFeatures.connect(config=config)


def impressions(exposures: pa.Table) -> pa.Table:
    return exposures.select(IMPRESSION.names).cast(IMPRESSION)


def feedback(exposures: pa.Table) -> pa.Table:
    return exposures.select(FEEDBACK.names).cast(FEEDBACK)


@pytest.fixture
def assert_online_equals_log(folded: Callable[..., tuple[Pathway, Pathway]]) -> Callable[..., None]:
    """On-line context == fold of the log."""

    def check(online: OnlineFeatures, log: pa.Table, users: list[str], now: int) -> None:
        context, _ = online.context(users, now, INDEX, LIMITS)
        for name, expected in zip(
            ("short", "positive"), folded(log, users, np.full(len(users), now), INDEX, LIMITS), strict=True
        ):
            for field in dataclasses.fields(expected):
                actual = getattr(getattr(context, name), field.name)
                np.testing.assert_array_equal(actual, getattr(expected, field.name), err_msg=f"{name}.{field.name}")

    return check


@pytest.mark.parametrize("seed", range(4))
def test_online_equals_offline_at_every_moment(
    online: OnlineFeatures, make_exposures, assert_online_equals_log, seed: int
) -> None:
    """Batches of random size; before each, the context as of its first event is compared."""
    log = make_exposures(260, users=6, seed=seed, prefix=f"parity{seed}-")
    users = [f"parity{seed}-{user}" for user in range(6)] + [f"parity{seed}-stranger"]
    rng = np.random.default_rng(seed)
    updater = Updater(online, LIMITS)
    bounds = np.sort(rng.choice(np.arange(1, 260), 12, replace=False)).tolist()
    times = log["event_time"].cast(pa.int64()).to_numpy()
    for start, end in zip([0, *bounds], [*bounds, 260], strict=True):
        if start and times[start] > times[start - 1]:
            assert_online_equals_log(online, log, users, int(times[start]))
        batch = log.slice(start, end - start)
        updater.apply(impressions(batch), feedback(batch))
    assert_online_equals_log(online, log, users, int(times[-1]) + 1)


def test_delivery_at_least_once_in_any_order(online: OnlineFeatures, make_exposures, assert_online_equals_log) -> None:
    """Feedback before, with or long after its impression, some of it repeated: the same windows."""
    log = make_exposures(200, users=4, seed=9, prefix="order")
    rng = np.random.default_rng(0)
    deliveries = rng.permutation(np.r_[np.arange(400), rng.integers(0, 400, 150)])
    updater = Updater(online, LIMITS)
    for part in np.array_split(deliveries, 25):
        updater.apply(impressions(log.take(part[part < 200])), feedback(log.take(part[part >= 200] - 200)))
    assert_online_equals_log(online, log, [f"order{user}" for user in range(4)], 1_800_000_000_000)


def test_after_a_restart_feedback_finds_its_impression_in_the_windows(
    online: OnlineFeatures, make_exposures, assert_online_equals_log
) -> None:
    log = make_exposures(6, users=1, seed=10, prefix="restart")
    Updater(online, LIMITS).apply(impressions(log), NO_FEEDBACK)
    for row in range(6):
        Updater(online, LIMITS).apply(NO_IMPRESSIONS, feedback(log.slice(row, 1)))
    assert_online_equals_log(online, log, ["restart0"], 1_800_000_000_000)


def test_late_feedback_gets_past_the_stores_timestamp_check(online: OnlineFeatures, make_exposures) -> None:
    log = make_exposures(3, users=1, seed=3, prefix="late")
    updater = Updater(online, LIMITS)
    assert updater.apply(impressions(log), NO_FEEDBACK) == 1
    before = online.read(["late0"], 1_800_000_000_000)[0]
    assert before.short.play_ms.tolist() == [0, 0, 0]
    for row in range(3):  # same newest event every time
        assert updater.apply(NO_IMPRESSIONS, feedback(log.slice(row, 1))) == 1
    after = online.read(["late0"], 1_800_000_000_000)[0]
    assert after.short == fold(empty_window(), window_of(log), 6)
    assert after.pushed_ms == before.pushed_ms + 3


def test_repeating_a_batch_pushes_nothing(online: OnlineFeatures, make_exposures) -> None:
    log = make_exposures(30, users=3, seed=4, prefix="again")
    updater = Updater(online, LIMITS)
    assert updater.apply(impressions(log), feedback(log)) == 3
    assert updater.apply(impressions(log), feedback(log), accepted_at=0.0) == 0
    assert Updater(online, LIMITS).apply(impressions(log.slice(20)), feedback(log.slice(20))) == 0


def test_feedback_alone_shows_nothing(online: OnlineFeatures, make_exposures) -> None:
    log = make_exposures(4, users=1, seed=5, prefix="alone")
    assert Updater(online, LIMITS).apply(NO_IMPRESSIONS, feedback(log)) == 0
    assert Updater(online, LIMITS).apply(NO_IMPRESSIONS, NO_FEEDBACK) == 0
    assert online.read(["alone0"], 1_800_000_000_000)[0].flag == "cold"


def test_memory_is_bounded(online: OnlineFeatures, make_exposures, assert_online_equals_log) -> None:
    updater = Updater(online, LIMITS, memory=10)
    log = make_exposures(50, users=2, seed=6, prefix="memory")
    for start in range(0, 50, 5):
        updater.apply(impressions(log.slice(start, 5)), feedback(log.slice(start, 5)))
    assert len(updater._recent) == 10
    assert_online_equals_log(online, log, ["memory0", "memory1"], 1_800_000_000_000)


def test_seeding_equals_replaying_and_keeps_what_is_newer(
    online: OnlineFeatures, make_exposures, assert_online_equals_log
) -> None:
    log = make_exposures(150, users=5, seed=7, prefix="seed")
    users = [f"seed{user}" for user in range(5)]
    newest = log.slice(140)
    Updater(online, LIMITS).apply(impressions(newest), feedback(newest))
    assert seed_windows(online, log.slice(0, 140), LIMITS) == 5
    assert_online_equals_log(online, log, users, 1_800_000_000_000)
    assert seed_windows(online, log, LIMITS) == 0


def test_flags_survive_the_way(online: OnlineFeatures, make_exposures) -> None:
    log = make_exposures(6, users=1, seed=8, prefix="flags")
    Updater(online, LIMITS).apply(impressions(log), feedback(log))
    window = online.read(["flags0"], 1_800_000_000_000)[0].short
    for bit, flag in enumerate(FLAGS):
        assert ((window.labels >> bit) & 1).astype(bool).tolist() == log[flag].to_pylist()
