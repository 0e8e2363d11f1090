"""What the loop needs from its users, whoever they are: simulated people or a user model fitted on a real log."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
import pyarrow as pa

from features.datasets.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One opening of the app: at most ``max_requests`` lists will be asked for; ``time_ms`` is UTC."""

    user_id: str
    time_ms: int
    max_requests: int


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The part of a list that was really shown, in order; arrays are as long as the views.

    ``positions`` index the list, ``times_ms`` is when each view began, ``flags`` maps every name of
    ``features.schema.FLAGS`` to a bool array, ``end_ms`` is when the user was through, ``left`` whether the visit is
    over.
    """

    positions: np.ndarray
    times_ms: np.ndarray
    play_ms: np.ndarray
    flags: dict[str, np.ndarray]
    end_ms: int
    left: bool


class World(Protocol):
    """The users in the loop. Days count from 0, the first midnight (UTC) after the history."""

    name: str

    def history(self) -> Dataset:
        """The log before day 0, of organic traffic."""

    def start(self) -> datetime:
        """Midnight UTC of day 0."""

    def new_items(self, day: int) -> pa.Table:
        """ITEM rows uploaded at the beginning of ``day``; may be empty."""

    def population(self) -> list[str]:
        """Ids of the users who may visit."""

    def visitors(self, day: int) -> list[Visit]:
        """Who opens the app on ``day``, sorted by time; depends on how earlier days satisfied them."""

    def watch(self, day: int, user_id: str, item_ids: list[str], time_ms: int, slot: int) -> Watched:
        """The user scrolls through the list from ``time_ms`` and may leave part-way.

        ``slot`` numbers the user's requests of the day. Equal arguments give equal views. Raises ValueError for an
        unknown user, or an item that is unknown or not uploaded yet.
        """

    def feedback_arrives(self, day: int) -> bool:
        """Whether what people did on ``day`` is reported; impressions always are."""

    def drifts_on(self, day: int) -> bool:
        """Whether tastes change at the beginning of ``day``."""
