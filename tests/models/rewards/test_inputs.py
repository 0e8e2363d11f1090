import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.schema import FLAGS
from models.rewards.inputs import (
    NUMBERS,
    PLAYED,
    SEARCHES,
    item_numbers,
    rate_ratio,
    search_names,
    searches,
    totals,
    totals_before,
)

EVENT = st.tuples(st.integers(-1, 3), st.integers(0, 6), st.integers(0, 1), st.integers(0, 1))


@settings(max_examples=150)
@given(st.lists(EVENT, min_size=0, max_size=40))
def test_the_record_counts_strictly_earlier_exposures_of_the_item(events) -> None:
    item, time, first, second = np.array(events, np.int64).reshape(-1, 4).T
    values = np.stack([first, second], 1).astype(float)
    found = totals_before(item, time, values)
    for row in range(len(events)):
        earlier = (item == item[row]) & (time < time[row]) & (item[row] >= 0)
        assert found[row].tolist() == [earlier.sum(), *values[earlier].sum(0)]
    everything = totals(item, values, 4)
    for each in range(4):
        assert everything[each].tolist() == [(item == each).sum(), *values[item == each].sum(0)]


def test_an_unknown_item_is_average_and_evidence_moves_it() -> None:
    rates = np.full(1 + len(FLAGS), 0.1)
    counts = np.zeros((3, 2 + len(FLAGS)))
    counts[1] = [1000, *[500] * (1 + len(FLAGS))]
    counts[2] = [1000, *[1] * (1 + len(FLAGS))]
    numbers = item_numbers(counts, np.full(3, 20_000.0), rates)
    assert numbers.shape == (3, len(NUMBERS))
    np.testing.assert_allclose(numbers[0, 2:], 0, atol=1e-6)
    assert (numbers[1, 2:] > 1).all()
    assert (numbers[2, 2:] < -1).all()
    assert (rate_ratio(counts[:, 1:], counts[:, :1], np.zeros(1 + len(FLAGS))) > 0).all()


def test_searches_find_what_is_alike_and_leave_the_positive_pathway_out(shop, contexts) -> None:
    context = contexts(2)
    items = shop.items(np.array([[0, 1, 2], [3, 4, -1]]))
    rates = torch.full((len(FLAGS),), 0.2)
    found = searches(context, items, rates).unflatten(-1, (len(SEARCHES), -1))
    names = search_names()[: found.shape[-1]]
    seen = context.kind != 1
    for b in range(2):
        for t in range(3):
            same = [seen] + [
                seen & (theirs[b] == mine[b, t]) & (mine[b, t] > 0)
                for theirs, mine in (
                    (context.tag, items.tag),
                    (context.author, items.author),
                    (context.sids[..., 0], items.sids[..., 0]),
                )
            ]
            for search, match in enumerate(same):
                assert found[b, t, search, 0] * 3 == match.sum().float().log1p()
                play = context.numeric[b, match, 2]
                expected = play.mean() if len(play) else torch.tensor(0.0)
                torch.testing.assert_close(found[b, t, search, names.index("any/play_ratio")], expected)
    assert not found[1, 2, 1:].any()  # padding is like nothing
    assert len(PLAYED) == 2
