import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kserve.errors import InvalidInput

from features.histories.context import cold_context
from models.bundle import Bundle
from models.pathways import to_tensors
from models.serving.protocol import checked_parameters
from models.serving.recommender import Recommender
from models.serving.selection import order_by_reward

SELECTED = ("reward", "stay")


@pytest.fixture(scope="module")
def bundle(
    write_bundle: Callable[..., Path], random_reward: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    plain = Bundle.load(write_bundle(tmp_path_factory.mktemp("bundle")))
    return replace(plain, reward=random_reward(plain.catalogue))


@pytest.mark.parametrize("select", SELECTED)
def test_candidates_come_in_order_of_their_worth(bundle: Bundle, select: str) -> None:
    context = cold_context(3, bundle.limits)
    ids = bundle.catalogue.item_ids
    candidates = [ids[:9], ids[20:24], []]
    found = order_by_reward(bundle, context, candidates, select)
    assert [sorted(order) for order in found] == [list(range(9)), list(range(4)), []]
    assert bundle.reward is not None
    for request, (order, items) in enumerate(zip(found, candidates, strict=True)):
        if items:
            rows = bundle.catalogue.rows(items)[None]
            tensors = to_tensors(context.take(slice(request, request + 1)), bundle.catalogue)
            judged = bundle.reward.judge(tensors, rows, bundle.catalogue)
            told = {"reward": judged.p.numpy(), "stay": bundle.reward.seconds(tensors, rows, bundle.catalogue)}
            worth = told[select][0]
            assert (np.diff(worth[order]) <= 1e-6 * worth.max()).all()
            assert len(np.unique(worth)) > 1


def test_nothing_to_order_is_no_error_and_no_reward_model_is(bundle: Bundle) -> None:
    assert [len(order) for order in order_by_reward(bundle, cold_context(2, bundle.limits), [[], []])] == [0, 0]
    with pytest.raises(ValueError, match="has no reward model"):
        order_by_reward(replace(bundle, reward=None), cold_context(1, bundle.limits), [["i0"]])


def answers(model: Any, **parameters: Any) -> tuple[list[str], list[str]]:
    """(items, flags) of a v1 request for user "a"."""
    payload = {"instances": [{"user_id": "a"}], "parameters": {"num_items": 4, **parameters}}
    answer = asyncio.run(model.predict(payload))
    return answer["predictions"][0]["item_ids"], answer["flags"]


def test_a_server_selects_when_asked_and_says_when_it_could_not(
    predictor: Any, caller: Any, store: Any, tiny_bundle: Bundle, random_reward: Callable
) -> None:
    rewarded = Recommender(replace(tiny_bundle, reward=random_reward(tiny_bundle.catalogue)))
    able = caller(predictor(rewarded), store)
    by_model, _ = answers(able, beam_width=64)
    served = {select: answers(able, beam_width=64, select=select) for select in SELECTED}
    assert len({tuple(by_model), *(tuple(items) for items, _ in served.values())}) == 3
    assert all(len(items) == 4 and "no_reward_model" not in flags for items, flags in served.values())
    older = replace(random_reward(tiny_bundle.catalogue), stay=None)
    for reward, select in ((None, "reward"), (None, "stay"), (older, "stay")):
        unable = caller(predictor(Recommender(replace(tiny_bundle, reward=reward))), store)
        plain, flags = answers(unable, beam_width=64, select=select)
        assert plain == by_model
        assert "no_reward_model" in flags


@pytest.mark.parametrize(
    "wrong",
    [{"select": "luck"}, {"select": 3}, {"select": "reward", "mode": "sample"}, {"select": "stay", "mode": "session"}],
)
def test_a_wrong_selection_is_the_callers_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="parameter select is"):
        checked_parameters(wrong)
    assert checked_parameters({"select": "reward"})[0].select == "reward"
