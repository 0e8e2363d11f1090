"""What a list is truly worth to people, in expectation over all luck: how policies are judged, and what oracles know.

The luck of a view is a normal number; here it is a grid of its quantiles, so that nothing is drawn and two policies are
compared without noise of their own. Leaving is followed along ``PATHS`` fixed paths of such numbers, with its chance in
place of a draw. The week ahead (``lt7``) assumes lists like this one every day and follows mean satisfaction. Left out:
videos seen before (give unseen ones), the spread of satisfaction around its mean.

Shapes: U users, P places of a list.
"""

import numpy as np
from scipy.special import expit, logit, ndtri

from features.world.chance import uniforms
from features.world.responses import DRAWN_FLAGS, LONG_VIEW_MS, Responses, bucket_of
from features.world.sessions import Sessions

GRID = 128
PATHS = 48
_PATH = 201
"""First key of the paths' random numbers; people use small ones."""


def expected(
    responses: Responses, sessions: Sessions, users: np.ndarray, z: np.ndarray, duration_ms: np.ndarray, day: int
) -> dict[str, np.ndarray]:
    """float64 [U] each, of lists with affinity scores ``z`` [U, P] for the user rows ``users``.

    ``play_s`` is watched when the whole list is scrolled, ``stay_s`` until the user leaves, ``views`` how many videos
    that are; flags by name are expected numbers in the whole list; ``lt7`` is days with a visit of the next seven.
    """
    found = {name: values.sum(1) for name, values in flag_chances(responses, z, duration_ms).items()}
    found["play_s"] = responses.expected_play_ms(z, duration_ms).sum(1) / 1000
    found["stay_s"], found["views"], satisfied = _scrolled(responses, sessions, z, duration_ms)
    return {**found, "lt7": _lt7(sessions, users, satisfied, day)}


def flag_chances(responses: Responses, z: np.ndarray, duration_ms: np.ndarray) -> dict[str, np.ndarray]:
    """Chance [U, P] of every flag of one view."""
    bucket = bucket_of(duration_ms)
    rho = responses.rho[bucket]
    luck = ndtri((np.arange(GRID) + 0.5) / GRID)
    score = rho * z + np.sqrt(1 - rho**2) * luck[:, None, None]
    found = {}
    for row, name in enumerate(DRAWN_FLAGS):
        logits = responses.intercepts[row][bucket] + responses.play_weights[row] * score
        found[name] = expit(logits + responses.affinity_weights[row] * z).mean(0)
    play = responses.play_ms(score, duration_ms)
    found["long_view"] = (play >= np.minimum(duration_ms, LONG_VIEW_MS)).mean(0)
    return found


def _scrolled(
    responses: Responses, sessions: Sessions, z: np.ndarray, duration_ms: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds until leaving, videos until then, and their mean percentile, [U] each."""
    places = np.arange(z.shape[1])
    luck = ndtri(uniforms(_PATH, np.arange(PATHS)[:, None], places))
    rho = responses.rho[bucket_of(duration_ms)]
    seconds, views, enjoyed = (np.zeros(len(z)) for _ in range(3))
    for path in luck:
        score = rho * z + np.sqrt(1 - rho**2) * path
        percentile, play = responses.percentile(score), responses.play_ms(score, duration_ms)
        stays = 1 - sessions.leaving(percentile)
        here = np.concatenate([np.ones((len(z), 1)), np.cumprod(stays, 1)[:, :-1]], 1)
        seconds += (here * play).sum(1) / 1000
        views += here.sum(1)
        enjoyed += (here * percentile).sum(1)
    return seconds / PATHS, views / PATHS, enjoyed / views


def _lt7(sessions: Sessions, users: np.ndarray, satisfied: np.ndarray, day: int) -> np.ndarray:
    config = sessions.config
    activity, level = sessions.activity[users], sessions.satisfaction(day)[users]
    days = np.zeros(len(users))
    for _ in range(7):
        chance = expit(logit(activity) + config.return_weight * (level - 0.5))
        days += chance
        level = level + chance * config.satisfaction_rate * (satisfied - level)
    return days
