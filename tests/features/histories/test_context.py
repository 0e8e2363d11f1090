import numpy as np
import pandas as pd

from features.histories.context import (
    STATIC_BUCKETS,
    STATIC_FIELDS,
    Context,
    cold_context,
    from_windows,
    hash_static,
    pathway_from_windows,
)
from features.histories.windows import Limits, Window, empty_window, fold, window_of

LIMITS = Limits(short=5, positive=4, lifelong=3)


def test_newest_stands_last_and_padding_left(make_exposures) -> None:
    table = make_exposures(3, users=1)
    window, now = fold(empty_window(), window_of(table), 20), 2_000_000_000_000
    index = pd.Index(sorted(set(table["item_id"].to_pylist())), dtype=object)
    pathway = pathway_from_windows([empty_window(), window], np.array([now, now]), index, 5)
    assert pathway.item[0].tolist() == [-1] * 5
    assert pathway.item[1].tolist() == [-1, -1, *index.get_indexer(window.item_ids)]
    assert np.allclose(pathway.age_s[1, 2:], (now - window.times) / 1000)
    assert pathway.play_ms[1, 2:].tolist() == window.play_ms.tolist()
    assert pathway.item.dtype == np.int32
    assert pathway.age_s.dtype == np.float32


def test_unknown_items_are_dropped_after_the_limit() -> None:
    n = 6
    window = Window(
        ids=np.arange(n),
        item_ids=np.array(["a", "b", "gone", "c", "gone", "d"], object),
        times=np.arange(n),
        play_ms=np.arange(n),
        duration_ms=np.arange(n),
        labels=np.arange(n),
    )
    index = pd.Index(["a", "b", "c", "d"], dtype=object)
    pathway = pathway_from_windows([window], np.array([10]), index, 4)
    assert pathway.item.tolist() == [[-1, -1, 2, 3]]  # of gone, c, gone, d; "b" does not come back
    assert pathway.labels.tolist() == [[0, 0, 3, 5]]


def test_events_at_the_context_time_do_not_enter(make_exposures) -> None:
    table = make_exposures(30, users=1)
    window = fold(empty_window(), window_of(table), 30)
    index = pd.Index(sorted(set(table["item_id"].to_pylist())), dtype=object)
    now = int(window.times[15])
    pathway = pathway_from_windows([window], np.array([now]), index, 30)
    assert (pathway.item >= 0).sum() == (window.times < now).sum()
    assert (pathway.age_s[pathway.item >= 0] > 0).all()


def test_take_and_concat_are_inverse(make_exposures) -> None:
    window = fold(empty_window(), window_of(make_exposures(10, users=1)), 20)
    index = pd.Index(sorted(set(window.item_ids)), dtype=object)
    windows = [window, empty_window()]
    static = np.stack([hash_static(["a=1"]), hash_static([])])
    context = from_windows(static, windows, windows, windows, np.full(2, 2_000_000_000_000), index, LIMITS)
    again = Context.concat([context.take(np.array([0])), context.take(slice(1, 2))])
    assert len(again) == 2
    assert np.array_equal(again.static, context.static)
    assert np.array_equal(again.short.item, context.short.item)
    assert np.array_equal(again.lifelong.age_s, context.lifelong.age_s)
    cold = cold_context(1, LIMITS)
    assert np.array_equal(cold.static, context.static[1:])
    assert np.array_equal(cold.positive.item, context.positive.item[1:])


def test_hash_static_is_stable_and_ordered_by_name() -> None:
    attributes = [f"name{i}=v" for i in range(12)]
    buckets = hash_static(attributes)
    assert np.array_equal(buckets, hash_static(attributes[::-1]))
    assert buckets.shape == (STATIC_FIELDS,)
    assert ((buckets > 0) & (buckets < STATIC_BUCKETS)).all()
    assert hash_static(["sex=f"]).tolist() == [613, 0, 0, 0, 0, 0, 0, 0]  # stored in snapshots: must never change
    assert hash_static(None).sum() == 0
