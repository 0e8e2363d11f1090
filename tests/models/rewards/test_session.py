import numpy as np
import pytest
import torch

from models.rewards.pscore import OBJECTIVES
from models.rewards.session import SESSION_OBJECTIVES, SessionReward, session_labels, session_loss, session_reward


@pytest.fixture(scope="module")
def model(sizes) -> SessionReward:
    torch.manual_seed(0)
    return SessionReward(sizes).eval()


def test_a_list_is_judged_as_a_set_and_padding_is_nothing(model, shop, contexts) -> None:
    context = contexts(1)
    rows = np.array([[3, 1, 4, 7]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    judged = model.judge(context, shop.items(rows), mask)
    torch.testing.assert_close(judged, model.judge(context, shop.items(rows[:, [2, 0, 3, 1]]), mask))
    real = torch.tensor([[True] * 4 + [False] * 2])
    padded = model.judge(context, shop.items(np.array([[3, 1, 4, 7, -1, -1]])), real)
    torch.testing.assert_close(judged, padded)


def test_items_are_judged_together(model, shop, contexts) -> None:
    """Self-attention: what one item adds to the sum before the towers depends on the others."""
    seen: list[torch.Tensor] = []
    handle = model.towers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for rows in ([9, 1], [1], [9, 2], [2]):
        model(contexts(1), shop.items(np.array([rows])), torch.ones(1, len(rows), dtype=torch.bool))
    handle.remove()
    alone = [2 * pair - single for pair, single in zip(seen[::2], seen[1::2], strict=True)]  # item 9's part of the mean
    assert not torch.allclose(alone[0][:, :-1], alone[1][:, :-1], atol=1e-5)


def test_an_empty_session_is_finite_and_teaches_nothing(model, shop, contexts) -> None:
    mask = torch.tensor([[True, True], [False, False]])
    logits = model(contexts(2), shop.items(np.array([[1, 2], [-1, -1]])), mask)
    assert logits.isfinite().all()
    loss = session_loss(logits, torch.zeros(2, len(SESSION_OBJECTIVES)), mask)
    alone = session_loss(logits[:1], torch.zeros(1, len(SESSION_OBJECTIVES)), mask[:1])
    torch.testing.assert_close(loss, alone)
    assert session_loss(logits, torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.bool)) == 0


def test_labels_of_a_session() -> None:
    labels = torch.zeros(1, 3, len(OBJECTIVES))
    labels[0, 0, OBJECTIVES.index("long_view")] = 1
    labels[0, 1, OBJECTIVES.index("like")] = 1
    labels[0, 2, OBJECTIVES.index("follow")] = 1  # masked
    found = session_labels(labels, torch.tensor([[60.0, 30.0, 999.0]]), torch.tensor([[True, True, False]]))
    assert found.tolist() == [[0.75, 0.5, 0.0, 1.0]]
    assert session_reward(torch.ones(2, 4)).tolist() == [1.0, 1.0]
    assert session_reward(torch.tensor([[1.0, 0, 0, 0]])).item() == pytest.approx(1 / 3)
