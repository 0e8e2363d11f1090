"""What roll-outs are worth, and which of a judged group are learned from."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.histories.context import cold_context
from models.bundle import Bundle
from models.pathways import to_tensors
from models.training.alignment import Worth
from models.training.groups import Judged, rewarded
from models.training.rollouts import Samples

GROUP = 12


@given(st.integers(0, 2**31), st.integers(2, GROUP), st.floats(0, 0.5))
def test_extremes_are_the_best_and_the_worst(seed: int, count: int, missing: float) -> None:
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random((3, GROUP)) >= missing)
    advantages = torch.from_numpy(rng.normal(size=(3, GROUP)).astype(np.float32)) * mask
    tokens = torch.from_numpy(rng.integers(0, 9, (3, GROUP, 2)))
    samples = Samples(
        tokens=tokens,
        log_probs=-tokens.float(),
        items=tokens[..., 0].numpy(),
        push=np.zeros(3, int),
        staleness=np.zeros(3, int),
        seconds=0.0,
    )
    judged = Judged(
        rewards=advantages,
        advantages=advantages,
        mask=mask,
        format_advantages=torch.zeros(3, GROUP),
        format_mask=torch.zeros(3, GROUP, dtype=torch.bool),
        metrics={},
    )
    chosen = judged.extremes(count)
    assert chosen.shape == (3, count)
    left, kept = judged.take(chosen), samples.take(chosen)
    for row in range(3):
        assert len(set(chosen[row].tolist())) == count
        ordered = advantages[row].sort().values
        worst, best = count // 2, count - count // 2
        wanted = torch.cat([ordered[:worst], ordered[GROUP - best :]])
        assert torch.equal(left.advantages[row].sort().values, wanted.sort().values)
        assert torch.equal(kept.tokens[row], tokens[row][chosen[row]])
        assert (kept.items[row] == tokens[row, :, 0].numpy()[chosen[row]]).all()
        assert torch.equal(left.mask[row], mask[row][chosen[row]])


def test_a_roll_out_is_worth_what_is_configured(write_bundle, random_reward, tmp_path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path))
    reward, items = random_reward(bundle.catalogue), np.array([[3, -1, 7], [0, 1, -1]])
    context, none = to_tensors(cold_context(2, bundle.limits), bundle.catalogue), np.zeros(2, int)
    score, seconds = (rewarded(reward, bundle.catalogue, by)(context, items, none) for by in get_args(Worth))
    there = items >= 0
    np.testing.assert_allclose(score[there], reward.judge(context, items, bundle.catalogue).p.numpy()[there])
    np.testing.assert_allclose(seconds[there], reward.seconds(context, items, bundle.catalogue)[there])
    assert np.isnan(score[~there]).all()
    assert np.isnan(seconds[~there]).all()
    with pytest.raises(ValueError, match="knows no seconds"):
        rewarded(replace(reward, stay=None), bundle.catalogue, "stay")
