"""Duration-aware advantage from real feedback (OneRec-V2, arXiv 2508.20900, 3.1.1).

A view counts as good when it is long *for this user and this video length*: ``F(d) = floor(log_beta(d + eps))``
buckets the durations, ``q_i`` is the share of the user's strictly earlier views in the bucket with play time <= p_i,
``tau`` the top quartile of q in the batch, and ``A = +1 if q > tau and not negative; -1 if negative; else 0``. Raw,
not normalised.

Ours: beta = 2 and eps = 1 s (unpublished). A user without earlier views in the bucket is ranked against everybody's
earlier views of it, or of any duration when the bucket is new; with no earlier view at all q is NaN and A = 0. q
saturates at 1 in short histories, so a strict ``>`` may leave no positives: ties at tau are broken by the rank among
everybody's views of the bucket, then by the length of the user's history, and the top quartile is taken by count.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class DurationConfig:
    """Constants of the reward; all but the quartile are ours."""

    beta: float = 2.0
    epsilon_s: float = 1.0
    top_share: float = 0.25
    min_history: int = 1
    """Earlier views in the bucket below which the population's distribution is used."""

    def __post_init__(self) -> None:
        if self.beta <= 1 or self.epsilon_s <= 0 or not 0 < self.top_share < 1 or self.min_history < 1:
            raise ValueError(f"{self}: beta > 1, epsilon_s > 0, 0 < top_share < 1 and min_history >= 1 are required")


@dataclass(frozen=True)
class DurationAdvantage:
    """Per row of the log: ``advantage`` float32 in {-1, 0, 1} and ``quantile`` float64 (NaN = no evidence)."""

    advantage: np.ndarray
    quantile: np.ndarray
    metrics: dict[str, float]


def duration_aware_advantage(
    play_ms: np.ndarray,
    duration_ms: np.ndarray,
    negative: np.ndarray,
    users: np.ndarray,
    times_ms: np.ndarray,
    *,
    batch: np.ndarray | None = None,
    config: DurationConfig | None = None,
) -> DurationAdvantage:
    """Advantage of every view of a log, given as equally long columns in any order.

    ``batch`` (bool) marks the rows to judge: tau is theirs, the other rows serve as history and get 0. Raises
    ValueError when the columns differ in length.
    """
    config = config or DurationConfig()
    columns = {"play_ms": play_ms, "duration_ms": duration_ms, "negative": negative, "users": users, "times": times_ms}
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"columns differ in length: { {name: len(column) for name, column in columns.items()} }")
    judged = np.ones(len(play_ms), bool) if batch is None else np.asarray(batch, bool)
    negative = np.asarray(negative, bool)
    own, crowd, earlier = _quantiles(play_ms, duration_ms, users, times_ms, config)
    quantile = np.where(earlier >= config.min_history, own, crowd)
    positive, tau, ties = _top(quantile, crowd, earlier, judged, config.top_share)
    advantage = np.where(judged & negative, -1.0, np.where(positive & ~negative, 1.0, 0.0)).astype(np.float32)
    rows = max(int(judged.sum()), 1)
    metrics = {
        "reward/tau": tau,
        "reward/positive_share": float((advantage > 0).sum() / rows),
        "reward/negative_share": float((advantage < 0).sum() / rows),
        "reward/tie_share": ties,
        "reward/fallback_share": float((judged & (earlier < config.min_history)).sum() / rows),
        "reward/no_evidence_share": float((judged & np.isnan(quantile)).sum() / rows),
    }
    return DurationAdvantage(advantage, quantile, metrics)


def duration_bucket(duration_ms: np.ndarray, config: DurationConfig) -> np.ndarray:
    """``floor(log_beta(d + eps))`` with d in seconds, int64."""
    seconds = np.maximum(np.asarray(duration_ms, np.float64), 0) / 1000
    return np.floor(np.log(seconds + config.epsilon_s) / np.log(config.beta)).astype(np.int64)


