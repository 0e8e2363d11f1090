import torch
import torch.nn.functional as F

from models.objectives.item import item_loss


def test_equals_cross_entropy_of_every_target() -> None:
    torch.manual_seed(0)
    logits, items, weights = torch.randn(3, 7), torch.randint(0, 7, (3, 2)), torch.rand(3, 2)
    each = F.cross_entropy(logits[:, None].expand(-1, 2, -1).flatten(0, 1), items.flatten(), reduction="none").view(
        3, 2
    )
    torch.testing.assert_close(item_loss(logits, items, weights), (each * weights).sum() / weights.sum())


def test_padding_and_a_batch_of_nothing_but_padding() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    items, weights = torch.tensor([[1, -1], [4, -1]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(item_loss(logits, items, weights), item_loss(logits, items[:, :1], weights[:, :1]))
    empty = item_loss(logits, items, torch.zeros(2, 2))
    torch.autograd.backward(empty)
    assert float(empty.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
