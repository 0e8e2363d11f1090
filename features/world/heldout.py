"""How well a fitted user model predicts days it has not seen: play, long views and returns, predicted against observed.

Play: quantiles of play/duration within each duration bucket, drawn for the very views that happened; long views beside
them. Affinity: deciles of the predicted play percentile. Returns: who comes back the day after an active day. Left out:
calibration of the rarer flags, whose counts on a few days say little.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr

from features.world.responses import BUCKETS, DRAWN_FLAGS, Responses, Views, bucket_of

QUANTILES = (0.25, 0.5, 0.75, 0.9)
MINIMUM_VIEWS = 200
"""A bucket with fewer held-out views is not judged."""


def drawn(responses: Responses, z: np.ndarray, duration_ms: np.ndarray) -> Views:
    """One response of the model to each held-out view, affinity scores ``z`` [n]; the same luck every time."""
    return responses.views(z, duration_ms, np.random.default_rng(0).random((1 + len(DRAWN_FLAGS), len(z))))


def buckets(views: Views, play_ms: np.ndarray, duration_ms: np.ndarray, long_view: np.ndarray) -> list[dict[str, Any]]:
    """Per duration bucket: quantiles of play/duration, share of long views, and the largest gap of the distributions.

    The gap is Kolmogorov and Smirnov's: the largest difference of the two cumulative shares.
    """
    bucket, found = bucket_of(duration_ms), []
    predicted, observed = views.play_ms / duration_ms, play_ms / duration_ms
    for number in range(BUCKETS):
        own = bucket == number
        if own.sum() < MINIMUM_VIEWS:
            continue
        row: dict[str, Any] = {"bucket": number, "views": int(own.sum())}
        for name, ratio in (("predicted", predicted[own]), ("observed", observed[own])):
            row[f"{name}_quantiles"] = np.quantile(ratio, QUANTILES).round(3).tolist()
        row["predicted_long_view"] = float(views.flags["long_view"][own].mean())
        row["observed_long_view"] = float(long_view[own].mean())
        row["gap"] = _gap(predicted[own], observed[own])
        found.append(row)
    return found


def deciles(expected: np.ndarray, views: Views, score: np.ndarray, long_view: np.ndarray) -> list[dict[str, Any]]:
    """By decile of the ``expected`` percentile [n]: its mean and the observed one's, and shares of long views.

    ``score`` [n] is the observed play as a normal score (``features.world.taste.play_score``).
    """
    decile = np.minimum((pd.Series(expected).rank(pct=True).to_numpy() * 10).astype(int), 9)
    return [
        {
            "rows": int((decile == k).sum()),
            "predicted_percentile": float(expected[decile == k].mean()),
            "observed_percentile": float(ndtr(score[decile == k]).mean()),
            "predicted_long_view": float(views.flags["long_view"][decile == k].mean()),
            "observed_long_view": float(long_view[decile == k].mean()),
        }
        for k in range(10)
        if (decile == k).any()
    ]


def returns(activity: np.ndarray, user: np.ndarray, day: np.ndarray, first_day: int) -> dict[str, float]:
    """Chance of coming back the day after an active day from ``first_day`` on: the model's and the log's.

    ``activity`` [users] is each one's share of active days as the days before tell it; views are ``user``, ``day`` [n].
    """
    active = pd.DataFrame({"user": user, "day": day}).drop_duplicates()
    pairs = active[(active.day >= first_day - 1) & (active.day < day.max())]
    again = pairs.assign(day=pairs.day + 1).merge(active, on=["user", "day"])
    return {
        "user_days": float(len(pairs)),
        "predicted": float(activity[pairs.user].mean()) if len(pairs) else float("nan"),
        "observed": len(again) / len(pairs) if len(pairs) else float("nan"),
    }


def _gap(predicted: np.ndarray, observed: np.ndarray) -> float:
    grid = np.sort(np.r_[predicted, observed])
    shares = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (predicted, observed)]
    return float(np.abs(shares[0] - shares[1]).max())
