"""Selecting from the beam by the bundle's reward model."""

from dataclasses import replace

import numpy as np
import pytest

from features.histories.context import cold_context
from models.bundle import Bundle
from models.serving.recommender import Recommender


@pytest.fixture(scope="module")
def bundle(write_bundle, random_reward, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    plain = Bundle.load(write_bundle(tmp_path_factory.mktemp("bundle")))
    return replace(plain, reward=random_reward(plain.catalogue))


def test_the_best_judged_of_the_beam_come_first(bundle: Bundle) -> None:
    context = cold_context(40, bundle.limits)  # more than one chunk
    recommender = Recommender(bundle)
    beam = recommender.recommend(context, num_items=32, beam_width=32)
    chosen = recommender.recommend(context, num_items=5, beam_width=32, select="reward")
    assert bundle.reward is not None
    for wide, answer in zip(beam, chosen, strict=True):
        assert len(answer) == 5
        assert set(answer.item_ids) <= set(wide.item_ids)
        rows = [wide.item_ids.index(item) for item in answer.item_ids]
        np.testing.assert_array_equal(answer.sids, wide.sids[rows])
        np.testing.assert_array_equal(answer.log_probs, wide.log_probs[rows])
        np.testing.assert_array_equal(answer.scores, wide.scores[rows])
    first = [answer.item_ids for answer in chosen]
    assert first[0] != beam[0].item_ids[:5]
    assert all(items == first[0] for items in first)  # all users are alike


def test_without_a_reward_model_the_beam_answers(bundle: Bundle) -> None:
    context = cold_context(2, bundle.limits)
    recommender = Recommender(replace(bundle, reward=None))
    plain, asked = (recommender.recommend(context, num_items=5, beam_width=32, select=s) for s in ("model", "reward"))
    assert [answer.item_ids for answer in plain] == [answer.item_ids for answer in asked]
    assert recommender.flags("reward") == ["no_reward_model"]
    assert recommender.flags("model") == Recommender(bundle).flags("reward") == []


def test_selection_is_for_beams_only_and_has_two_kinds(bundle: Bundle) -> None:
    recommender, context = Recommender(bundle), cold_context(1, bundle.limits)
    with pytest.raises(ValueError, match="select is 'luck'"):
        recommender.recommend(context, num_items=5, beam_width=8, select="luck")
    with pytest.raises(ValueError, match="mode 'beam'"):
        recommender.recommend(context, num_items=5, beam_width=8, mode="sample", select="reward")


def test_nothing_left_to_show_stays_nothing(bundle: Bundle) -> None:
    everything = [set(bundle.catalogue.item_ids)]
    (answer,) = Recommender(bundle).recommend(
        cold_context(1, bundle.limits), num_items=5, beam_width=8, exclude=everything, select="reward"
    )
    assert len(answer) == 0
