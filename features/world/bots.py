"""Accounts that are programs: they come at every hour, skip through whatever they are shown, and like it.

Their events look like anybody's and enter the log, the features and the training data. Left out: bots that imitate
people, and rings that push chosen items.
"""

import numpy as np

from features.schema import FLAGS
from features.world.chance import uniforms
from features.world.sessions import DAY_MS
from features.world.world import Visit, Watched

VISITS, REQUESTS = 8, 3
SKIP_MS = (200, 900)
LIKE = 0.9
_WHEN, _SKIP, _LIKE = 101, 102, 103
"""First keys of a bot's random numbers; people use small ones."""


def bot_visits(users: np.ndarray, names: list[str], seed: int, day: int, start_ms: int) -> list[Visit]:
    """The visits of bots (rows ``users``, called ``names``) on ``day``, spread evenly over it."""
    slots = np.arange(VISITS)
    jitter = uniforms(_WHEN, seed, users[:, None], day, slots)
    times = start_ms + day * DAY_MS + ((slots + 0.8 * jitter) * DAY_MS / VISITS).astype(np.int64)
    rows = zip(names, times.tolist(), strict=True)
    return [Visit(user_id=name, time_ms=time, max_requests=REQUESTS) for name, own in rows for time in own]


def bot_watched(user: int, items: np.ndarray, seed: int, day: int, slot: int, time_ms: int, swipe_ms: int) -> Watched:
    """A bot goes through the whole list of item rows [P]."""
    places = np.arange(len(items))
    keys = (seed, user, day, slot, items, places)
    low, high = SKIP_MS
    play = (low + (high - low) * uniforms(_SKIP, *keys)).astype(np.int64)
    likes = uniforms(_LIKE, *keys) < LIKE
    flags = {flag: np.zeros(len(items), bool) for flag in FLAGS} | {"like": likes}
    ends = time_ms + np.cumsum(play + swipe_ms)
    return Watched(
        positions=places,
        times_ms=np.r_[time_ms, ends][: len(items)],
        play_ms=play,
        flags=flags,
        end_ms=int(ends[-1]) if len(items) else time_ms,
        left=not len(items),
    )
