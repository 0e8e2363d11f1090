"""Lifelong pathway: what hierarchical K-means of users' pasts costs, and what going on from last night saves.

``python -m benchmarks.lifelong [--quick]`` compresses one user of 100 000 items into 2 000 clusters, a thousand users
of 2 000 items each, and the same nightly: everybody from the log against only those whose places are used up. Rival:
flat K-means of scikit-learn into as many clusters, in the same run; quality is the mean squared distance to the
cluster's mean as a share of the variance. One process; threads as OMP_NUM_THREADS says.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from sklearn.cluster import MiniBatchKMeans

from benchmarks.harness import PeakMemory, alternate, finish, seconds, table
from features.histories.clusters import ItemVectors, clusters, compress
from features.histories.lifelong import DAY_MS, daily_lifelong, settled
from features.histories.windows import Window
from features.schema import EXPOSURE, TIME, conform

DIM, TASTES = 64, 300
START_MS = 20_000 * DAY_MS


def main(
    quick: Annotated[bool, typer.Option(help="fewer users and repeats, under two minutes")] = False,
    users: Annotated[int, typer.Option(help="users of 2 000 items each")] = 1000,
    limit: Annotated[int, typer.Option(help="clusters that those users' pasts become")] = 256,
) -> None:
    """Prints the figures, and one JSON object."""
    users, repeats = (min(users, 200), 3) if quick else (users, 5)
    vectors = catalogue(200_000)
    with PeakMemory() as memory:
        one = one_user(vectors, repeats)
        many = many_users(vectors, users, limit)
        night = nights(vectors, 40 if quick else 200, limit)
    rows = (
        ("one user, 100 000 items -> 2 000", one["seconds_100k"], one["distance"], ""),
        ("the same, flat mini-batch K-means", one["seconds_flat"], one["distance_flat"], f"{one['speedup']:.0f} x"),
        (f"{users} users, 2 000 items -> {limit}", many["seconds_users"], "", f"{many['users_per_minute']:.0f}/min"),
        ("a night, all from the log", night["seconds_all_anew"], "", "each clustered once"),
        ("a night, going on", night["seconds_going_on"], "", f"{night['clustered_share']:.0%} clustered"),
    )
    table("users' pasts, hierarchical K-means", ("what", "seconds", "distance", "rate"), rows)
    targets = {"seconds_100k": one["seconds_100k"] < 2, "users_per_minute": many["users_per_minute"] >= 1000}
    finish({**one, **many, **night, "peak_gigabytes": memory.gigabytes, "targets": targets, "quick": quick})


def catalogue(items: int) -> ItemVectors:
    """Items around ``TASTES`` centres, as embeddings of a catalogue are."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(TASTES, DIM))
    vectors = centres[rng.integers(0, TASTES, items)] + 0.5 * rng.normal(size=(items, DIM))
    names = np.array([f"i{item}" for item in range(items)], object)
    return ItemVectors(item_ids=names, vectors=vectors.astype(np.float32), version="bench")


def views(vectors: ItemVectors, count: int, seed: int) -> Window:
    """Views of one user, one a minute."""
    rng = np.random.default_rng(seed)
    return Window(
        ids=np.arange(count),
        item_ids=vectors.item_ids[rng.integers(0, len(vectors.item_ids), count)],
        times=START_MS + 60_000 * np.arange(count),
        play_ms=rng.integers(3_000, 60_000, count),
        duration_ms=rng.integers(5_000, 60_000, count),
        labels=rng.integers(0, 512, count),
    )


def one_user(vectors: ItemVectors, repeats: int) -> dict[str, Any]:
    """The longest past, against flat K-means on the same points."""
    window, ones = views(vectors, 100_000, 1), np.ones(100_000, np.int64)
    vectors.rows(window.item_ids[:1])  # the index is built once, not per user
    x = vectors.vectors[vectors.rows(window.item_ids)]
    flat = MiniBatchKMeans(2_000, batch_size=8_192, n_init=1, max_iter=5, random_state=0)
    labels: list[np.ndarray] = []
    times = alternate(
        [lambda: compress(window, ones, vectors, 2_000), lambda: labels.append(flat.fit_predict(x))], min(repeats, 3)
    )
    window_2k, _ = compress(window, ones, vectors, 2_000)
    number, _ = clusters(x, 2_000)
    ours, theirs = float(np.median(times[:, 0])), float(np.median(times[:, 1]))
    return {
        "seconds_100k": ours,
        "spread_100k": float(np.ptp(times[:, 0])),
        "seconds_flat": theirs,
        "speedup": theirs / ours,
        "clusters_100k": len(window_2k),
        "distance": _distance(x, number),
        "distance_flat": _distance(x, labels[-1]),
    }


