"""Alignment in this process on a log where every user likes one tag, which is the first code of an item's SID."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from features.histories.windows import Limits
from features.schema import ITEM, conform
from models.architectures import model_of
from models.pathways import to_tensors
from models.training.alignment import AlignConfig
from models.training.data import Batches, Contexts, RunData
from models.training.on_policy import Alignment, Asked, Logged, Rollouts, Step, align_on_rollouts
from models.training.rollouts import InProcessSampler

TAGS = 4
QUICK = AlignConfig(
    objective="ecpo",
    signal="rollouts",
    group=16,
    rollout_requests=8,
    push_every=1,
    learning_rate=1e-2,
    warmup_steps=2,
    max_steps=20,
    log_every=1,
    threads=1,
    checkpoint_every=1000,
)


@pytest.fixture(scope="module")
def world(log) -> SimpleNamespace:
    """The log's requests, who asked, and what is good for them."""
    data = RunData.load(log.folder)
    contexts = Contexts(data, log.catalogue, Limits(short=5, positive=5, lifelong=8))
    user = contexts.requests.user[contexts.trainable]
    tags = np.array([int(name[1:]) for name in contexts.requests.users.to_pylist()]) % TAGS
    return SimpleNamespace(data=data, contexts=contexts, catalogue=log.catalogue, likes=tags[user], log=log)


def policy(model_config, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return model_of(replace(model_config, dropout=0.0))


def rollouts(world, model, config: AlignConfig, reward: Callable | None = None) -> Rollouts:
    def liked(context, items, requests) -> np.ndarray:
        return np.where(items % TAGS == world.likes[requests][:, None], 1.0, 0.2)

    chosen = world.contexts.trainable
    return Rollouts(
        asked=Asked(count=len(chosen), of=lambda rows: world.contexts.of(chosen[rows])),
        reward=reward or liked,
        sampler=InProcessSampler(model, world.catalogue, config.draw, every=config.push_every),
        catalogue=world.catalogue,
    )


def logged(world, model) -> Callable[[int], Logged]:
    """The log's batches; long views are good, all others neutral, and nobody logged a probability."""
    batches = Batches(world.data, world.contexts, world.catalogue, ~world.data.held_out, batch_requests=16)
    good = world.data.column("long_view")

    def batch(number: int) -> Logged:
        found = batches(number % len(batches))
        mask, rows = torch.from_numpy(found.items >= 0), np.maximum(found.exposures, 0)
        sids = torch.from_numpy(world.catalogue.sids.astype(np.int64)[np.maximum(found.items, 0)])
        return Logged(
            context=to_tensors(found.context, world.catalogue),
            targets=torch.where(mask[..., None], sids, -1),
            mask=mask,
            weights=mask.float(),
            advantages=torch.from_numpy(good[rows]).float() * mask,
            old_log_probs=torch.full(sids.shape, torch.nan),
        )

    return batch


def expected_reward(world, model, config: AlignConfig) -> float:
    """Of what the policy draws now, for all requests."""
    given = rollouts(world, model, config)
    given.sampler.advance(model, 0)
    requests = np.arange(given.asked.count)
    samples = given.sampler.draw(given.asked.of(requests), 32, seed=5)
    return float(given.reward(None, samples.items, requests)[samples.valid].mean())


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("grpo", {}),
        ("ecpo", {"push_every": 4}),
        ("gbpo", {}),
        ("gbpo", {"search": "beam", "constrained": False}),
        ("s-dpo", {"beta": 1.0}),
    ],
)
def test_every_objective_learns_what_the_reward_says(world, model_config, objective, changes) -> None:
    config = replace(QUICK, objective=objective, **changes)
    model = policy(model_config)
    before = expected_reward(world, model, QUICK)
    found = align_on_rollouts(model, config, rollouts=rollouts(world, model, config))
    assert expected_reward(world, model, QUICK) > before + 0.03
    history = found["history"]
    assert len(history) == found["step"] == 20
    last = history[-1]
    named = {"kl", "kl_pretrained", "entropy", "advantage_std", "active_share", "log_ratio_max"}
    assert {f"policy/{name}" for name in named} <= set(last)
    assert last["policy/kl_pretrained"] > 0
    assert {each["rollouts/staleness"] for each in history} == set(range(config.push_every))
    assert 0 < last["rollouts/wait_share"] < 1
    assert last["rollouts/samples_per_s"] > 0


