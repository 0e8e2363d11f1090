import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from models.rewards.measures import auc, auc_interval, calibration_error, platt, probability

PAIRS = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=60)


@settings(max_examples=150)
@given(PAIRS)
def test_auc_is_scikit_learns_with_ties(pairs) -> None:
    labels, scores = np.array(pairs, float).T
    if labels.min() == labels.max():
        assert np.isnan(auc(labels, scores))
    else:
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))


def test_the_interval_holds_the_value_and_widens_when_users_repeat_themselves() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=400)
    labels = scores + rng.normal(size=400) * 2 > 0
    alone = auc_interval(labels, scores, np.arange(400))
    assert alone.low < alone.value < alone.high
    assert alone.positives == labels.sum()
    repeated = auc_interval(np.tile(labels, 4), np.tile(scores, 4), np.tile(np.arange(400), 4))
    assert repeated.value == pytest.approx(alone.value)
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.25)


def test_too_few_positives_are_said_not_guessed() -> None:
    found = auc_interval(np.arange(100) < 3, np.arange(100.0), np.arange(100))
    assert np.isnan(found.value)
    assert found.positives == 3
    assert platt(np.arange(100.0), (np.arange(100) < 3).astype(float)) == (1.0, 0.0)


def test_calibration_mends_probabilities_and_keeps_the_order() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=20_000)
    labels = rng.random(20_000) < probability(logits, 2.0, -1.0)
    scale, shift = platt(logits, labels)
    assert scale == pytest.approx(2, rel=0.1)
    assert shift == pytest.approx(-1, abs=0.1)
    before, after = (calibration_error(probability(logits, *c), labels) for c in ((1.0, 0.0), (scale, shift)))
    assert after < 0.02 < before
    assert auc(labels, probability(logits, scale, shift)) == auc(labels, logits)
