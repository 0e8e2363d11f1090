"""The alignment benchmark judges fairly: the oracle is the best there is, arms are paired, nothing leaks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import alignment_judge, alignment_reward, alignment_world
from benchmarks.alignment_data import contexts_of, write_log
from benchmarks.alignment_days import LISTS, Town
from benchmarks.alignment_judge import MEASURES
from benchmarks.alignment_report import difference, gap_closed
from benchmarks.alignment_reward import Stay
from benchmarks.alignment_studies import common_tag, durations, new_authors, of_kind, rule
from benchmarks.alignment_taste import COLUMNS, OF_MANY, RIDGE, scores, taste_of, topics_of
from benchmarks.alignment_world import LIST, WORLD, Sizes, best, seen_by
from features.datasets import Dataset
from features.histories.lifelong import DAY_MS
from features.schema import EXPOSURE
from features.world.simulator import Simulator, world_hash
from models.rewards.industrial import parse_rules
from models.rewards.pscore import OBJECTIVES
from models.rewards.stay import LEVELS, PlayTimes
from models.serving.recommender import Recommendation
from models.training.data import RunData

SMALL = Sizes(users=60, items=200, held=20)


@pytest.fixture(scope="module")
def world() -> Simulator:
    return Simulator(SMALL.world(3))


@pytest.fixture(scope="module")
def dataset(world: Simulator) -> Dataset:
    return world.history()


def test_the_world_is_the_one_that_was_published() -> None:
    assert world_hash(WORLD) == world_hash(Sizes().world(0))
    assert world_hash(WORLD) == "5002035c7723f07c", "other parameters or other code: measure again and change this"
    assert world_hash(Sizes().world(1)) != world_hash(WORLD)


def test_a_log_makes_a_world_too(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_world, "load", lambda _: dataset)
    make = alignment_world.fitted(Path("log"))
    (name, world), (other, _) = make(0, SMALL), make(1, SMALL)
    assert name != other
    assert len(world.population()) == min(SMALL.users, len(set(dataset.exposures["user_id"].to_pylist())))
    assert world.history().exposures.equals(dataset.exposures)
    items = world.history().items["item_id"].to_pylist()[:LIST]
    assert world.expected(world.population()[:2], [items] * 2, 0).keys() >= set(MEASURES)


def test_no_list_is_worth_more_than_the_oracles(world: Simulator, dataset: Dataset) -> None:
    users, items = world.population()[:15], dataset.items["item_id"].to_pylist()
    seconds = world.expected_play_ms(users, items, 0)
    oracle = world.expected(users, best(seconds, items), 0)["play_s"]
    rng = np.random.default_rng(0)
    for noise in (0.0, 0.3, 3.0):
        rival = best(seconds * np.exp(noise * rng.normal(size=seconds.shape)), items)
        found = world.expected(users, rival, 0)["play_s"]
        assert (found <= oracle + 1e-6).all()
        assert noise == 0 or (found < oracle).mean() > 0.9


def test_what_somebody_saw_is_told_apart_by_user(dataset: Dataset) -> None:
    users = sorted(set(dataset.exposures["user_id"].to_pylist()))[:5]
    rows = zip(dataset.exposures["user_id"].to_pylist(), dataset.exposures["item_id"].to_pylist(), strict=True)
    pairs = set(rows)
    for user, seen in zip(users, seen_by(dataset.exposures, users), strict=True):
        assert seen == {item for name, item in pairs if name == user}


@given(st.integers(0, 2**31), st.floats(-0.5, 1.5))
def test_gaps_are_shares_of_the_way(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    base = rng.gamma(2.0, 30.0, 40)
    oracle = base + rng.gamma(2.0, 20.0, 40)
    found = gap_closed(base + share * (oracle - base), base, oracle)
    assert found["value"] == pytest.approx(share)
    assert found["low"] - 1e-9 <= share <= found["high"] + 1e-9
    assert found["high"] - found["low"] < 1e-6, "arms that differ by a share of the gap have no luck in them"


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1000, 200)
    found = difference(base + 1 + rng.normal(0, 0.1, 200), base)
    assert 0.9 < found["low"] < found["value"] < found["high"] < 1.1


def test_lifelong_lists_are_watched_views_before_midnight(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    data = RunData.load(write_log(dataset, dataset.exposures, folder))
    events, contexts = data.sequences.events, data.sequences
    requests = contexts.columns["requests"]
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(requests["time_ms"]), 40, replace=False)
    found = contexts.lifelong(chosen, np.arange(dataset.items.num_rows), 64)
    for row, number in enumerate(chosen):
        midnight = requests["time_ms"][number] // DAY_MS * DAY_MS
        mine = (events["user"] == requests["user"][number]) & (events["time_ms"] < midnight)
        mine &= (events["play_ms"] >= 3000) | (2 * events["play_ms"] >= events["duration_ms"])
        wanted = events["item"][mine][-64:]
        assert found.item[row][found.item[row] >= 0].tolist() == wanted.tolist()


def test_a_context_ends_before_it_is_asked_for(dataset: Dataset, tmp_path: Path) -> None:
    log = dataset.exposures
    items = dataset.items["item_id"].to_pylist()
    catalogue: Any = SimpleNamespace(item_ids=items, rows=lambda ids: pd.Index(items).get_indexer(list(ids)))
    users = sorted(set(log["user_id"].to_pylist()))[:3]
    now = int(log["event_time"].cast(pa.int64()).to_numpy().max()) + 1
    found = contexts_of(dataset, log, users, [now] * 3, catalogue, tmp_path)
    item = pa.array(catalogue.item_ids)
    for row, (user, seen) in enumerate(zip(users, seen_by(log, users), strict=True)):
        shown = set(item.take(pa.array(found.short.item[row][found.short.item[row] >= 0])).to_pylist())
        assert shown <= seen, user
        assert len(shown) >= min(LIST, len(seen)) - 1


def test_the_duration_aware_reward_knows_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_reward, "target_items", lambda *_: None)
    rng = np.random.default_rng(0)
    catalogue: Any = SimpleNamespace(duration_ms=np.array([20_000, 200_000]))
    reward: Any = SimpleNamespace(
        numbers=np.zeros((2, 1)), pscore=lambda *_: (torch.zeros(1, 3, len(OBJECTIVES)), None)
    )
    known: Any = SimpleNamespace(features=lambda users, rows: np.zeros((*rows.shape, len(COLUMNS))))
    context: Any = SimpleNamespace(mask=torch.ones(1))
    judge = Stay(
        reward=reward,
        catalogue=catalogue,
        taste=known,
        users=np.array(["u"]),
        slopes=np.ones(1 + len(COLUMNS)),
        shift=0.1,
        spread=0.8,
        plays=PlayTimes(buckets=np.array([3, 5]), ratios=np.sort(rng.gamma(1.0, 0.5, (2, len(LEVELS))))),
    )
    items = np.array([[0, 1, -1]])
    short, long, none = judge(context, items, np.zeros(1, int))[0]
    assert short < long, "seconds"
    assert np.isnan(none)
    alike = replace(judge, timed=False)(context, items, np.zeros(1, int))[0]
    assert alike[0] == alike[1] == judge.shift
    assert np.isnan(alike[2])


def test_selection_keeps_each_list_and_puts_what_is_predicted_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_judge, "to_tensors", lambda context, _: context)
    catalogue: Any = SimpleNamespace(rows=lambda ids: np.array([int(item) for item in ids], int))
    context: Any = SimpleNamespace(take=lambda rows: np.arange(40)[rows])

    def judge(asked: np.ndarray, rows: np.ndarray, requests: np.ndarray) -> np.ndarray:
        assert (asked == requests).all(), "each list is judged in its own context"
        return np.where(rows >= 0, np.where(requests[:, None] % 2, rows, -rows), np.nan).astype(float)

    lists = [["3", "1", "2"][: 1 + n % 3] for n in range(40)]
    found = alignment_judge.ordered(lists, context, judge, catalogue)  # type: ignore[arg-type]
    assert found == [sorted(items, key=int, reverse=bool(n % 2)) for n, items in enumerate(lists)]


def test_recall_counts_every_user_once() -> None:
    relevant = [{"a", "b"}, {"c"}, set(), {"d"}]
    asked: Any = SimpleNamespace(user_ids=["u", "u", "u", "t"], relevant=relevant)
    assert alignment_judge.by_user([["a"], ["x", "c"], ["a"], ["x"]], asked).tolist() == [0.0, 0.75]


def test_tastes_are_means_of_the_own_views_and_only_of_earlier_ones(dataset: Dataset, tmp_path: Path) -> None:
    data = RunData.load(write_log(dataset, dataset.exposures, tmp_path))
    items = dataset.items["item_id"].to_pylist()
    rng = np.random.default_rng(0)
    catalogue: Any = Known(item_ids=items, rows=lambda ids: pd.Index(items).get_indexer(list(ids)))
    rng = np.random.default_rng(0)
    taste, earlier = taste_of(data, catalogue)
    score, event = scores(data), data.sequences.events
    user, item, when = event["user"].astype(int), event["item"].astype(int), event["time_ms"]
    beyond = score - taste.item[item]

    def slopes(past: np.ndarray) -> np.ndarray:
        x = taste.topics[item[past]]
        return np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ beyond[past])

    for row in rng.choice(len(data), 25, replace=False):
        past = (item == item[row]) & (when < when[row])
        assert earlier[row, 0] == pytest.approx(score[past].sum() / (past.sum() + OF_MANY))
        past = (user == user[row]) & (when < when[row])
        assert earlier[row, 1] == pytest.approx(beyond[past].sum() / (past.sum() + OF_MANY))
        assert earlier[row, 2] == pytest.approx(slopes(past) @ taste.topics[item[row]])
    np.testing.assert_allclose(taste.slopes[3], slopes(user == 3), atol=1e-9)
    found = taste.features(np.array([taste.users[0], "stranger"], object), np.zeros((2, 3), int))
    assert found.shape == (2, 3, len(COLUMNS))
    assert (found[1, :, 1:] == 0).all()
    assert (found[:, :, 0] == taste.item[0]).all()


def test_videos_are_alike_by_tags_that_come_together(tmp_path: Path) -> None:
    tags = [["goal", "cup"], ["cup", "team"], ["team", "goal"], ["cat"], ["cat", "kitten"], []]
    items = pa.table({"item_id": [f"i{n}" for n in range(6)], "tags": pa.array(tags)})
    catalogue: Any = Known(item_ids=items["item_id"].to_pylist(), rows=lambda ids: np.array([int(i[1:]) for i in ids]))
    topics = topics_of(SimpleNamespace(items=items), catalogue)  # type: ignore[arg-type]
    alike = topics @ topics.T
    assert alike[0, 1] > 0.3 > abs(alike[0, 3])
    assert alike[3, 4] > 0.3
    assert (topics[5] == 0).all()


@pytest.mark.parametrize(("kind", "strength", "target"), [("alpha", 0.5, 0.0), ("boost", 1.5, 1.0)])
def test_rules_are_what_the_reward_reads(kind: str, strength: float, target: float) -> None:
    (made,) = parse_rules(rule("news", "tag", ["local news"], target, kind, strength), "test")
    assert made.factor == strength
    assert made.in_force(0.5)


class Known(SimpleNamespace):
    """A catalogue that knows how many items it has."""

    def __len__(self) -> int:
        return len(self.item_ids)


class Drawn:
    """A policy that serves random unseen items and claims to have drawn them with a probability."""

    source = "onerec"

    def __init__(self, items: Sequence[str]) -> None:
        self.items, self.explored = list(items), set()

    def answer(
        self, users: Sequence[str], context: Any, seen: Sequence[set[str]], count: int, now_ms: int, explore: bool
    ) -> list[Recommendation]:
        self.explored |= {(user, explore) for user in users}
        rng, found = np.random.default_rng(0), []
        for before in seen:
            ids = [item for item in rng.permutation(self.items).tolist() if item not in before][:count]
            sids = np.tile(np.arange(3, dtype=np.int32), (len(ids), 1))
            scores = -np.ones(len(ids), np.float32)
            found.append(Recommendation(item_ids=ids, scores=scores, sids=sids, log_probs=-sids.astype(np.float32)))
        return found


def town_of(world: Simulator, dataset: Dataset, people: list[str]) -> tuple[Town, SimpleNamespace]:
    """A town without a model: its contexts are row numbers."""
    items = dataset.items["item_id"].to_pylist()
    index = pd.Index(items)
    catalogue = SimpleNamespace(duration_ms=dataset.items["duration_ms"].to_numpy(), rows=index.get_indexer)
    mine = [name in set(people) for name in dataset.exposures["user_id"].to_pylist()]
    lab = SimpleNamespace(
        world=world,
        people=people,
        log=dataset.exposures.filter(pa.array(mine)),
        dataset=dataset,
        catalogue=catalogue,
        start_ms=int(world.start().timestamp() * 1000),
        contexts=lambda users, *_: pd.Series(np.arange(len(users))),
    )
    return Town(lab, 30, "town"), lab  # type: ignore[arg-type]


def test_a_day_is_served_to_those_who_may_be_learned_from(world: Simulator, dataset: Dataset) -> None:
    people = world.population()[:40]
    town, lab = town_of(world, dataset, people)
    policy = Drawn(dataset.items["item_id"].to_pylist())
    seen = dict(zip(people, seen_by(lab.log, people), strict=True))
    played = town.play(policy, 0)
    assert played.schema == EXPOSURE
    assert 0 < played.num_rows == town.log.num_rows - lab.log.num_rows
    assert set(played["user_id"].to_pylist()) <= set(people)
    rows = list(zip(played["user_id"].to_pylist(), played["item_id"].to_pylist(), strict=True))
    assert all(item not in seen[user] for user, item in rows), "nobody is shown a video twice"
    assert len(set(rows)) == len(rows)
    assert set(map(tuple, played["log_probs"].to_pylist())) == {(0.0, -1.0, -2.0)}
    assert max(played["position"].to_pylist()) < LIST
    per_user = pd.Series([user for user, _ in rows]).value_counts()
    assert per_user.max() <= LISTS * LIST
    assert {explore for _, explore in policy.explored} == {False, True}
    served = {user for user, _ in policy.explored}
    assert len(served) == len(policy.explored) <= 30, "everybody is served by one of the two"


def test_arms_do_not_share_a_town(world: Simulator, dataset: Dataset) -> None:
    people = world.population()[:40]
    first, second = (town_of(world, dataset, people)[0] for _ in range(2))
    items = dataset.items["item_id"].to_pylist()
    before = first.play(Drawn(items), 0)
    assert second.play(Drawn(items), 0).equals(before), "equal answers, equal luck, whoever played before"


def test_kinds_of_the_rules(dataset: Dataset) -> None:
    lab: Any = SimpleNamespace(dataset=dataset, log=dataset.exposures)
    items = dataset.items
    lists = [items["item_id"].to_pylist()[:LIST]]
    tag = common_tag(lab, lists)
    assert tag in {tags[0] for tags in items["tags"].to_pylist()[:LIST]}
    assert of_kind(lab, "tag", [tag]) & set(lists[0])
    few, more = (new_authors(lab, share) for share in (0.1, 0.5))
    assert set(few) < set(more)
    author = dict(zip(items["item_id"].to_pylist(), items["author_id"].to_pylist(), strict=True))
    shown = pd.Series([author[item] for item in dataset.exposures["item_id"].to_pylist()]).value_counts()
    rest = set(author.values()) - set(more)
    assert max(shown.get(name, 0) for name in more) <= min(shown.get(name, 0) for name in rest)


def test_the_duration_aware_advantage_has_no_bias(dataset: Dataset) -> None:
    found = durations(SimpleNamespace(log=dataset.exposures))  # type: ignore[arg-type]
    assert abs(found["advantage"]) <= 0.05 < found["raw"] + 0.05