def test_the_best_and_the_worst_of_a_group_are_enough_to_learn_from(world, model_config) -> None:
    config, model = replace(QUICK, learned=4), policy(model_config)
    before = expected_reward(world, model, QUICK)
    found = align_on_rollouts(model, config, rollouts=rollouts(world, model, config))
    assert expected_reward(world, model, QUICK) > before + 0.03
    assert found["examples"] == 20 * 8 * 4, "the others are judged and cost no backward pass"


def test_dpo_tells_the_best_of_the_beam_from_the_worst(world, model_config) -> None:
    config = replace(QUICK, objective="dpo", beta=1.0, max_steps=15)
    model = policy(model_config)
    history = align_on_rollouts(model, config, rollouts=rollouts(world, model, config))["history"]
    assert (history[0]["dpo/margin"], history[0]["dpo/requests"]) == (0, 8)  # the reference is the model at the start
    assert history[-1]["dpo/margin"] > 0.5
    assert history[-1]["dpo/accuracy"] > 0.8


def test_ecpo_is_grpo_while_nothing_is_stale(world, model_config) -> None:
    found = []
    for objective in ("ecpo", "grpo"):
        model = policy(model_config)
        config = replace(QUICK, objective=objective, max_steps=4)
        align_on_rollouts(model, config, rollouts=rollouts(world, model, config))
        found.append(weights(model))
    assert torch.equal(*found)


