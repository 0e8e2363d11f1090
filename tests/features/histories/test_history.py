import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.histories.context import Pathway, pathway_from_windows
from features.histories.history import History
from features.histories.requests import requests
from features.histories.windows import Limits, Window, empty_window, fold, positives, window_of
from features.schema import EXPOSURE, TIME

LIMITS = Limits(short=6, positive=4)
INDEX = pd.Index([f"i{item}" for item in range(25)], dtype=object)  # five of the thirty items are unknown


def assert_same(actual: Pathway, expected: Pathway) -> None:
    for name in ("item", "age_s", "play_ms", "duration_ms", "labels"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
        assert getattr(actual, name).dtype == getattr(expected, name).dtype, name


def folded(table: pa.Table, users: list[str], times: np.ndarray) -> tuple[Pathway, Pathway]:
    """The slow reference: one fold per request over the whole log of its user."""
    events, owner = window_of(table), np.array(table["user_id"].to_pylist(), object)
    short: list[Window] = []
    positive: list[Window] = []
    for user, time in zip(users, times, strict=True):
        own = events.take(owner == user)
        short.append(fold(empty_window(), own, LIMITS.short, time))
        positive.append(fold(empty_window(), positives(own), LIMITS.positive, time))
    return (
        pathway_from_windows(short, times, INDEX, LIMITS.short),
        pathway_from_windows(positive, times, INDEX, LIMITS.positive),
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), rows=st.integers(0, 150))
def test_context_pathways_equal_fold(make_exposures, seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    table = make_exposures(rows, seed=seed)
    log = table.column("event_time").cast(pa.int64()).to_numpy()
    # at event times, between them, before the first and after the last
    times = np.concatenate([rng.choice(log, 8) if rows else [], rng.integers(1_699_999_000_000, 1_701_000_000_000, 8)])
    times = np.concatenate([times, [0, 4_000_000_000_000]]).astype(np.int64)
    users = rng.choice(["u0", "u1", "u2", "u3", "u4", "stranger"], len(times)).tolist()
    shuffled = table.take(rng.permutation(rows))
    actual = History.from_exposures(shuffled, INDEX).context_pathways(users, times, LIMITS)
    for mine, reference in zip(actual, folded(table, users, times), strict=True):
        assert_same(mine, reference)


def test_repeated_exposures_count_once(make_exposures) -> None:
    table = make_exposures(120)
    times = np.full(5, 1_800_000_000_000)
    users = [f"u{user}" for user in range(5)]
    once = History.from_exposures(table, INDEX).context_pathways(users, times, LIMITS)
    twice = History.from_exposures(pa.concat_tables([table, table.slice(20, 60)]), INDEX)
    for expected, actual in zip(once, twice.context_pathways(users, times, LIMITS), strict=True):
        assert_same(actual, expected)


def test_no_request_sees_itself_or_the_future(make_exposures) -> None:
    """A planted later event, and any change at or after a request, must leave the request's context as it was."""
    table = make_exposures(200)
    grouped = requests(table)
    users, times = grouped.user_ids, grouped.times_ms
    before = History.from_exposures(table, INDEX).context_pathways(users, times, LIMITS)
    chosen = len(grouped) // 2
    rows = table.to_pylist()
    planted = [
        {**rows[0], "exposure_id": f"planted-{user}", "user_id": user, "event_time": int(times[chosen]), "like": True}
        for user in set(users)
    ]
    future = pa.Table.from_pylist(planted, schema=EXPOSURE.set(6, pa.field("event_time", pa.int64()))).cast(EXPOSURE)
    after = History.from_exposures(pa.concat_tables([table, future]), INDEX).context_pathways(users, times, LIMITS)
    unaffected = times <= times[chosen]
    for clean, leaked in zip(before, after, strict=True):
        assert_same(leaked.take(unaffected), clean.take(unaffected))
    assert (after[0].item[~unaffected] != before[0].item[~unaffected]).any()
    assert future["event_time"].type == TIME


def test_latest_is_every_users_fold(make_exposures) -> None:
    table = make_exposures(90, users=7)
    users, short, positive = History.from_exposures(table).latest(LIMITS)
    events, owner = window_of(table), np.array(table["user_id"].to_pylist(), object)
    assert users == sorted(set(owner))
    for user, window, liked in zip(users, short, positive, strict=True):
        assert window == fold(empty_window(), events.take(owner == user), LIMITS.short)
        assert liked == fold(empty_window(), positives(events.take(owner == user)), LIMITS.positive)
    middle = int(np.median(events.times))
    _, earlier, _ = History.from_exposures(table).latest(LIMITS, before_ms=middle)
    assert all((window.times < middle).all() for window in earlier)


def test_too_long_a_span_is_refused(make_exposures) -> None:
    times = pa.array([-(2**61), 0, 2**61]).cast(TIME)
    table = make_exposures(3).set_column(EXPOSURE.get_field_index("event_time"), "event_time", times)
    with pytest.raises(ValueError, match="split the log"):
        History.from_exposures(table)
