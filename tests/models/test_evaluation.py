"""Item-level metrics against values computed by hand, a slow reference and a recommender with random weights."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.histories.context import cold_context
from features.histories.windows import Limits
from models.bundle import Bundle
from models.evaluation import CUTOFFS, accuracy, card, compare, density, describe, evaluate, mean_reward
from models.serving.recommender import Recommender
from models.tokenizer.vocabulary import Catalogue
from models.training.data import Holdout

LIMITS = Limits(short=5, positive=6, lifelong=7)
ITEMS = [f"i{k}" for k in range(80)]


def catalogue_of(first_codes: dict[str, int]) -> Catalogue:
    """Items of two-level SIDs whose first code is given."""
    n = len(first_codes)
    return Catalogue(
        item_ids=list(first_codes),
        sids=np.array([[code, k % 16] for k, code in enumerate(first_codes.values())], np.int32),
        codes=16,
        author=np.zeros(n, np.int64),
        tag=np.zeros(n, np.int64),
        duration_ms=np.ones(n, np.float32),
        popularity=np.zeros(n, np.float32),
        titles=[""] * n,
    )


def holdout_of(relevant: list[set[str]], seen: list[set[str]] | None = None) -> Holdout:
    """Held-out requests of users without a history."""
    return Holdout(
        context=cold_context(len(relevant), LIMITS),
        user_ids=[f"u{row}" for row in range(len(relevant))],
        times_ms=np.arange(len(relevant)),
        seen=seen or [set() for _ in relevant],
        relevant=relevant,
    )


def slow_recall(ranking: list[str], wanted: set[str], k: int) -> float:
    return len(set(ranking[:k]) & wanted) / len(wanted)


def slow_dcg(ranking: list[str], wanted: set[str], k: int) -> float:
    return sum(1 / math.log2(rank + 1) for rank, item in enumerate(ranking[:k], start=1) if item in wanted)


def test_accuracy_by_hand() -> None:
    rankings = [["a", "b", "c", "d"], ["a"], ["x", "y"], ["a"]]
    scores = accuracy(rankings, [{"b", "d", "missing"}, {"a"}, {"a"}, set()])
    dcg, best = 1 / math.log2(3) + 1 / math.log2(5), 1 + 1 / math.log2(3) + 1 / math.log2(4)
    for k in CUTOFFS:
        assert scores[f"recall@{k}"] == pytest.approx([2 / 3, 1, 0])  # the request without relevant items is left out
        assert scores[f"ndcg@{k}"] == pytest.approx([dcg / best, 1, 0])


def test_only_the_first_k_places_count() -> None:
    fillers = [f"filler{k}" for k in range(60)]
    scores = accuracy([[*fillers[:10], "a"], [*fillers[:50], "a"], fillers], [{"a"}, {"a"}, set(fillers[:20])])
    assert scores["recall@10"] == pytest.approx([0, 0, 0.5])
    assert scores["recall@50"] == pytest.approx([1, 0, 1])
    assert scores["ndcg@10"] == pytest.approx([0, 0, 1])  # more relevant items than places: a full list is perfect
    assert scores["ndcg@50"] == pytest.approx([1 / math.log2(12), 0, 1])


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(ITEMS), unique=True), st.sets(st.sampled_from(ITEMS), max_size=70)),
        min_size=1,
        max_size=4,
    )
)
def test_accuracy_equals_a_slow_reference(requests: list[tuple[list[str], set[str]]]) -> None:
    scores = accuracy([ranking for ranking, _ in requests], [wanted for _, wanted in requests])
    judged = [(ranking, wanted) for ranking, wanted in requests if wanted]
    for k in CUTOFFS:
        recall = [slow_recall(ranking, wanted, k) for ranking, wanted in judged]
        ndcg = [slow_dcg(r, wanted, k) / slow_dcg(sorted(wanted), wanted, k) for r, wanted in judged]
        assert scores[f"recall@{k}"].tolist() == pytest.approx(recall)
        assert scores[f"ndcg@{k}"].tolist() == pytest.approx(ndcg)


@given(st.lists(st.lists(st.sampled_from([*ITEMS[:12], "unknown"]), unique=True), max_size=4))
def test_density_equals_counting_pairs(rankings: list[list[str]]) -> None:
    first = {item: k % 3 for k, item in enumerate(ITEMS[:12])}
    shares = []
    for ranking in rankings:
        pairs = list(itertools.combinations([first[item] for item in ranking if item in first], 2))
        if pairs:
            shares.append(sum(a == b for a, b in pairs) / len(pairs))
    expected = sum(shares) / len(shares) if shares else 0.0
    assert density(rankings, catalogue_of(first)) == pytest.approx(expected)


def test_describe_counts_what_the_top_ten_show() -> None:
    catalogue = catalogue_of({f"i{k}": 0 if k < 10 else 1 + k % 4 for k in range(40)})
    alike, mixed = [f"i{k}" for k in range(10)], ["i0", "gone", "i11", "i12"]
    rankings = [[*alike, "i39", "never shown"], mixed, []]
    exposures_of = {"i0": 20, "i1": 19, "i2": 500, "gone": 100}
    metrics = describe(rankings, holdout_of([{"i39"}, {"i12", "i13"}, set()]), catalogue, exposures_of)
    assert metrics["requests"] == 2
    assert metrics["recall@10"] == pytest.approx((0 + 1 / 2) / 2)
    assert metrics["recall@50"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["recall@50_low"] <= metrics["recall@50"] <= metrics["recall@50_high"]
    assert metrics["illegal_items"] == 1
    assert metrics["coverage"] == (10 + 1 + 2) / 14  # of 14 places; "gone" is shown and counts, "i39" is on place 11
    warm = 4  # i0 twice, i2, gone
    assert metrics["cold_start_share"] == pytest.approx((14 - warm) / 14)
    assert metrics["density"] == pytest.approx((1 + 0) / 2)


def test_describe_without_anything_to_judge() -> None:
    metrics = describe([[], []], holdout_of([set(), set()]), catalogue_of({"a": 0}), {})
    assert (metrics["requests"], metrics["recall@50"], metrics["coverage"], metrics["density"]) == (0, 0, 0, 0)


def test_comparison_is_paired() -> None:
    """Requests differ much, the two rankings by one item in every request: the interval must be a point."""
    rng = np.random.default_rng(0)
    relevant = [{f"{row}-{k}" for k in range(10)} for row in range(40)]
    rival = [[f"{row}-{k}" for k in range(rng.integers(0, 9))] for row in range(40)]
    better = [[*ranking, f"{row}-9"] for row, ranking in enumerate(rival)]
    interval = compare(better, rival, holdout_of(relevant))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.1, 0.1, 0.1))
    assert interval.pairs == 40
    assert accuracy(rival, relevant)["recall@50"].std() > 0.1
    back = compare(rival, better, holdout_of(relevant), metric="ndcg@10")
    assert back.high < 0


def test_comparison_brackets_the_mean_difference() -> None:
    rng = np.random.default_rng(1)
    relevant = [{"a"} for _ in range(60)]
    ours, theirs = ([["a"] if hit else [] for hit in rng.random(60) < share] for share in (0.6, 0.5))
    interval = compare(ours, theirs, holdout_of(relevant))
    difference = (sum(map(len, ours)) - sum(map(len, theirs))) / 60
    assert interval.mean == pytest.approx(difference)
    assert interval.low < difference < interval.high


def test_evaluation_through_the_recommender(write_bundle, tmp_path: Path) -> None:
    candidate, production = (Recommender(Bundle.load(write_bundle(tmp_path / str(seed), seed=seed))) for seed in (0, 1))
    rng = np.random.default_rng(0)
    ids = candidate.bundle.catalogue.item_ids
    relevant = [set(rng.choice(ids, 4, replace=False).tolist()) for _ in range(12)]
    seen = [set(rng.choice(ids, 30, replace=False).tolist()) - wanted for wanted in relevant]
    holdout = holdout_of(relevant, seen)
    perfect = [sorted(wanted) for wanted in relevant]
    result = evaluate(candidate, production, {"itemknn": perfect}, holdout, holdout, {})
    assert result["candidate"]["illegal_items"] == 0
    assert result["candidate"]["cold_start_share"] == 1
    assert 0 < result["candidate"]["legality"] < 1  # random weights
    assert (result["itemknn"]["recall@10"], result["itemknn"]["ndcg@50"]) == (1, 1)
    assert result["candidate_over_itemknn"]["mean"] == pytest.approx(result["candidate"]["recall@50"] - 1)
    assert "legality" not in result["itemknn"]
    same = evaluate(candidate, candidate, {}, holdout, holdout, {})
    assert min(same[name].pop("latency_ms") for name in ("candidate", "production")) > 0
    assert same["candidate"] == {**same["production"], "over_production_high": 0}
    assert same["candidate_over_production"] == {"mean": 0, "low": 0, "high": 0, "pairs": 12}
    assert "production" not in evaluate(candidate, None, {}, holdout, None, {})
    page = card(json.loads(json.dumps(result)))
    assert all(f"<th>{name}</th>" in page for name in ("candidate", "production", "itemknn"))
    assert f"{result['candidate']['recall@50']:.4f}" in page


def test_one_reward_model_judges_all_lists(write_bundle, random_reward, tmp_path: Path) -> None:
    """The mean P-Score of a list is that of its items asked one by one, and other models' lists have the same judge."""
    bundle = Bundle.load(write_bundle(tmp_path / "bundle"))
    judge = replace(bundle, reward=random_reward(bundle.catalogue))
    ids, holdout = bundle.catalogue.item_ids, holdout_of([set(), set()])
    lists = [ids[:10] + ids[50:], [*ids[3:5], "unknown"]]
    singles = [mean_reward(judge, holdout_of([set()]), [[item]]) for item in (*ids[:10], *ids[3:5])]
    assert mean_reward(judge, holdout, lists) == pytest.approx(np.mean(singles), rel=1e-5)
    rivals = {"popularity": lists, "itemknn": lists}
    result = evaluate(Recommender(judge), Recommender(bundle), rivals, holdout, holdout, {})
    assert result["popularity"]["reward"] == pytest.approx(np.mean(singles), rel=1e-5)
    assert result["production"]["reward"] == pytest.approx(result["candidate"]["reward"]), "the same weights"
    assert result["candidate"]["reward_lift"] == result["candidate"]["reward"] / result["popularity"]["reward"]
    assert "latency_ms" not in card(result), "the card names a stage by its content"


def test_what_was_seen_is_not_recommended(write_bundle, tmp_path: Path) -> None:
    candidate = Recommender(Bundle.load(write_bundle(tmp_path / "bundle")))
    ids = candidate.bundle.catalogue.item_ids
    holdout = holdout_of([{ids[0]}, {ids[1]}])
    everything_but_one = replace(holdout, seen=[set(ids) - {ids[0]}, set(ids) - {ids[1]}])
    assert evaluate(candidate, None, {}, everything_but_one, None, {})["candidate"]["recall@10"] == 1
