"""Several writers of the same users at once, or dead half-way: nothing that was folded in is lost."""

import threading
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from features import offline, ownership
from features.histories.context import Pathway
from features.histories.windows import Limits
from features.online import FeaturesUnavailable, OnlineFeatures
from features.ownership import PARTITIONS, owning, partition_of
from features.repository import redis_client
from features.schema import FEEDBACK, IMPRESSION
from features.settings import Settings
from features.updater import Updater

LIMITS = Limits(short=12, positive=200, lifelong=4)
NOW = 1_900_000_000_000
INDEX = pd.Index([f"i{item}" for item in range(30)], dtype=object)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, valkey) -> Settings:
    config = Settings(home=tmp_path_factory.mktemp("home"), redis=f"{valkey[0]}:{valkey[1]}", redis_password=valkey[2])
    offline.apply(config=config)
    return config


def parts(log: pa.Table, rows: np.ndarray) -> tuple[pa.Table, pa.Table]:
    chosen = log.take(pa.array(rows))
    return chosen.select(IMPRESSION.names).cast(IMPRESSION), chosen.select(FEEDBACK.names).cast(FEEDBACK)


@pytest.fixture
def assert_equals_log(folded: Callable[..., tuple[Pathway, Pathway]]) -> Callable[..., None]:
    """On-line context == fold of the log."""

    def check(online: OnlineFeatures, log: pa.Table) -> None:
        users = sorted(set(log["user_id"].to_pylist()))
        context, _ = online.context(users, NOW, INDEX, LIMITS)
        short, positive = folded(log, users, np.full(len(users), NOW), INDEX, LIMITS)
        for name, expected in (("short", short), ("positive", positive)):
            for field in ("item", "age_s", "play_ms", "duration_ms", "labels"):
                np.testing.assert_array_equal(getattr(getattr(context, name), field), getattr(expected, field))

    return check


def test_users_spread_over_the_partitions_and_stay_there() -> None:
    counts = np.bincount([partition_of(f"user-{n}") for n in range(4000)], minlength=PARTITIONS)
    assert len(counts) == PARTITIONS == 4
    assert counts.min() > 0.8 * 4000 / PARTITIONS
    assert [partition_of(name) for name in ("u00000", "u00001", "known")] == [3, 0, 2], "as in every other process"


def test_writers_of_the_same_users_at_once_lose_nothing(config: Settings, make_exposures, assert_equals_log) -> None:
    """Four writers under load; a third of the batches is delivered to two of them."""
    log = make_exposures(400, users=12, seed=1, prefix="race")
    rng = np.random.default_rng(0)
    deliveries = np.array_split(rng.permutation(400), 18)
    deliveries += [deliveries[n] for n in rng.choice(18, 6, replace=False)]
    errors: list[BaseException] = []

    def write(own: list[np.ndarray]) -> None:
        try:
            updater = Updater(OnlineFeatures.connect(config=config), LIMITS)
            for rows in own:
                impressions, feedback = parts(log, rows)
                updater.apply(impressions, FEEDBACK.empty_table())
                updater.apply(IMPRESSION.empty_table(), feedback)
        except BaseException as error:  # a thread's exception would go unseen
            errors.append(error)

    threads = [threading.Thread(target=write, args=(deliveries[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_equals_log(OnlineFeatures.connect(config=config), log)


def test_without_the_lock_the_same_load_does_lose_events(
    config: Settings, make_exposures, assert_equals_log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: two writers between each other's read and write forget what the other folded."""
    log = make_exposures(40, users=1, seed=2, prefix="unguarded")
    online = OnlineFeatures.connect(config=config)
    read, barrier = OnlineFeatures.read, threading.Barrier(2)

    def slow_read(self: OnlineFeatures, *arguments: object, **options: object) -> object:
        found = read(self, *arguments, **options)
        barrier.wait(10)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(OnlineFeatures, "read", slow_read)
        patched.setattr("features.updater.owning", lambda online, partition: threading.Lock())
        threads = [
            threading.Thread(target=lambda rows=rows: Updater(online, LIMITS).apply(*parts(log, rows)))
            for rows in np.array_split(np.arange(40), 2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(online.read(["unguarded0"], NOW)[0].positive) < 40
    with pytest.raises(AssertionError):
        assert_equals_log(online, log)
    Updater(online, LIMITS).apply(*parts(log, np.arange(40)))  # and applying again mends it
    assert_equals_log(online, log)


class Died(BaseException):
    """What nobody may handle, as a kill."""


def test_a_writer_that_died_at_work_is_replayed_without_harm(
    config: Settings, make_exposures, assert_equals_log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had written one partition of three, and half of the next; its lock is given back by nobody."""
    log = make_exposures(200, users=12, seed=3, prefix="killed")
    online, pushes = OnlineFeatures.connect(config=config), []
    push = online.store.push

    def dying_push(source: str, *arguments: object, **options: object) -> None:
        pushes.append(source)
        if len(pushes) == 4:
            raise Died
        push(source, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(ownership, "HELD_S", 0.5)
        patched.setattr(ownership, "_give_back", lambda lock: None)
        patched.setattr(online.store, "push", dying_push)
        with pytest.raises(Died):
            Updater(online, LIMITS).apply(*parts(log, np.arange(150)))
    after_restart = OnlineFeatures.connect(config=config)
    Updater(after_restart, LIMITS).apply(*parts(log, np.arange(200)))
    assert_equals_log(after_restart, log)
    assert Updater(after_restart, LIMITS).apply(*parts(log, np.arange(200))) == 0, "and once more changes nothing"


def test_a_partition_somebody_holds_is_waited_for_then_reported(
    config: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = OnlineFeatures.connect(config=config)
    monkeypatch.setattr(ownership, "WAIT_S", 0.2)
    with owning(online, 1):
        with owning(online, 2):  # others are free
            pass
        with (
            pytest.raises(FeaturesUnavailable, match=r"partition 1 .* 0\.2 s; the batch is applied"),
            owning(online, 1),
        ):
            pytest.fail("two owners")
    with owning(online, 1):
        pass


def test_a_lock_that_was_lost_meanwhile_asks_for_the_batch_again(config: Settings) -> None:
    online = OnlineFeatures.connect(config=config)
    with pytest.raises(FeaturesUnavailable, match="may have written it too"), owning(online, 3):
        redis_client(online.store).delete("onerec:updater:3")
    with pytest.raises(KeyError, match="ours"), owning(online, 3):  # an error inside is the one that is heard of
        raise KeyError("ours")
    with owning(online, 3):
        pass
