"""Assignments in which no cluster holds more than its capacity.

``greedy_assign`` is the rule of the first paper (OneRec, arXiv 2502.18965, Algorithm 1), kept as the baseline: cluster
after cluster takes its nearest unassigned rows, and the last ones get leftovers. Ours is an auction (Bertsekas, "The
auction algorithm for assignment with similar objects"): rows bid for places, a full cluster's price rises, and
the total cost ends within n bid increments of the least possible. It scales because a row looks only at a short list of
centroids. Prices never fall, so what is off the list stays at least as dear as the dearest on it was when the list was
made; a row whose list no longer beats that bound asks for a new one. Left out: epsilon scaling and several machines.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.tokenizer.nearest import shortlist

SHORTLIST = 16
"""Centroids a row looks at before it asks for more."""
ROUNDS = 3_000
"""Rounds of bidding after which the few rows still without a place take the nearest cluster with room."""

Quotes = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""``quotes(rows, prices)``: the cheapest clusters of rows at these prices, int32 [r, m], and costs without prices."""


def capacity_of(n: int, k: int, slack: float = 0.05) -> int:
    """Most rows a cluster may hold: ceil(n / k x (1 + slack)); slack 0 is the exact ceil(n / k)."""
    return max(-(-n // k), int(np.ceil(n / k * (1 + slack) - 1e-9)))


def balanced_assign(cost: np.ndarray, capacity: int, *, tolerance: float = 5e-3) -> np.ndarray:
    """Cluster int32 [n] of each row of ``cost`` [n, k], at most ``capacity`` a cluster, at nearly least total cost.

    ``tolerance`` is the bid increment, as a share of a row's typical cost: smaller is slower and nearer to the
    optimum. Raises ValueError when the clusters cannot hold all rows.
    """
    n, k = cost.shape
    cost = cost.astype(np.float64)
    everything = np.arange(k, dtype=np.int32)

    def quotes(rows: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.broadcast_to(everything, (len(rows), k)), cost[rows]

    return _auction(quotes, (n, k), capacity, tolerance)


def balanced_nearest(
    x: np.ndarray,
    centroids: np.ndarray,
    capacity: int,
    *,
    tolerance: float = 5e-3,
    prices: np.ndarray | None = None,
) -> np.ndarray:
    """``balanced_assign`` by squared distance of rows [n, d] to centroids [k, d], in memory n x SHORTLIST.

    ``prices`` float [k] start the auction: the nearer to those that balance the clusters, the shorter it is.
    """
    count = min(SHORTLIST, len(centroids))

    def quotes(rows: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return shortlist(x[rows], centroids, count, prices)

    return _auction(quotes, (len(x), len(centroids)), capacity, tolerance, prices)


def greedy_assign(cost: np.ndarray, capacity: int) -> np.ndarray:
    """O1's Algorithm 1: cluster after cluster takes its ``capacity`` nearest rows of those left; int32 [n]."""
    n, k = cost.shape
    _check_capacity(n, k, capacity)
    assignment = np.full(n, -1, np.int32)
    left = np.arange(n)
    for cluster in range(k):
        order = np.argsort(cost[left, cluster], kind="stable")
        assignment[left[order[:capacity]]] = cluster
        left = np.sort(left[order[capacity:]])
    return assignment


@dataclass
class _Auction:
    """Who is where, at what bid; lists and their costs [n, m], and the least value of anything off a row's list."""

    quotes: Quotes
    capacity: int
    increment: float
    listed: np.ndarray
    costs: np.ndarray
    bound: np.ndarray
    prices: np.ndarray
    assignment: np.ndarray
    bids: np.ndarray

    def bid(self, rows: np.ndarray) -> None:
        """Every row of ``rows`` moves to its cheapest cluster; over-full clusters drop their lowest bids."""
        values = self._values(rows)
        index = np.arange(len(rows))
        place = values.argmin(1)
        best = values[index, place]
        values[index, place] = np.inf
        second = np.minimum(values.min(1), self.bound[rows])
        cluster = self.listed[rows, place]
        # A row bids up to the point where its second choice would be as good, plus the increment.
        self.bids[rows] = self.prices[cluster] + (second - best) + self.increment
        self.assignment[rows] = cluster
        self._settle(np.unique(cluster))

    def _values(self, rows: np.ndarray) -> np.ndarray:
        """Cost plus price of what is on the lists of ``rows``; a list is made anew where it may miss the cheapest."""
        values = self.costs[rows] + self.prices[self.listed[rows]]
        stale = values.min(1) > self.bound[rows]
        if stale.any():
            asking = rows[stale]
            self.listed[asking], self.costs[asking] = self.quotes(asking, self.prices)
            values[stale] = self.costs[asking] + self.prices[self.listed[asking]]
            self.bound[asking] = values[stale].max(1)
        return values

    def _settle(self, clusters: np.ndarray) -> None:
        """Keeps the highest bids of each over-full cluster; a full cluster's price is its lowest kept bid."""
        touched = np.zeros(len(self.prices) + 1, bool)  # the last entry stands for "no cluster", -1
        touched[clusters] = True
        members = np.flatnonzero(touched[self.assignment])
        members = members[np.lexsort((members, -self.bids[members], self.assignment[members]))]
        owners = self.assignment[members]
        starts = np.searchsorted(owners, clusters)
        counts = np.diff(np.append(starts, len(owners)))
        rank = np.arange(len(members)) - np.repeat(starts, counts)
        self.assignment[members[rank >= self.capacity]] = -1
        full = counts >= self.capacity
        lowest = self.bids[members[starts[full] + self.capacity - 1]]
        self.prices[clusters[full]] = np.maximum(self.prices[clusters[full]], lowest)

    def house(self, rows: np.ndarray) -> None:
        """Each row, one by one, takes the nearest cluster with room (the whole row of costs is looked at)."""
        room = self.capacity - np.bincount(self.assignment[self.assignment >= 0], minlength=len(self.prices))
        for row in rows:
            barred = np.where(room > 0, 0.0, 1e30)
            listed, costs = self.quotes(np.array([row]), barred)
            cluster = int(listed[0, (costs + barred[listed])[0].argmin()])
            self.assignment[row] = cluster
            room[cluster] -= 1


def _auction(
    quotes: Quotes, shape: tuple[int, int], capacity: int, tolerance: float, prices: np.ndarray | None = None
) -> np.ndarray:
    n, k = shape
    _check_capacity(n, k, capacity)
    if k == 1:
        return np.zeros(n, np.int32)
    start = np.zeros(k) if prices is None else prices.astype(np.float64)
    listed, costs = quotes(np.arange(n), start)
    costs = costs.astype(np.float64)
    # The second term keeps repeated rows, whose nearest cost may be 0, from outbidding each other by nothing.
    increment = tolerance * max(float(costs.min(1).mean()), 0.1 * float(costs.mean()), 1e-12)
    state = _Auction(
        quotes=quotes,
        capacity=capacity,
        increment=increment,
        listed=np.array(listed),
        costs=costs,
        bound=np.full(n, np.inf) if listed.shape[1] == k else (costs + start[listed]).max(1),
        prices=start,
        assignment=np.full(n, -1, np.int32),
        bids=np.zeros(n),
    )
    for _ in range(ROUNDS):
        homeless = np.flatnonzero(state.assignment < 0)
        if not len(homeless):
            return state.assignment
        state.bid(homeless)
    state.house(np.flatnonzero(state.assignment < 0))
    return state.assignment


def _check_capacity(n: int, k: int, capacity: int) -> None:
    if n > k * capacity:
        raise ValueError(f"{k} clusters of at most {capacity} hold {k * capacity} rows; {n} were given")
