"""High-quality sessions: what the session model learns to write (OneRec, arXiv 2502.18965, 2.3).

A session is one request's list. O1 keeps those in which enough videos were really watched, that were watched for long
enough altogether, and in which the user liked, collected or shared something; the numbers are not published and are
fields here. A session's target is its first ``items`` watched videos in the order shown (ours): what the user skipped
is not what a list should hold. Left out: sessions that span several requests.

Shapes: N exposures of a run, R requests.
"""

from dataclasses import dataclass

import numpy as np

from features.histories.requests import Requests
from features.schema import FLAGS
from models.tokenizer.interactions import EXPLICIT
from models.training.data import Contexts, RunData


@dataclass(frozen=True, kw_only=True)
class SessionQuality:
    """What makes a session worth learning from; the thresholds are ours."""

    watched: int = 5
    """At least so many videos really watched."""
    watched_ms: int = 3_000
    """Really watched: played for so long, or to the end."""
    total_ms: int = 60_000
    """Watch time of the whole session."""
    engagements: int = 1
    """Videos with a like, collect, forward, comment or follow; logs without such flags want 0."""

    def __post_init__(self) -> None:
        if self.watched < 1 or min(self.watched_ms, self.total_ms, self.engagements) < 0:
            raise ValueError(f"{self}: watched must be at least 1, the others at least 0")


def really_watched(play_ms: np.ndarray, duration_ms: np.ndarray, quality: SessionQuality) -> np.ndarray:
    """bool [N]: played for ``watched_ms``, or to the end of a shorter video; where nothing was played, False."""
    return (play_ms > 0) & (play_ms >= np.minimum(duration_ms, quality.watched_ms))


def high_quality(
    requests: Requests, play_ms: np.ndarray, watched: np.ndarray, engaged: np.ndarray, quality: SessionQuality
) -> np.ndarray:
    """bool [R], from the play time, and whether watched and engaged with, of every exposure [N]."""
    return (
        (per_request(requests, watched) >= quality.watched)
        & (per_request(requests, play_ms) >= quality.total_ms)
        & (per_request(requests, engaged) >= quality.engagements)
    )


def first_of_each(requests: Requests, select: np.ndarray, count: int) -> np.ndarray:
    """bool [N]: the first ``count`` selected exposures of every request that has so many."""
    chosen = select[requests.rows].astype(np.int64)
    before = np.cumsum(chosen) - chosen
    sizes = np.diff(requests.offsets)
    rank = before - np.repeat(before[requests.offsets[:-1]], sizes)
    enough = np.repeat(per_request(requests, select) >= count, sizes)
    mask = np.zeros(len(select), bool)
    mask[requests.rows] = (chosen > 0) & (rank < count) & enough
    return mask


def session_targets(data: RunData, contexts: Contexts, items: int, quality: SessionQuality) -> np.ndarray:
    """bool [N]: the ``items`` target exposures of every high-quality session of the run.

    Items the catalogue does not know cannot be targets. An item shown twice in a session is a target once.
    """
    events, requests = data.sequences.events, contexts.requests
    engaged = np.zeros(len(data), bool)
    for flag in EXPLICIT:
        engaged |= (events["labels"] >> FLAGS.index(flag)) & 1 != 0
    watched = really_watched(events["play_ms"], events["duration_ms"], quality)
    good = high_quality(requests, events["play_ms"], watched, engaged, quality)
    known = (events["item"] >= 0) & (contexts.item_rows[events["item"]] >= 0)
    candidate = watched & known & first_views(requests, events["item"])
    candidate[requests.rows] &= np.repeat(good, np.diff(requests.offsets))
    return first_of_each(requests, candidate, items)


def first_views(requests: Requests, item: np.ndarray) -> np.ndarray:
    """bool [N]: not shown before in the same request."""
    request = np.repeat(np.arange(len(requests)), np.diff(requests.offsets))
    pairs = request * (int(item.max(initial=0)) + 2) + item[requests.rows] + 1
    first = np.unique(pairs, return_index=True)[1]
    mask = np.zeros(len(item), bool)
    mask[requests.rows[first]] = True
    return mask


def per_request(requests: Requests, values: np.ndarray) -> np.ndarray:
    """Sum [R] of ``values`` [N] over each request's exposures."""
    sums = np.r_[0, np.cumsum(values[requests.rows].astype(np.int64))]
    return sums[requests.offsets[1:]] - sums[requests.offsets[:-1]]
