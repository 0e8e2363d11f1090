import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.rewards.hybrid import hybrid_advantages

STREAM = hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-5, 5))


@settings(max_examples=100, deadline=None)
@given(STREAM, STREAM, st.floats(0, 1))
def test_the_mean_over_both_is_the_wished_mix(feedback, model, share) -> None:
    a, b = hybrid_advantages(feedback, model, model_share=share)
    expected = (1 - share) * feedback.mean() + share * model.mean()
    assert np.concatenate([a, b]).mean() == pytest.approx(expected, abs=1e-4)
    assert (np.sign(a) * np.sign(feedback) >= 0).all()


def test_an_empty_stream_leaves_everything_to_the_other() -> None:
    alone, nothing = hybrid_advantages(np.array([1.0, -1.0]), np.empty(0))
    assert alone.tolist() == [1.0, -1.0]
    assert not nothing.size
    with pytest.raises(ValueError, match="model_share is 2"):
        hybrid_advantages(np.ones(2), np.ones(2), model_share=2)