def _quantiles(
    play_ms: np.ndarray, duration_ms: np.ndarray, users: np.ndarray, times_ms: np.ndarray, config: DurationConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank in the user's own bucket, rank in everybody's bucket (or of all views), and the own earlier views."""
    bucket = np.unique(duration_bucket(duration_ms, config), return_inverse=True)[1]
    user = np.unique(users, return_inverse=True)[1]
    own_group = user.astype(np.int64) * (int(bucket.max(initial=0)) + 1) + bucket
    own, earlier = _earlier_share(own_group, times_ms, play_ms)
    crowd, crowd_earlier = _earlier_share(bucket, times_ms, play_ms)
    anyone, _ = _earlier_share(np.zeros_like(bucket), times_ms, play_ms)
    return own, np.where(crowd_earlier > 0, crowd, anyone), earlier


def _top(
    quantile: np.ndarray, crowd: np.ndarray, earlier: np.ndarray, judged: np.ndarray, share: float
) -> tuple[np.ndarray, float, float]:
    """Rows above tau with ties broken, tau, and the share of judged rows that equal tau."""
    rows = np.flatnonzero(judged & ~np.isnan(quantile))
    positive = np.zeros(len(quantile), bool)
    if not len(rows):
        return positive, float("nan"), 0.0
    q = quantile[rows]
    tau = float(np.quantile(q, 1 - share, method="higher"))
    best = np.lexsort((-earlier[rows], -crowd[rows], -q))[: int(np.ceil(share * len(rows)))]
    # A view shorter than every earlier one is no success, however small the batch.
    positive[rows[best]] = q[best] > 0
    return positive, tau, float((q == tau).mean())


def _earlier_share(group: np.ndarray, times: np.ndarray, play: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the group's strictly earlier rows with play <= own (NaN if none), and how many are earlier."""
    order = np.lexsort((times, group))
    g, t, p = group[order], np.asarray(times)[order], np.asarray(play)[order]
    instant = np.cumsum(np.concatenate([[0], ((g[1:] != g[:-1]) | (t[1:] != t[:-1])).astype(np.int64)]))[: len(g)]
    # Rows of the same instant are ordered arbitrarily and are not strictly earlier: take their share out again.
    earlier = _position(g) - _position(instant)
    smaller = _count_earlier_smaller(g, p) - _count_earlier_smaller(instant, p)
    share = np.divide(smaller, earlier, out=np.full(len(g), np.nan), where=earlier > 0)
    out_share, out_earlier = np.empty_like(share), np.empty_like(earlier)
    out_share[order], out_earlier[order] = share, earlier
    return out_share, out_earlier


def _position(group: np.ndarray) -> np.ndarray:
    """Position of every row inside its run of equal ``group`` values."""
    index = np.arange(len(group))
    starts = np.concatenate([[True], group[1:] != group[:-1]])[: len(group)]
    return index - np.maximum.accumulate(np.where(starts, index, 0)) if len(group) else index


def _count_earlier_smaller(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """For every row, the rows before it in its run of equal ``group`` with value <= its own, in O(n log^2 n).

    Divide and conquer without recursion: at each block size, rows of a right-hand block count the rows of their sibling
    left-hand block; over all sizes every earlier row is counted once.
    """
    position = _position(group)
    counts = np.zeros(len(group), np.int64)
    if not len(group):
        return counts
    run = np.cumsum(position == 0) - 1
    by_value = np.lexsort((position, value))  # ties: the earlier row first, so that it is counted
    longest = int(position.max())
    for shift in range(longest.bit_length()):
        parent = run * ((longest >> (shift + 1)) + 1) + (position >> (shift + 1))
        rows = by_value[np.argsort(parent[by_value], kind="stable")]
        left = (position[rows] >> shift & 1) == 0
        seen = np.cumsum(left)
        first = _position(parent[rows]) == 0
        before = np.maximum.accumulate(np.where(first, seen - left, 0))
        counts[rows] += np.where(left, 0, seen - before)
    return counts
