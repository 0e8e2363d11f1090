import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.objectives.dpo import dpo_loss, self_hard

NAN = float("nan")
LOG_P = st.floats(-30, 0)


def loss_of(winner: float, losers: list[float], references: list[float], **options) -> float:
    reference = torch.tensor(references)
    value, _ = dpo_loss(torch.tensor([winner]), torch.tensor([losers]), reference[:1], reference[None, 1:], **options)
    return float(value)


@settings(max_examples=100)
@given(LOG_P, LOG_P, LOG_P, LOG_P)
def test_swapping_winner_and_loser_turns_the_margin_around(a: float, b: float, ra: float, rb: float) -> None:
    beta = 0.3
    margin = beta * ((a - ra) - (b - rb))
    forward, backward = loss_of(a, [b], [ra, rb], beta=beta), loss_of(b, [a], [rb, ra], beta=beta)
    assert forward == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4, abs=1e-5)
    assert backward - forward == pytest.approx(margin, rel=1e-3, abs=1e-4)


@settings(max_examples=50)
@given(LOG_P, st.lists(LOG_P, min_size=1, max_size=5), st.lists(LOG_P, min_size=6, max_size=6))
def test_another_loser_makes_it_harder(winner: float, losers: list[float], references: list[float]) -> None:
    """S-DPO: -log sigmoid(-log sum exp): not easier than any of its pairs alone; one loser twice adds log 2 inside."""
    references = references[: len(losers) + 1]
    together = loss_of(winner, losers, references)
    alone = [loss_of(winner, [loser], [references[0], r]) for loser, r in zip(losers, references[1:], strict=True)]
    assert together >= max(alone) - 1e-5


def test_at_the_reference_every_pair_costs_log_two_and_pulls_them_apart() -> None:
    winner, losers = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([[-3.0], [-1.0]], requires_grad=True)
    value, metrics = dpo_loss(winner, losers, winner.detach(), losers.detach())
    value.backward()
    assert float(value.detach()) == pytest.approx(math.log(2))
    assert winner.grad is not None
    assert losers.grad is not None
    assert (winner.grad < 0).all()
    assert (losers.grad > 0).all()
    assert metrics["dpo/requests"] == 2


def test_missing_references_and_unusable_pairs_are_left_out() -> None:
    winner = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    losers = torch.tensor([[-2.0, -5.0], [-2.0, -2.0], [-2.0, -2.0]], requires_grad=True)
    reference = losers.detach().clone()
    reference[0, 1] = NAN
    usable = torch.tensor([[True, True], [False, False], [True, True]])
    references = torch.tensor([-1.0, -1.0, NAN])
    value, metrics = dpo_loss(winner, losers, references, reference, usable)
    assert float(value.detach()) == pytest.approx(math.log(2))
    assert metrics["dpo/requests"] == 1
    value.backward()
    assert losers.grad is not None
    assert losers.grad.isfinite().all()
    assert losers.grad[0, 0] > 0
    assert not losers.grad[1:].any()
    nothing, metrics = dpo_loss(winner, losers, references, reference, torch.zeros(3, 2))
    (gradient,) = torch.autograd.grad(nothing, losers)
    assert nothing == 0
    assert not gradient.any()
    assert metrics["dpo/accuracy"] == 0


def test_best_against_worst() -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.4] * 4, [NAN, 0.2, 0.1, 0.3]])
    found = self_hard(rewards, losers=2)
    assert found.winner[0] == 1
    assert found.losers[0].tolist() == [0, 3]
    assert found.usable.tolist() == [[True, True], [False, False], [True, True]]
    assert found.winner[2] == 3
    assert found.losers[2].tolist() == [2, 1]
    masked = self_hard(rewards, torch.tensor([[True, False, False, False], [False] * 4, [True] * 4]))
    assert masked.usable.tolist() == [[False], [False], [True]]


def test_impossible_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="4 losers need at least 5 answers"):
        self_hard(torch.zeros(2, 4), losers=4)
    with pytest.raises(ValueError, match="beta be positive"):
        loss_of(-1.0, [-2.0], [-1.0, -2.0], beta=0.0)
    with pytest.raises(ValueError, match="losers"):
        dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2))
