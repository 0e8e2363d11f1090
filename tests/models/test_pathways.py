import numpy as np
import pytest
import torch

from features.histories.context import Context, Pathway
from features.schema import FLAGS
from models.pathways import NUMERIC, to_tensors


class Items:
    sids = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    author = np.array([7, 8], np.int64)
    tag = np.array([1, 2], np.int64)


def pathway(item: list[list[int]], labels: int = 0) -> Pathway:
    rows = np.array(item, np.int32)
    full = np.full(rows.shape, 2000.0, np.float32)
    return Pathway(
        item=rows, age_s=full * 0 + 60, play_ms=full, duration_ms=full * 2, labels=np.full(rows.shape, labels, np.int32)
    )


def context(short: Pathway) -> Context:
    return Context(static=np.ones((1, 8), np.int64), short=short, positive=pathway([[1]]), lifelong=pathway([[-1, 0]]))


def test_gathers_codes_shifted_by_one_and_zeroes_padding() -> None:
    tensors = to_tensors(context(pathway([[-1, 1]], labels=0b101)), Items())
    assert tensors.mask.tolist() == [[False, True, True, False, True]]
    assert tensors.sids[0, 1].tolist() == [4, 5, 6]
    assert tensors.kind.tolist() == [0, 0, 1, 2, 2]
    assert tensors.author.tolist() == [[0, 8, 8, 0, 7]]
    assert tensors.labels[0, 1].tolist() == [1, 0, 1] + [0] * (len(FLAGS) - 3)
    assert tensors.numeric.shape == (1, 5, len(NUMERIC))
    for name in ("sids", "author", "tag", "numeric", "labels"):
        assert not getattr(tensors, name)[~tensors.mask].any()


def test_more_left_padding_changes_no_behaviour() -> None:
    narrow = to_tensors(context(pathway([[0, 1]])), Items())
    wide = to_tensors(context(pathway([[-1, -1, 0, 1]])), Items())
    torch.testing.assert_close(wide.numeric[wide.mask], narrow.numeric[narrow.mask])
    assert torch.isfinite(wide.numeric).all()


def test_a_context_of_another_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="item row 5 but the catalogue has 2 items"):
        to_tensors(context(pathway([[0, 5]])), Items())
