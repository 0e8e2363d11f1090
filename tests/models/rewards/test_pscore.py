import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.rewards.pscore import OBJECTIVES, PScore, fused_loss, tower_loss, wanted

X = len(OBJECTIVES)


@pytest.fixture(scope="module")
def model(sizes) -> PScore:
    torch.manual_seed(0)
    return PScore(sizes).eval()


def test_judges_every_item_alone_and_cold_users_too(model, shop, contexts) -> None:
    rows = np.array([[0, 1, 2], [3, 4, 5]])
    for filled in (12, 3, 0):
        context = contexts(2, filled)
        whole = model.judge(context, shop.items(rows))
        assert whole.p.shape == (2, 3)
        assert whole.objectives.shape == (2, 3, X)
        assert ((whole.p > 0) & (whole.p < 1)).all()
        alone = model.judge(context, shop.items(rows[:, 1:2]))
        torch.testing.assert_close(whole.p[:, 1:2], alone.p)
        torch.testing.assert_close(whole.objectives[:, 1:2], alone.objectives)


def test_padding_slots_change_nothing(model, shop, contexts) -> None:
    rows = np.array([[0, 7]])
    context = contexts(1, 5)
    longer = contexts(1, 5)
    longer.numeric[:, 5:] = 9.0
    longer.tag[:, 5:] = 3
    torch.testing.assert_close(model.judge(context, shop.items(rows)).p, model.judge(longer, shop.items(rows)).p)


def test_history_matters_to_the_score(model, shop, contexts) -> None:
    rows = np.array([[0, 7]])
    some, other = (model.judge(contexts(1, 12, seed), shop.items(rows)).p for seed in (0, 1))
    assert not torch.allclose(some, other, atol=1e-6)


def test_the_final_mlp_sends_no_gradient_into_the_towers(model, shop, contexts) -> None:
    _, fused = model(contexts(2), shop.items(np.array([[0], [1]])))
    fused.sum().backward()
    assert model.fuse[0].weight.grad is not None
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("fuse"))
    model.zero_grad(set_to_none=True)


def test_it_starts_at_the_average_label(sizes) -> None:
    model = PScore(sizes)
    rates = torch.linspace(0.0, 0.9, X)
    model.start(rates)
    torch.testing.assert_close(model.bias.sigmoid(), rates.clamp(min=1e-4), atol=1e-6, rtol=0)


@settings(max_examples=60)
@given(st.integers(0, 1000), st.lists(st.floats(0, 5), min_size=X, max_size=X).filter(lambda w: sum(w) > 0.1))
def test_the_fused_loss_is_the_weighted_sum_over_every_label(seed: int, weights: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    fused, labels = torch.randn(3, 4, generator=generator), torch.rand(3, 4, X, generator=generator).round()
    mask = torch.rand(3, 4, generator=generator) > 0.3
    mask[0, 0] = True
    found = fused_loss(fused, labels, torch.tensor(weights), mask)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        fused[..., None].expand(-1, -1, X), wanted(labels), reduction="none"
    )
    expected = (each * torch.tensor(weights)).sum(-1)[mask].mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_dislike_counts_against_the_item() -> None:
    labels = torch.zeros(1, X)
    labels[0, OBJECTIVES.index("dislike")] = 1
    labels[0, OBJECTIVES.index("like")] = 1
    good = wanted(labels)[0]
    assert good[OBJECTIVES.index("dislike")] == 0
    assert good[OBJECTIVES.index("like")] == 1


def test_a_batch_without_positives_or_items_is_no_accident() -> None:
    logits, labels = torch.randn(2, 3, X, requires_grad=True), torch.zeros(2, 3, X)
    value, parts = tower_loss(logits, labels, torch.ones(2, 3))
    value.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert set(parts) == set(OBJECTIVES)
    nothing, _ = tower_loss(logits, labels, torch.zeros(2, 3))
    assert nothing == 0
    assert fused_loss(logits[..., 0], labels, torch.zeros(X), torch.ones(2, 3)).isfinite()
