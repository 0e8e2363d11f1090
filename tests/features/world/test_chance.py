"""Counter-based random numbers: uniform, reproducible, independent of shape."""

import numpy as np
from scipy.stats import kstest

from features.world.chance import uniforms


def test_numbers_depend_on_the_keys_alone() -> None:
    table = uniforms(3, np.arange(50)[:, None], np.arange(40))
    assert table.shape == (50, 40)
    assert table[7, 5] == uniforms(3, 7, 5)[0]
    assert len(np.unique(table)) == table.size
    assert uniforms(3, 7, -5)[0] != uniforms(3, 7, 5)[0]


def test_numbers_are_uniform_and_uncorrelated_along_every_key() -> None:
    table = uniforms(1, np.arange(300)[:, None], np.arange(300))
    assert kstest(table.ravel(), "uniform").pvalue > 1e-3
    for neighbours in (table[1:] * 12**0.5, table[:, 1:] * 12**0.5):
        first = (table[: neighbours.shape[0], : neighbours.shape[1]] - 0.5) * 12**0.5
        assert abs((first * (neighbours - 0.5 * 12**0.5)).mean()) < 5 / len(first.ravel()) ** 0.5
