"""The alignment benchmark judges fairly: the oracle is the best there is, arms are paired, nothing leaks."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.alignment_data import contexts_of, write_log
from benchmarks.alignment_report import difference, gap_closed
from benchmarks.alignment_reward import LEVELS, Stay
from benchmarks.alignment_studies import rule
from benchmarks.alignment_world import LIST, WORLD, Sizes, best, seen_by
from features.datasets import Dataset
from features.histories.lifelong import DAY_MS
from features.world.simulator import Simulator, world_hash
from models.rewards.industrial import parse_rules
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
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


def test_lifelong_lists_are_watched_views_before_midnight(dataset: Dataset, tmp_path: object) -> None:
    folder = tmp_path / "data"  # type: ignore[operator]
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


def test_a_context_ends_before_it_is_asked_for(dataset: Dataset, tmp_path: object) -> None:
    log = dataset.exposures
    catalogue = Tokenizer.fit(dataset.items, log, TokenizerConfig(codes=32, folds=1)).catalogue(dataset.items, log)
    users = sorted(set(log["user_id"].to_pylist()))[:3]
    now = int(log["event_time"].cast(pa.int64()).to_numpy().max()) + 1
    found = contexts_of(dataset, log, users, [now] * 3, catalogue, tmp_path)  # type: ignore[arg-type]
    item = pa.array(catalogue.item_ids)
    for row, (user, seen) in enumerate(zip(users, seen_by(log, users), strict=True)):
        shown = set(item.take(pa.array(found.short.item[row][found.short.item[row] >= 0])).to_pylist())
        assert shown <= seen, user
        assert len(shown) >= min(LIST, len(seen)) - 1


def test_predicted_stay_grows_with_interest_and_names_no_item_without_one() -> None:
    ratios = {k: np.sort(np.random.default_rng(k).gamma(1.0, 0.5, len(LEVELS))) for k in (3, 5)}
    judge = Stay(reward=None, catalogue=None, slope=1.5, shift=0.1, spread=0.8, ratios=ratios)  # type: ignore[arg-type]
    logits, duration = np.linspace(-3, 3, 20), np.full(20, 20_000)
    seconds = judge.seconds(logits, duration)
    assert (np.diff(seconds) > 0).all()
    assert seconds.max() <= 20 * max(values.max() for values in ratios.values())


@pytest.mark.parametrize(("kind", "strength", "target"), [("alpha", 0.5, 0.0), ("boost", 1.5, 1.0)])
def test_rules_are_what_the_reward_reads(kind: str, strength: float, target: float) -> None:
    (made,) = parse_rules(rule("news", "tag", ["local news"], target, kind, strength), "test")
    assert made.factor == strength
    assert made.in_force(0.5)
