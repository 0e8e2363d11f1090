"""On-line features of users: one read of all four pathways, and the push of the two that the updater owns.

Feast's on-line store serves values however old they are, while its point-in-time joins apply the TTL; the same rule is
applied here, against the request's own clock, or training and serving would disagree. Reads give up within a second
when Valkey is dead: the model server then answers with the cold context.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from redis.exceptions import RedisError

from features.feast import FeastObjectNotFoundException, FeatureStore, PushMode, PushSourceNotFoundException
from features.histories.context import STATIC_FIELDS, Context, from_windows
from features.histories.lifelong import rows_of_windows
from features.histories.windows import COLUMNS, Limits, Window, empty_window
from features.repository import open_store, redis_client
from features.settings import Settings
from features.store.definitions import feature_views

TTL_MS = {view.name: view.ttl // timedelta(milliseconds=1) for view in feature_views(Path("/")) if view.ttl}
WINDOW_VIEWS = ("short_term", "positive_feedback", "lifelong")
REFERENCES = ["user_static:static"] + [f"{view}:{column}" for view in WINDOW_VIEWS for column in COLUMNS]


class FeaturesUnavailable(RuntimeError):
    """The on-line feature store did not answer; the message says where and what to do."""


@dataclass(frozen=True, kw_only=True)
class UserFeatures:
    """The pathways of one user; a part never stored, or older than its TTL, is None."""

    user_id: str
    static: np.ndarray | None
    """int64 [F]"""
    short: Window | None
    positive: Window | None
    lifelong: Window | None
    expired: tuple[str, ...]
    """Feature views that hold a value older than their TTL."""
    pushed_ms: int
    """Newest timestamp of the pushed views, expired ones too; 0 when never pushed."""

    @property
    def flag(self) -> str:
        """``cold`` when nothing is known of the user, ``degraded`` when a pathway has expired, else empty."""
        if self.static is None and self.short is None and self.positive is None and self.lifelong is None:
            return "cold"
        return "degraded" if self.expired else ""


class OnlineFeatures:
    """Reads and pushes through one Feast store (default: the configured one); safe to share between threads.

    The first read opens the connection, so a server may start before Valkey does.
    """

    def __init__(self, store: FeatureStore | None = None) -> None:
        self.store = store or open_store()
        redis_client(self.store)

    @classmethod
    def connect(cls, home: Path | None = None, config: Settings | None = None) -> "OnlineFeatures":
        """On the store of ``home`` (default ``feast_home``) and the servers of ``config``."""
        return cls(open_store(home, config))

    def read(self, user_ids: Sequence[str], now_ms: int | np.ndarray) -> list[UserFeatures]:
        """The features of B users at ``now_ms`` (one time, or one per user); raises FeaturesUnavailable."""
        if len(user_ids) == 0:
            return []
        entities = {"user_id": [str(user_id) for user_id in user_ids]}
        with reporting(self.store):
            response = self.store.get_online_features(REFERENCES, entities, full_feature_names=True).proto
        columns = dict(zip(response.metadata.feature_names.val, response.results, strict=True))
        times = np.broadcast_to(np.asarray(now_ms, np.int64), len(user_ids))
        return [_user_features(columns, row, user_id, int(times[row])) for row, user_id in enumerate(user_ids)]

    def context(
        self, user_ids: Sequence[str], now_ms: int | np.ndarray, item_index: pd.Index, limits: Limits
    ) -> tuple[Context, list[str]]:
        """The context of B requests and a flag each (``UserFeatures.flag``); raises FeaturesUnavailable."""
        users = self.read(user_ids, now_ms)
        none, absent = empty_window(), np.zeros(STATIC_FIELDS, np.int64)
        context = from_windows(
            np.array([absent if user.static is None else user.static for user in users]),
            [user.short or none for user in users],
            [user.positive or none for user in users],
            [user.lifelong or none for user in users],
            np.broadcast_to(np.asarray(now_ms, np.int64), len(users)),
            item_index,
            limits,
        )
        return context, [user.flag for user in users]

    def push_windows(
        self, user_ids: Sequence[str], short: Sequence[Window], positive: Sequence[Window], timestamps_ms: np.ndarray
    ) -> None:
        """Replaces the short-term and positive windows of users in one write per view; raises FeaturesUnavailable.

        The Redis store skips a row whose timestamp is not newer than the stored one: ``timestamps_ms`` must exceed
        ``UserFeatures.pushed_ms``.
        """
        for source, windows in (("short_term_push", short), ("positive_feedback_push", positive)):
            frame = rows_of_windows(user_ids, timestamps_ms, windows).to_pandas()
            with reporting(self.store):
                self.store.push(source, frame, to=PushMode.ONLINE)


@contextmanager
def reporting(store: FeatureStore) -> Iterator[None]:
    """Turns errors of Valkey and of a registry without definitions into FeaturesUnavailable."""
    registry = str(store.config.registry.path)
    # Feast would write an empty registry when it finds none: a reader must not, the registry has one writer
    if "://" not in registry and not Path(registry).exists():
        raise FeaturesUnavailable(f"there is no feature registry at {registry}; run `onerec up` or `feast apply`")
    try:
        yield
    except RedisError as error:
        address = str(store.config.online_store.connection_string).split(",")[0]
        raise FeaturesUnavailable(
            f"Valkey at {address} does not answer ({type(error).__name__}: {error}); "
            "see `onerec status`, or start it with `onerec up`"
        ) from error
    except (FeastObjectNotFoundException, PushSourceNotFoundException) as error:
        raise FeaturesUnavailable(
            f"the registry at {registry} lacks the feature views ({error}); run `onerec up` or `feast apply`"
        ) from error


def _user_features(columns: dict[str, Any], row: int, user_id: str, now_ms: int) -> UserFeatures:
    stamps: dict[str, int] = {}
    expired = []
    for view, ttl in TTL_MS.items():
        first = columns[f"{view}__static" if view == "user_static" else f"{view}__ids"]
        if not first.values[row].WhichOneof("val"):
            continue
        stamps[view] = first.event_timestamps[row].ToMilliseconds()
        if stamps[view] + ttl < now_ms:
            expired.append(view)

    def window(view: str) -> Window | None:
        if view not in stamps or view in expired:
            return None
        return Window(**{name: _values(columns[f"{view}__{name}"].values[row], name) for name in COLUMNS})

    has_static = "user_static" in stamps and "user_static" not in expired
    return UserFeatures(
        user_id=user_id,
        static=_values(columns["user_static__static"].values[row], "static") if has_static else None,
        short=window("short_term"),
        positive=window("positive_feedback"),
        lifelong=window("lifelong"),
        expired=tuple(expired),
        pushed_ms=max(stamps.get("short_term", 0), stamps.get("positive_feedback", 0)),
    )


def _values(value: Any, name: str) -> np.ndarray:
    if name == "item_ids":
        return np.array(list(value.string_list_val.val), object)
    return np.array(list(value.int64_list_val.val), np.int64)
