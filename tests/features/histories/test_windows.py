from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.histories.windows import (
    DISLIKED,
    ENGAGED,
    Limits,
    Window,
    concat_windows,
    empty_window,
    event_ids,
    fold,
    is_positive,
    positives,
    spans,
    window_of,
)
from features.schema import FLAGS
from features.settings import settings


def window(rows: list[tuple[int, int, int]]) -> Window:
    """Rows (id, play_ms, labels): item, time and duration follow from the id, as they do in a log."""
    ids, play, labels = np.array(rows, np.int64).reshape(-1, 3).T
    return Window(
        ids=ids,
        item_ids=np.array([f"i{i % 7}" for i in ids], object),
        times=ids // 3,  # ties
        play_ms=play,
        duration_ms=1_000 + ids,
        labels=labels,
    )


events = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 5_000), st.integers(0, 2 ** len(FLAGS) - 1)), max_size=60
).map(window)
limits = st.integers(1, 30)


@given(events, limits)
def test_folding_again_changes_nothing(new: Window, limit: int) -> None:
    once = fold(empty_window(), new, limit)
    assert fold(once, new, limit) == once
    assert fold(once, empty_window(), limit) == once


@given(events, limits, st.randoms(use_true_random=False))
def test_order_of_events_does_not_matter(new: Window, limit: int, random) -> None:
    rows = list(range(len(new)))
    random.shuffle(rows)
    assert fold(empty_window(), new.take(np.array(rows, np.int64)), limit) == fold(empty_window(), new, limit)


@given(events, events, events, limits)
def test_batching_does_not_matter(a: Window, b: Window, c: Window, limit: int) -> None:
    step_by_step = fold(fold(fold(empty_window(), a, limit), b, limit), c, limit)
    at_once = fold(empty_window(), concat_windows([c, a, b]), limit)
    of_folds = fold(fold(empty_window(), a, limit), fold(fold(empty_window(), b, limit), c, limit), limit)
    assert step_by_step == at_once == of_folds


@given(events, limits, st.integers(0, 15))
def test_result_is_the_newest_strictly_earlier_rows(new: Window, limit: int, before: int) -> None:
    result = fold(empty_window(), new, limit, before_ms=before)
    expected = sorted({(time, i) for time, i in zip(new.times, new.ids, strict=True) if time < before})[-limit:]
    assert [(time, i) for time, i in zip(result.times, result.ids, strict=True)] == expected


def test_late_feedback_completes_its_impression() -> None:
    shown = window([(9, 0, 0), (12, 0, 0)])
    result = fold(shown, window([(9, 4_000, 1)]), 20)
    assert result.play_ms.tolist() == [4_000, 0]
    assert result.labels.tolist() == [1, 0]


def test_is_positive() -> None:
    like, click = 1 << FLAGS.index("like"), 1 << FLAGS.index("click")
    labels = np.array([like, click, like | DISLIKED, 0, 0, 0])
    play = np.array([0, 0, 0, 5_000, 20_000, 0])
    duration = np.array([9_000, 9_000, 9_000, 5_000, 90_000, 0])
    assert is_positive(play, duration, labels).tolist() == [True, False, False, True, True, False]
    assert ENGAGED & DISLIKED == 0


def test_window_of_reads_the_table_in_its_order(make_exposures) -> None:
    table = make_exposures(50)
    result = window_of(table)
    assert np.array_equal(result.ids, event_ids(table["exposure_id"].to_pylist()))
    assert result.item_ids.tolist() == table["item_id"].to_pylist()
    assert len(set(result.ids.tolist())) == 50
    likes = (result.labels >> FLAGS.index("like")) & 1
    assert likes.astype(bool).tolist() == table["like"].to_pylist()
    assert len(positives(result)) < 50


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="limit short is 0"):
        Limits(short=0)


@pytest.fixture
def pathways(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets ONEREC_PATHWAYS for this process."""

    def configure(value: str) -> None:
        monkeypatch.setenv("ONEREC_PATHWAYS", value)
        settings.cache_clear()

    yield configure
    settings.cache_clear()


def test_limits_are_what_the_platform_is_configured_for(pathways: Callable[[str], None]) -> None:
    assert Limits() == Limits(short=20, positive=64, lifelong=64)
    pathways("paper")
    assert Limits() == Limits(short=20, positive=256, lifelong=2000)
    assert Limits(lifelong=7) == Limits(short=20, positive=256, lifelong=7)
    pathways("5, 6,7")
    assert Limits() == Limits(short=5, positive=6, lifelong=7)
    for wrong in ("huge", "1,2", "1,2,0", "1,2,x", ""):
        pathways(wrong)
        with pytest.raises(ValueError, match=r"ONEREC_PATHWAYS is .* expected tiny, small, paper or three lengths"):
            Limits()


@given(counts=st.lists(st.integers(0, 4), max_size=6))
def test_spans_are_ranges_one_after_the_other(counts: list[int]) -> None:
    first = np.arange(len(counts)) * 10
    expected = [row for start, count in zip(first, counts, strict=True) for row in range(start, start + count)]
    assert spans(first, np.array(counts, np.int64)).tolist() == expected
