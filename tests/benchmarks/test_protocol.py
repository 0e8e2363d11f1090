"""The protocol against one that is computed anew from the lists, and: nothing that is held out is learned from."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import sasrec
from benchmarks.leave_one_out import accuracy, places
from benchmarks.protocol import DAY_MS
from benchmarks.quality_generator import Examples, Recipe
from benchmarks.quality_models import MODELS, Question
from benchmarks.quality_report import gain, gaps
from benchmarks.sasrec import SASRec, SASRecConfig
from features.datasets import load
from models.baselines import ItemKNN
from models.tokenizer.vocabulary import Catalogue

ITEMS, USERS, START_S, DAY_S = 18, 14, 1_400_000_000, 86_400
Log = list[tuple[list[int], list[int]]]
"""Of every user the items and the times in seconds."""


def log() -> Log:
    """Users of 1 to 12 items, some more than once, two on one day often; some have no time."""
    rng, users = np.random.default_rng(5), []
    for user in range(USERS):
        length = 1 + user % 12
        days = np.sort(rng.integers(0, 6, length)) * DAY_S + START_S
        # Given out of order, a repeat on one day would be the same twice.
        items = rng.permutation(ITEMS)[:length].tolist()
        items[-1] = items[0] if user == 11 else items[-1]
        days[-1] += 10 * DAY_S
        users.append((items, [int(day) if step == 0 or rng.random() > 0.1 else -1 for step, day in enumerate(days)]))
    return users


def question(folder: Path, users: Log, *, shuffled: bool = False, since: int | None = None) -> Question:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "user_id": [f"u{user:02d}" for user in range(len(users))],
        "item_ids": [items for items, _ in users],
        "timestamps": [times for _, times in users],
    }
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    items = {"item_id": range(ITEMS), "title": [f"thing {k} of {k % 4}" for k in range(ITEMS)]}
    pq.write_table(pa.table({name: list(values) for name, values in items.items()}), folder / "items.parquet")
    return Question(dataset=load(folder), seed=0, shuffled=shuffled, since=since, quick=False)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Question:
    return question(tmp_path_factory.mktemp("log"), log())


def long_enough() -> list[list[int]]:
    return [items for items, _ in log() if len(items) >= 3]


def test_targets_and_what_is_learned_from_are_those_of_the_lists(asked: Question) -> None:
    split, lists = asked.split, long_enough()
    item = split.histories.item
    assert item[split.test].tolist() == [items[-1] for items in lists]
    assert item[split.validation].tolist() == [items[-2] for items in lists]
    assert item[split.training].tolist() == [one for items in lists for one in items[1:-2]]
    assert [split.histories.seen(int(p)).tolist() for p in split.test] == [items[:-1] for items in lists]
    often = Counter(one for items in lists for one in items[:-2])
    assert split.occurrences(ITEMS).tolist() == [often[k] for k in range(ITEMS)]
    learned = Counter(int(k) for k in asked.training["item_id"].to_pylist())
    assert learned == often + Counter(one for items, _ in log() if len(items) < 3 for one in items)


def test_popularity_is_what_a_loop_says(asked: Question) -> None:
    often = Counter(one for items in long_enough() for one in items[:-2])
    ranked = MODELS["popularity"].fit(asked, Path(), print).rank(asked.split.test)
    found = []
    for row, items in zip(ranked, long_enough(), strict=True):
        best = sorted((k for k in range(ITEMS) if k not in items[:-1]), key=lambda k: (-often[k], k))
        assert row.tolist() == best + [-1] * (50 - len(best))
        found.append(best.index(items[-1]) if items[-1] in best else None)
    assert found.count(None) == 1, "the one who asks for what was had before"
    scores = accuracy(ranked, asked.split.histories.item[asked.split.test], (5, 10))
    for k in (5, 10):
        inside = [place for place in found if place is not None and place < k]
        assert scores[f"recall@{k}"] == pytest.approx(len(inside) / len(found))
        assert scores[f"ndcg@{k}"] == pytest.approx(sum(1 / np.log2(place + 2) for place in inside) / len(found))


def test_sasrec_ranks_as_one_user_after_the_other(asked: Question) -> None:
    config = SASRecConfig(width=16, limit=5, dates=True)
    torch.manual_seed(0)
    model = SASRec(ITEMS, config).eval()
    ranked = sasrec.rank(model, asked.split, asked.split.test, config)
    for row, position in enumerate(asked.split.test.tolist()):
        history, times = asked.split.histories.seen(position), asked.split.histories.time_ms
        newest = history[-5:]
        gaps_days = np.diff(times[position - len(newest) : position + 1]) // DAY_MS
        gap = [int((day >= sasrec.GAP_DAYS).sum()) for day in gaps_days]
        hidden = model(torch.from_numpy(newest.astype(np.int64) + 1)[None], torch.tensor([gap]))[0, -1]
        scores = model.item.weight[1:] @ hidden
        best = [k for k in scores.argsort(descending=True).tolist() if k not in history]
        assert ranked[row].tolist() == best + [-1] * (50 - len(best))


def with_other_ends(users: Log, days: int) -> Log:
    """The last two of everybody who is tested are items that they never took, ``days`` later."""
    changed = []
    for items, times in users:
        others = [k for k in range(ITEMS) if k not in items][: 2 * (len(items) >= 3)]
        kept = len(items) - len(others)
        changed.append(([*items[:kept], *others], [*times[:kept], *(t + days * DAY_S for t in times[kept:])]))
    return changed


def arrays(of: Question) -> list[np.ndarray]:
    """Everything that any model is fitted on."""
    split, n = of.split, ITEMS
    catalogue = Catalogue.from_items(of.items, sids=np.arange(n)[:, None], codes=n, popularity=np.zeros(n))
    examples = Examples(split, catalogue, Recipe())
    batches = [examples(number) for number in range(len(examples))]
    knn = ItemKNN.fit(of.training, of.items, now_ms=(START_S + 99 * DAY_S) * 1000)
    table = of.training.select(["user_id", "item_id", "event_time", "long_view"])
    return [
        *(np.asarray(column.to_pylist()) for column in table.columns),
        split.occurrences(n),
        knn.similarity.toarray(),
        *(part.numpy() for batch in batches for part in (batch.targets, batch.context.sids, batch.context.numeric)),
    ]


def test_nothing_held_out_is_learned_from(asked: Question, tmp_path: Path) -> None:
    other = question(tmp_path, with_other_ends(log(), days=9))
    assert (other.split.histories.item != asked.split.histories.item).any()
    for mine, theirs in zip(arrays(asked), arrays(other), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_context_knows_of_its_target_only_when_it_was_asked_for(asked: Question, tmp_path: Path) -> None:
    other = question(tmp_path, with_other_ends(log(), days=0))
    mine, theirs = (each.split.histories.contexts(each.split.validation).short for each in (asked, other))
    assert np.array_equal(mine.item, theirs.item)
    assert np.array_equal(mine.age_s, theirs.age_s)


@pytest.mark.parametrize("seed", [0, 3])
def test_ties_are_shuffled_inside_a_user_and_alike_for_all_seeds(seed: int, asked: Question) -> None:
    shuffled = replace(asked, shuffled=True, seed=seed).split.histories
    raw = asked.split.histories
    assert np.array_equal(shuffled.item, replace(asked, shuffled=True).split.histories.item)
    assert not np.array_equal(shuffled.item, raw.item)
    assert np.array_equal(shuffled.starts, raw.starts)
    for first, end in zip(raw.starts[:-1], raw.starts[1:], strict=True):
        for day in np.unique(raw.time_ms[first:end] // 1000):
            sides = [Counter(h.item[first:end][h.time_ms[first:end] // 1000 == day].tolist()) for h in (raw, shuffled)]
            assert sides[0] == sides[1]


def test_a_sample_learns_from_whole_users_and_tests_on_few(asked: Question) -> None:
    whole, part = asked.split, asked.split.sampled(5, 20)
    assert len(part.test) == len(part.validation) == 5
    assert 0 < len(part.training) <= 20
    user = np.searchsorted(whole.histories.starts, whole.training, side="right") - 1
    for one in np.unique(user):
        assert np.isin(whole.training[user == one], part.training).sum() in (0, (user == one).sum())
    assert np.array_equal(whole.sampled(99, 999).training, whole.training)
    assert len(whole.sampled(1, 0).training), "somebody's at least"


def test_too_short_histories_leave_nothing_to_learn_from(tmp_path: Path) -> None:
    short = question(tmp_path, [([user, user + 1, user + 2], [START_S + k for k in range(3)]) for user in range(4)])
    with pytest.raises(ValueError, match="none of 4 users has 4 positive interactions"):
        _ = short.split


def test_the_paired_bootstrap_is_over_tests_with_seeds_averaged() -> None:
    rng = np.random.default_rng(2)
    mine, rivals = ([{"places": rng.integers(0, 30, 200)} for _ in range(2)] for _ in range(2))

    def value(place: int) -> float:
        return 0.0 if place >= 10 else 1 / np.log2(place + 2)

    each = [
        np.mean([value(a["places"][test]) - value(b["places"][test]) for a, b in zip(mine, rivals, strict=True)])
        for test in range(200)
    ]
    again = rng.choice(each, (4000, 200)).mean(1)
    found = gaps(mine, rivals, "ndcg@10")
    assert found.mean == pytest.approx(np.mean(each))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(again, [2.5, 97.5])), abs=0.005)
    none = gaps(mine, mine, "ndcg@10")
    assert (none.low, none.mean, none.high) == (0, 0, 0)


def test_a_list_without_the_item_is_a_miss_at_every_cutoff() -> None:
    found = places(np.array([[3, 1, -1], [2, 1, 0]]), np.array([2, 0]))
    assert gain(found, "recall@50").tolist() == [0, 1]
    assert gain(found, "ndcg@50").tolist() == [0, 1 / np.log2(4)]
