import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.rewards.hybrid import hybrid_weights


@settings(max_examples=50)
@given(st.integers(1, 1000), st.integers(1, 1000), st.floats(0, 1))
def test_the_means_are_mixed_at_the_share_however_long_the_streams(feedback, model, share) -> None:
    a, b = hybrid_weights(feedback, model, model_share=share)
    assert a + b == pytest.approx(1)
    assert b == pytest.approx(share)


def test_an_empty_stream_leaves_everything_to_the_other() -> None:
    assert hybrid_weights(7, 0, model_share=0.9) == (1, 0)
    assert hybrid_weights(0, 7, model_share=0.1) == (0, 1)
    assert hybrid_weights(0, 0) == (0, 0)
    with pytest.raises(ValueError, match="model_share is 2"):
        hybrid_weights(1, 1, model_share=2)
