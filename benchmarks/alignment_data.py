"""Training data of a simulated log in one folder, with the lifelong pathway as production fills it.

The lifelong list of a request is the user's watched views before its UTC midnight, the newest that fit
(``features.histories.lifelong`` without clusters). Left out: the feature store, whose point-in-time join this equals.
"""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.equal_loss import features_of
from features.datasets import Dataset
from features.histories.context import Context
from features.histories.etl import sequences_of_table
from features.histories.lifelong import DAY_MS, watched
from features.histories.parts import Part
from features.histories.sequences import LIFELONG_EVENTS, PartFeatures
from features.histories.windows import Limits, Window, spans
from features.schema import EXPOSURE, FLAGS, conform
from models.tokenizer.vocabulary import Catalogue
from models.training.data import Contexts, RunData


def write_log(dataset: Dataset, exposures: pa.Table, folder: Path) -> Path:
    """Training data in ``folder``: the items and users of ``dataset``, and sequences of ``exposures``."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(dataset.items, folder / "items.parquet")
    pq.write_table(dataset.users, folder / "users.parquet")
    item_ids = dataset.items.column("item_id").combine_chunks()
    limit = Limits().lifelong
    sequences_of_table(exposures, item_ids, folder, lambda part, _: with_lifelong(part, dataset.users, limit))
    return folder


def with_lifelong(part: Part, users: pa.Table, limit: int) -> PartFeatures:
    """Attributes and lifelong list, at most ``limit`` views, of every request of ``part``."""
    views = np.flatnonzero(_watched(part))
    before = np.r_[0, np.cumsum(np.isin(np.arange(len(part.time_ms)), views))]
    # Rows are in order of (user, time): what a user did before midnight ends where this key would be inserted.
    key = part.user.astype(np.int64) * 2**43 + part.time_ms
    midnight = part.request_time // DAY_MS * DAY_MS
    end = before[np.searchsorted(key, part.request_user.astype(np.int64) * 2**43 + midnight)]
    counts = np.minimum(end - before[part.start[part.request_user]], limit)
    rows = views[spans(end - counts, counts)]
    empty = features_of(part, users)
    events = {name: getattr(part, name)[rows] for name in LIFELONG_EVENTS.names}
    return PartFeatures(request=empty.request, static=empty.static, counts=counts, events=events)


def _watched(part: Part) -> np.ndarray:
    names = {field.name for field in fields(Window)}
    none = np.zeros(len(part.time_ms), np.int64)
    given = {"ids": none, "item_ids": none, "times": part.time_ms, "play_ms": part.play_ms}
    given |= {"duration_ms": part.duration_ms, "labels": part.labels}
    assert names == set(given)
    return watched(Window(**given))


def asked(dataset: Dataset, log: pa.Table, users: list[str], times_ms: list[int], folder: Path) -> Path:
    """Training data of ``log`` and one more request of each user, "asked-0" on, that has no outcome yet."""
    names = [f"asked-{n}" for n in range(len(users))]
    rows = {
        "exposure_id": names,
        "request_id": names,
        "user_id": users,
        "item_id": [dataset.items["item_id"][0].as_py()] * len(users),
        "position": [0] * len(users),
        "event_time": times_ms,
        "source": ["organic"] * len(users),
        "duration_ms": [0] * len(users),
        "play_ms": [0] * len(users),
        **{flag: [False] * len(users) for flag in FLAGS},
    }
    return write_log(dataset, pa.concat_tables([log, conform(pa.table(rows), EXPOSURE)]), folder)


def contexts_of(
    dataset: Dataset, log: pa.Table, users: list[str], times_ms: list[int], catalogue: Catalogue, folder: Path
) -> Context:
    """What a server would know of each user at that time (UTC ms), given the exposures of ``log``."""
    mine = log.filter(pc.is_in(log.column("user_id"), value_set=pa.array(sorted(set(users)))))
    contexts = Contexts(RunData.load(asked(dataset, mine, users, times_ms, folder)), catalogue, Limits())
    names = pa.array([f"asked-{n}" for n in range(len(users))])
    return contexts.of(pc.index_in(names, value_set=contexts.requests.names).to_numpy())
