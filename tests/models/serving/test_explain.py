"""The explanation against what the recommender really does."""

from dataclasses import replace

import numpy as np
import pytest
from watched import NOW_MS, watched

from features.online import UserFeatures
from models.bundle import Bundle
from models.serving.explain import Question, explain, tree


@pytest.fixture(scope="module")
def bundle(write_bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(write_bundle(tmp_path_factory.mktemp("explained") / "b"))


def user(short: list[str], positive: list[str]) -> UserFeatures:
    return UserFeatures(
        user_id="u",
        static=np.array([5, 0, 0, 0, 0, 0, 0, 0]),
        short=watched(short, labels=0b11),
        positive=watched(positive, labels=0b11),
        lifelong=None,
        expired=("lifelong",),
        pushed_ms=NOW_MS,
    )


def statuses(found: dict) -> dict[str, str]:
    return {item["item_id"]: item["status"] for item in found["items"]}


def test_everything_not_shown_has_its_reason(bundle: Bundle) -> None:
    question = Question(user_id="u", time_ms=NOW_MS, num_items=8, beam_width=512)
    plain = explain(bundle, user(["i1"], ["i2", "gone"]), question)
    assert len(plain["items"]) == 120  # the whole trie fits into the beam
    best = [item["item_id"] for item in plain["items"] if item["status"] == "shown"]
    blocked = replace(bundle, blocked=frozenset([best[0], "ghost"]))
    found = explain(blocked, user(["i1"], ["i2", "gone"]), replace(question, exclude=(best[1], "nobody")))
    why = statuses(found)
    assert (why[best[0]], why[best[1]], why["i1"], why["i2"]) == ("taken down", "excluded", "seen", "seen")
    by_id = {item["item_id"]: item for item in found["items"]}
    assert (by_id["i1"]["detail"], by_id["i2"]["detail"]) == ("short", "positive")
    shown = [item["item_id"] for item in found["items"] if item["status"] == "shown"]
    assert len(shown) == 8
    assert shown[:6] == best[2:]
    assert [by_id[item]["place"] for item in shown] == list(range(1, 9))
    assert sum(status == "not among the best" for status in why.values()) == 120 - 8 - 4


def test_probabilities_are_those_of_the_tree(bundle: Bundle) -> None:
    found = explain(bundle, user(["i1"], []), Question(user_id="u", time_ms=NOW_MS, beam_width=512))
    assert sum(item["probability"] for item in found["items"]) <= 1 + 1e-5
    by_id = {item["item_id"]: item for item in found["items"]}

    def walk(node: dict, sid: list[int]) -> int:
        leaves = 0
        for child in node["children"]:
            assert child["path_p"] == pytest.approx(node["path_p"] * child["p"])
            leaves += walk(child, [*sid, child["code"]])
        for item in node["items"]:
            assert by_id[item]["sid"] == sid
            assert by_id[item]["probability"] == pytest.approx(node["path_p"] * by_id[item]["share_of_sid"], rel=1e-4)
        order = [child["path_p"] for child in node["children"]]
        assert order == sorted(order, reverse=True)
        return leaves + len(node["items"])

    assert walk(found["tree"], []) == len(by_id)


def test_pathways_are_told_newest_first_with_what_the_version_does_not_know(bundle: Bundle) -> None:
    found = explain(bundle, user(["i1", "gone", "i3"], []), Question(user_id="u", time_ms=NOW_MS))
    short, positive, lifelong = found["pathways"]
    assert [event["item_id"] for event in short["events"]] == ["i3", "gone", "i1"]
    assert [event["in_catalogue"] for event in short["events"]] == [True, False, True]
    assert short["events"][0]["feedback"] == ["click", "like"]
    assert short["events"][0]["tags"] == ["t3"]
    assert positive["events"] == lifelong["events"] == []
    assert (found["static"], found["expired"], found["flag"]) == ([5], ["lifelong"], "degraded")


def test_nothing_from_the_future_is_told_or_filtered(bundle: Bundle) -> None:
    found = explain(bundle, user(["i1", "i2"], []), Question(user_id="u", time_ms=NOW_MS - 60_000 + 1, beam_width=512))
    assert [event["item_id"] for event in found["pathways"][0]["events"]] == ["i1"]
    assert statuses(found)["i2"] != "seen"


def test_somebody_of_whom_nothing_can_be_known_gets_the_newcomers_answer(bundle: Bundle) -> None:
    found = explain(bundle, None, Question(user_id="x", time_ms=NOW_MS, num_items=3))
    assert found["flag"] == "features_unavailable"
    assert list(statuses(found).values()).count("shown") == 3


def test_an_empty_tree_is_a_root() -> None:
    assert tree([]) == {"code": None, "p": 1.0, "path_p": 1.0, "children": [], "items": []}
