import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from features.histories.windows import Limits, is_positive
from features.schema import label_bits
from models.training.data import (
    DAY_MS,
    TARGETS,
    Batches,
    Contexts,
    RunData,
    _first_views,
    hashed,
    newest_day,
    split_holdout,
)

LIMITS = Limits(short=5, positive=6, lifelong=7)


@pytest.fixture(scope="module")
def run(log) -> SimpleNamespace:
    data = RunData.load(log.folder)
    return SimpleNamespace(data=data, catalogue=log.catalogue, contexts=Contexts(data, log.catalogue, LIMITS))


def make(run, select=None, **options) -> Batches:
    select = np.ones(run.data.exposures.num_rows, bool) if select is None else select
    return Batches(run.data, run.contexts, run.catalogue, select, **{"batch_requests": 16, **options})


def test_every_exposure_is_a_target_once_per_epoch(run) -> None:
    batches = make(run, shuffle_window=50)
    seen = np.concatenate([batches(step).exposures.ravel() for step in range(len(batches))])
    assert sorted(seen[seen >= 0]) == list(range(run.data.exposures.num_rows))
    assert batches.examples == run.data.exposures.num_rows


def test_long_requests_make_several_samples_of_one_request_each(run) -> None:
    batches = make(run)
    requests = run.data.column("request_id")
    assert max(np.diff(run.contexts.requests.offsets)) > TARGETS
    for step in range(len(batches)):
        batch = batches(step)
        assert batch.exposures.shape[1] <= TARGETS
        for row in batch.exposures:
            assert len(set(requests[row[row >= 0]])) == 1


def test_contexts_hold_only_what_came_before_the_request(run) -> None:
    batches, data = make(run), run.data
    users, items, times = data.column("user_id"), data.column("item_id"), data.times_ms
    for step in range(len(batches)):
        batch = batches(step)
        for b, row in enumerate(batch.exposures):
            targets = row[row >= 0]
            asked = run.contexts.requests.times_ms[
                np.flatnonzero(run.contexts.requests.request_ids == data.column("request_id")[targets[0]])[0]
            ]
            before = np.flatnonzero((users == users[targets[0]]) & (times < asked))
            expected = run.catalogue.rows(items[before[np.argsort(times[before])]])[-LIMITS.short :]
            short = batch.context.short.item[b]
            assert list(short[short >= 0]) == list(expected)
            for pathway in (batch.context.short, batch.context.positive, batch.context.lifelong):
                assert (pathway.age_s[b][pathway.item[b] >= 0] > 0).all()


def test_context_and_targets_belong_together_under_shuffling(run) -> None:
    plain, shuffled = make(run), make(run, shuffle_window=1000, seed=3)
    by_target = {}
    for step in range(len(plain)):
        batch = plain(step)
        by_target |= {row[0]: batch.context.take(slice(b, b + 1)) for b, row in enumerate(batch.exposures)}
    for step in range(len(shuffled)):
        batch = shuffled(step)
        for b, row in enumerate(batch.exposures):
            assert np.array_equal(batch.context.lifelong.item[b], by_target[row[0]].lifelong.item[0])
            assert np.array_equal(batch.context.static[b], by_target[row[0]].static[0])


def test_windows_stay_in_chronological_order_and_epochs_differ(run) -> None:
    batches = make(run, shuffle_window=32)
    epochs = [
        np.concatenate([batches.rows(step) for step in range(e * len(batches), (e + 1) * len(batches))]) for e in (0, 1)
    ]
    for order in epochs:
        assert [set(order[i : i + 32]) for i in range(0, 96, 32)] == [set(range(i, i + 32)) for i in range(0, 96, 32)]
    assert not np.array_equal(*epochs)
    assert np.array_equal(make(run, shuffle_window=32).rows(len(batches) + 1), batches.rows(len(batches) + 1))
    assert (np.diff(run.contexts.requests.times_ms) >= 0).all()