def test_dropout_makes_no_ratio(world, model_config) -> None:
    model = model_of(replace(model_config, dropout=0.5))
    given = replace(QUICK, max_steps=1)
    found = align_on_rollouts(model, given, rollouts=rollouts(world, model, given), logged=logged(world, model))
    assert found["ecpo/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert found["policy/kl_pretrained"] == pytest.approx(0, abs=1e-6)
    assert model.training


@pytest.mark.parametrize("objective", ["grpo", "ecpo", "gbpo", "dpo", "s-dpo"])
@pytest.mark.parametrize("value", [0.7, math.nan, math.inf], ids=["equal", "missing", "infinite"])
def test_a_step_in_which_no_reward_tells_anything_moves_nothing(world, model_config, objective, value) -> None:
    model = policy(model_config)
    before = weights(model)
    config = replace(QUICK, objective=objective, max_steps=2)
    given = rollouts(world, model, config, lambda context, items, requests: np.full(items.shape, value))
    found = align_on_rollouts(model, config, rollouts=given)
    assert torch.equal(weights(model), before)
    assert (found["loss"], found["rollouts/flat_share"], found["rollouts/positives"]) == (0, 1, 0)


def test_some_rewards_missing_leave_the_others(world, model_config) -> None:
    def half(context, items, requests) -> np.ndarray:
        return np.where(items % 2 == 0, np.nan, items / 60.0)

    model = policy(model_config)
    before = weights(model)
    found = align_on_rollouts(model, replace(QUICK, max_steps=2), rollouts=rollouts(world, model, QUICK, half))
    assert not torch.equal(weights(model), before)
    assert math.isfinite(found["grad_norm"])
    with pytest.raises(ValueError, match="one for each"):
        align_on_rollouts(model, QUICK, rollouts=rollouts(world, model, QUICK, lambda *_: np.zeros(3)))


def test_logged_exposures_anchor_and_both_streams_mix_at_the_share(world, model_config) -> None:
    values = {}
    for share in (0.0, 0.25, 1.0):
        model = policy(model_config)
        config = replace(QUICK, objective="gbpo", signal="hybrid", model_share=share, max_steps=1)
        objective = Alignment(model, config, rollouts(world, model, config))
        step = Step(number=0, logged=logged(world, model)(0))
        loss = objective(model, step)
        values[share] = float(loss.value.detach()) - loss.metrics["ntp"]
        assert loss.metrics["feedback/gbpo/logged_share"] == 0  # nobody logged probabilities: the current ones stand in
        assert loss.metrics["feedback/gbpo/positives"] > 0
        assert loss.metrics["gbpo/logged_share"] == 1
    assert values[0.25] == pytest.approx(0.75 * values[0.0] + 0.25 * values[1.0], abs=1e-5)
    for signal, share in (("exposures", 0.0), ("rollouts", 1.0)):
        model = policy(model_config)
        config = replace(QUICK, objective="gbpo", signal=signal)
        objective = Alignment(model, config, rollouts(world, model, config) if config.rolls_out else None)
        loss = objective(model, Step(number=0, logged=logged(world, model)(0)))
        assert float(loss.value.detach()) - loss.metrics["ntp"] == pytest.approx(values[share], abs=1e-5)


def test_no_positives_and_no_advantages_leave_the_anchor_alone(world, model_config) -> None:
    model = policy(model_config)
    config = replace(QUICK, objective="gbpo", signal="exposures")
    batch = logged(world, model)(0)
    for advantage in (0.0, math.nan):
        empty = replace(batch, advantages=torch.full_like(batch.advantages, advantage))
        loss = Alignment(model, config, None)(model, Step(number=0, logged=empty))
        assert float(loss.value.detach()) == pytest.approx(loss.metrics["ntp"])


def test_the_format_reward_restores_legality(world, model_config) -> None:
    config = replace(QUICK, constrained=False, format="random", format_weight=1.0, max_steps=20)
    model = policy(model_config)
    given = rollouts(world, model, config, lambda context, items, requests: np.full(items.shape, np.nan))
    history = align_on_rollouts(model, config, rollouts=given)["history"]
    assert history[0]["rollouts/legality"] < 0.5  # tags are 4 of 8 first codes, and few of the others name an item
    assert history[-1]["rollouts/legality"] > history[0]["rollouts/legality"] + 0.2
    assert 0 < history[0]["format/kept_share"] < 1


RULE = """
[[rule]]
name = "first"
attribute = "tag"
values = ["t0"]
"""
DAMPED, BOOSTED = f"{RULE}target_share = 0.05\n", f"{RULE}target_share = 0.9\n"


def test_industrial_rules_move_their_kind_the_more_the_stronger_they_are(world, model_config) -> None:
    def shown(rules: str) -> float:
        """The kind's share of what the policy draws after training with ``rules``."""
        config, model = replace(QUICK, rules=rules, max_steps=12), policy(model_config)
        given = rollouts(world, model, config, lambda context, items, requests: np.where(items % 7 == 0, 0.8, 1.0))
        align_on_rollouts(model, config, rollouts=replace(given, items=conform(world.data.items, ITEM)))
        given.sampler.advance(model, 0)
        drawn = given.sampler.draw(given.asked.of(np.arange(100)), 16, seed=1).items
        return float((drawn % TAGS == 0).mean())

    strong, weak, none = (shown(rules) for rules in (f"{DAMPED}alpha = 0.1", f"{DAMPED}alpha = 0.9", ""))
    assert strong < 0.95 * weak
    assert weak < 0.95 * none
    assert shown(f"{BOOSTED}boost = 1.5") > 1.1 * none


def test_rules_need_the_items_they_are_about(world, model_config) -> None:
    config, model = replace(QUICK, rules=f"{DAMPED}alpha = 0.1"), policy(model_config)
    with pytest.raises(ValueError, match="ITEM rows of all 60"):
        align_on_rollouts(model, config, rollouts=rollouts(world, model, config))


def test_parts_of_a_step_share_its_roll_outs(world, model_config) -> None:
    asked = []

    def reward(context, items, requests) -> np.ndarray:
        asked.append(len(requests))
        return np.zeros(items.shape)

    model = policy(model_config)
    config = replace(QUICK, accumulate=2, max_steps=2, push_every=2)
    align_on_rollouts(model, config, rollouts=rollouts(world, model, config, reward))
    assert asked == [4] * 4


def test_what_cannot_be_aligned_is_refused(world, model_config) -> None:
    model = policy(model_config)
    with pytest.raises(ValueError, match="needs roll-outs"):
        align_on_rollouts(model, QUICK, logged=logged(world, model))
    with pytest.raises(ValueError, match="nothing to learn"):
        align_on_rollouts(model, QUICK)
    nobody = replace(rollouts(world, model, QUICK), asked=Asked(count=0, of=world.contexts.of))
    with pytest.raises(ValueError, match="no request to roll out"):
        align_on_rollouts(model, QUICK, rollouts=nobody)
