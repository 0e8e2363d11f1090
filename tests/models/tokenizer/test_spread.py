import numpy as np

from models.tokenizer.spread import Spread


def cloud() -> np.ndarray:
    """500 rows, nearly all of their variance in two of eight directions, far from the origin."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    return ((rng.normal(size=(500, 8)) * [9, 5, 1, 1, 1, 1, 1, 0.5]) @ turn + 3).astype(np.float32)


def used(x: np.ndarray) -> float:
    """Effective number of directions."""
    variance = np.linalg.eigvalsh(np.cov(x.T))
    return float(variance.sum() ** 2 / (variance**2).sum())


def test_more_power_uses_more_directions() -> None:
    x = cloud()
    directions = [used(Spread.fit(x, power)(x)) for power in (0, 0.5, 1)]
    assert directions[0] < directions[1] < directions[2]
    assert directions[2] > 7


def test_rows_are_unit_and_new_rows_are_treated_alike() -> None:
    x = cloud()
    spread = Spread.fit(x, 0.5)
    assert np.allclose(np.linalg.norm(spread(x), axis=1), 1, atol=1e-5)
    assert np.allclose(spread(x[:7]), spread(x)[:7], atol=1e-5)
    assert spread(x[:0]).shape == (0, 8)


def test_turning_the_space_turns_the_result() -> None:
    x = cloud()
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    turned = (x @ turn).astype(np.float32)
    assert np.allclose(Spread.fit(turned, 0.5)(turned), Spread.fit(x, 0.5)(x) @ turn, atol=1e-4)


def test_equal_rows_stay_equal_and_finite() -> None:
    x = np.ones((5, 4), np.float32)
    assert np.abs(Spread.fit(x, 0.5)(x)).max() < 1e-3