def _distance(x: np.ndarray, number: np.ndarray) -> float:
    """Mean squared distance to the cluster's mean, as a share of the variance."""
    size = np.bincount(number).astype(np.float64)
    sums = np.zeros((len(size), x.shape[1]))
    np.add.at(sums, number, x)
    within = float(((x - (sums / np.maximum(size, 1)[:, None])[number]) ** 2).sum())
    return within / float(((x - x.mean(0)) ** 2).sum())


def many_users(vectors: ItemVectors, users: int, limit: int) -> dict[str, Any]:
    """Users of 2 000 items each, one after the other."""
    pasts, ones = [views(vectors, 2_000, seed) for seed in range(users)], np.ones(2_000, np.int64)

    def work() -> None:
        for past in pasts:
            compress(past, ones, vectors, limit)

    took = seconds(work)
    return {"users": users, "limit": limit, "seconds_users": took, "users_per_minute": 60 * users / took}


def nights(vectors: ItemVectors, users: int, limit: int) -> dict[str, Any]:
    """Ten nights of users who watch about 20 new videos a day after 2 000: from the log, and from the night before."""
    days, first = 10, 20_000 + 60
    log = exposures(vectors, users, days)
    times = log.column("event_time").cast(pa.int64()).to_numpy()
    rows: pa.Table | None = None
    anew, going_on, clustered, nightly = 0.0, 0.0, 0, 0
    for day in range(first, first + days):
        print(f"night {day - first + 1} of {days}", file=sys.stderr)
        end = (day + 1) * DAY_MS
        known = log.filter(pa.array(times < end))
        before = settled(rows, end) if rows is not None else None
        new = known if before is None else log.filter(pa.array((times < end) & (times >= end - 3 * DAY_MS)))
        rows, took = _timed(partial(daily_lifelong, new, limit, vectors, before))
        if day > first + 2:  # the nights before have nothing settled to go on from
            going_on += took
            anew += _timed(partial(daily_lifelong, _as_one_night(known), limit, vectors))[1]
            tonight = rows.filter(pa.array(rows.column("event_timestamp").cast(pa.int64()).to_numpy() == end))
            nightly += tonight.num_rows
            clustered += int((tonight.column("clustered_ms").to_numpy() == end).sum())
    return {
        "seconds_all_anew": anew / (days - 3),
        "seconds_going_on": going_on / (days - 3),
        "night_speedup": anew / going_on,
        "clustered_share": clustered / nightly,
    }


def _timed(work: Callable[[], pa.Table]) -> tuple[pa.Table, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _as_one_night(log: pa.Table) -> pa.Table:
    """``log`` moved into one day, so that each user is clustered exactly once: the least a stateless night could do."""
    times = np.sort(log.column("event_time").cast(pa.int64()).to_numpy())
    moved = START_MS + (times - times[0]) * (DAY_MS - 1) // max(int(times[-1] - times[0]), 1)
    place = log.column_names.index("event_time")
    return log.set_column(place, EXPOSURE.field("event_time"), pa.array(moved).cast(TIME))


def exposures(vectors: ItemVectors, users: int, days: int) -> pa.Table:
    """A log of ``users`` with 2 000 views before and 20 on each of ``days``."""
    rng = np.random.default_rng(3)
    early, late = 2_000, 20 * days
    count = users * (early + late)
    user = np.repeat(np.arange(users), early + late)
    place = np.tile(np.r_[np.sort(rng.random(early)) * 60, 60 + np.arange(late) / 20], users)
    times = START_MS + (place * DAY_MS).astype(np.int64)
    columns: dict[str, Any] = {
        "exposure_id": [f"e{row}" for row in range(count)],
        "request_id": [f"r{row // 10}" for row in range(count)],
        "user_id": [f"u{each}" for each in user],
        "item_id": vectors.item_ids[rng.integers(0, len(vectors.item_ids), count)],
        "position": np.zeros(count, np.int32),
        "event_time": pa.array(times).cast(TIME),
        "source": ["organic"] * count,
        "duration_ms": np.full(count, 30_000),
        "play_ms": np.full(count, 20_000),
    }
    flags = {field.name: np.zeros(count, bool) for field in EXPOSURE if pa.types.is_boolean(field.type)}
    return conform(pa.table({**columns, **flags}), EXPOSURE).sort_by("event_time")


if __name__ == "__main__":
    typer.run(main)