def test_workers_share_out_each_batch(run) -> None:
    whole = make(run, shuffle_window=64)
    parts = [make(run, shuffle_window=64, rank=rank, workers=3) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    for step in range(len(parts[0])):
        dealt = [part.rows(step) for part in parts]
        assert sorted(np.concatenate(dealt)) == sorted(whole.rows(step))
        assert min(map(len, dealt)) > 0


def test_targets_outside_the_catalogue_are_left_out(run, log) -> None:
    known = log.catalogue
    first = replace(
        known,
        item_ids=known.item_ids[:30],
        titles=known.titles[:30],
        items=known.items.slice(0, 30),
        **{name: getattr(known, name)[:30] for name in ("sids", "author", "tag", "duration_ms", "popularity")},
    )
    contexts = Contexts(run.data, first, LIMITS)
    select = np.ones(run.data.exposures.num_rows, bool)
    batches = Batches(run.data, contexts, first, select, batch_requests=16)
    assert batches.examples == int((first.rows(run.data.column("item_id")) >= 0).sum()) < run.data.exposures.num_rows
    assert max(batches(step).context.short.item.max() for step in range(len(batches))) < 30


def test_holdout_is_whole_requests_of_the_newest_day_of_some_users(log) -> None:
    mask = split_holdout(log.exposures, users_share=0.4, seed=1)
    frame = log.exposures.select(["request_id", "user_id", "event_time"]).to_pandas()
    assert 0 < mask.sum() < len(mask)
    assert frame.groupby("request_id").apply(lambda g: mask[g.index].all() or not mask[g.index].any()).all()
    newest = log.exposures.column("event_time").cast(pa.int64()).to_numpy().max()
    assert (log.exposures.column("event_time").cast(pa.int64()).to_numpy()[mask] > newest - DAY_MS).all()
    chosen = set(frame["user_id"][mask])
    others = ~mask & (log.exposures.column("event_time").cast(pa.int64()).to_numpy() > newest - DAY_MS + 3_600_000)
    assert not chosen & set(frame["user_id"][others])
    assert split_holdout(log.exposures, users_share=0).sum() == 0
    shuffled = np.random.default_rng(0).permutation(len(mask))
    again = split_holdout(log.exposures.take(pa.array(shuffled)), users_share=0.4, seed=1)
    assert np.array_equal(again, mask[shuffled])


def times(exposures: pa.Table) -> np.ndarray:
    return np.asarray(exposures.column("event_time").cast(pa.int64()).to_numpy())


def test_first_views_are_those_before_which_nobody_saw_the_item() -> None:
    found = _first_views(["a", "b", "a", "a", "b"], ["x", "x", "x", "y", "x"], np.array([5, 1, 4, 9, 0]))
    assert found.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(("foreign", "kept"), [(0.9, True), (0.05, False)])
def test_others_requests_are_held_out_of_as_many_users_as_it_takes(
    log, foreign: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough of them that can be judged, or, when there are too few in all, everybody's."""
    monkeypatch.setattr("models.training.data.FOREIGN_REQUESTS", 10)
    users = log.exposures.column("user_id").to_pylist()
    source = pa.array(["cascade" if hashed(user, 9) < foreign else "onerec" for user in users])
    exposures = log.exposures.set_column(log.exposures.schema.get_field_index("source"), "source", source)
    mask = split_holdout(exposures, users_share=0.1)
    held = exposures.filter(pa.array(mask))
    assert (set(held["source"].to_pylist()) == {"cascade"}) is kept
    play, duration = (held.column(name).to_numpy() for name in ("play_ms", "duration_ms"))
    engaged = is_positive(play, duration, np.asarray(label_bits(held), np.int64))
    new = _first_views(*(exposures.column(name).to_pandas() for name in ("user_id", "item_id")), times(exposures))[mask]
    judged = set(np.array(held["request_id"].to_pylist())[engaged & new])
    assert (len(judged) >= 10) is kept
    usual = {user for user in held["user_id"].to_pylist() if hashed(user, 0) < 0.1}
    assert (set(held["user_id"].to_pylist()) > usual) is kept, "more users than usual, or just those"


def test_held_out_requests_come_with_what_was_seen_and_engaged_with(run) -> None:
    holdout, data = run.data.holdout(run.catalogue, LIMITS), run.data
    assert len(holdout) == len(set(data.column("request_id")[data.held_out])) > 0
    users, items, positive = data.column("user_id"), data.column("item_id"), data.positive()
    for n, (user, time) in enumerate(zip(holdout.user_ids, holdout.times_ms, strict=True)):
        before = (users == user) & (data.times_ms < time)
        assert holdout.seen[n] == set(items[before])
        inside = (users == user) & (data.times_ms >= time) & (data.times_ms < time + 3_600_000) & positive
        assert holdout.relevant[n] == set(items[inside]) - holdout.seen[n]
    assert len(holdout.context) == len(holdout)
    everybody = split_holdout(data.exposures, users_share=1.0)
    more = data.holdout(run.catalogue, LIMITS, everybody)
    assert len(more) == len(set(data.column("request_id")[everybody])) > len(holdout)
    assert data.before_newest_day().num_rows == int((data.times_ms < newest_day(data.exposures)).sum())


def test_contexts_equal_what_the_log_says(run) -> None:
    """Lifelong events are those watched before the last midnight; static ones are the user's."""
    chosen = run.contexts.trainable
    context, grouped = run.contexts.of(chosen), run.contexts.requests
    assert (context.static == run.data.sequences.static(chosen)).all()
    midnight = grouped.times_ms[chosen] // DAY_MS * DAY_MS
    event = grouped.times_ms[chosen][:, None] - (context.lifelong.age_s.astype(np.float64) * 1000)
    assert (
        event[context.lifelong.item >= 0]
        < np.broadcast_to(midnight[:, None], event.shape)[context.lifelong.item >= 0] + 500
    ).all()
    assert (context.lifelong.item >= 0).any(1).sum() > len(chosen) / 2


def test_contexts_and_batches_share_a_catalogue(run) -> None:
    other = replace(run.catalogue, popularity=run.catalogue.popularity + 1)
    with pytest.raises(ValueError, match="another catalogue"):
        Batches(run.data, run.contexts, other, np.ones(len(run.data), bool), batch_requests=4)


def test_a_log_without_play_times_weighs_positives_alone(write_log, log, tmp_path) -> None:
    zeros = pa.array(np.zeros(log.exposures.num_rows, np.int64))
    table = log.exposures
    for name in ("play_ms", "duration_ms"):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), zeros)
    data = RunData.load(write_log(tmp_path / "data", table).folder)
    assert np.array_equal(data.watched_seconds(), data.positive().astype(np.float32))
    assert 0 < data.positive().sum() < len(data)
    known = RunData.load(log.folder)
    assert np.array_equal(known.watched_seconds(), (known.column("play_ms") / 1000).astype(np.float32))


def test_columns_come_from_the_table(run) -> None:
    for name in ("play_ms", "duration_ms", "dislike", "long_view", "item_id", "position"):
        expected = run.data.exposures.column(name).to_pandas().to_numpy()
        assert np.array_equal(run.data.column(name), expected), name
    assert len(run.data) == run.data.exposures.num_rows


def test_data_of_two_runs_is_refused(run, log, write_log, tmp_path) -> None:
    folder = write_log(tmp_path / "data", log.exposures.slice(0, 100)).folder
    shutil.copy(log.folder / "exposures.parquet", folder / "exposures.parquet")
    with pytest.raises(ValueError, match="both must come from one run's data"):
        RunData.load(folder)


def test_missing_files_are_named(log, write_log, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"exposures\.parquet, items\.parquet"):
        RunData.load(tmp_path)
    folder = write_log(tmp_path / "data", log.exposures.slice(0, 100)).folder
    (folder / "sequences" / "requests.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks requests\.arrow"):
        RunData.load(folder)
