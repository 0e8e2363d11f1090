"""A small log with something to learn: every user likes one tag and watches videos of it to the end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.histories.context import hash_static
from features.histories.etl import sequences_of_table
from features.histories.lifelong import LIST_TYPES, daily_lifelong, events_of_lists
from features.histories.parts import Part
from features.histories.sequences import PartFeatures
from features.schema import EXPOSURE, FLAGS, ITEM, USER, conform
from models.onerec_v2 import V2Config
from models.tokenizer.vocabulary import Catalogue

START_MS = 1_767_225_600_000
HOUR_MS = 3_600_000
USERS, ITEMS, TAGS = 24, 60, 4
CODES = 8
MODEL = V2Config(codes=CODES, levels=3, d_model=16, layers=1, heads=2, kv_groups=1, embed=8, dropout=0.1)


@dataclass(frozen=True)
class Log:
    """The tables of a run and the folder that holds them."""

    folder: Path
    exposures: pa.Table
    catalogue: Catalogue


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_items() -> pa.Table:
    ids = [f"i{k}" for k in range(ITEMS)]
    columns = {"item_id": ids, "tags": [[f"t{k % TAGS}"] for k in range(ITEMS)], "duration_ms": [20_000] * ITEMS}
    return conform(pa.table(columns), ITEM)


def make_exposures(items: int = ITEMS) -> pa.Table:
    """Four days, a request of 1 to 13 exposures per user and twelve hours."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        for visit in range(8):
            time = START_MS + visit * 12 * HOUR_MS + user * 60_000
            for position in range(int(rng.integers(1, 14))):
                item = int(rng.integers(0, items))
                liked = item % TAGS == user % TAGS
                rows.append((f"u{user}", f"r{user}-{visit}", item, position, time + position * 1000, liked))
    frame = pd.DataFrame(rows, columns=["user_id", "request_id", "item", "position", "event_time", "liked"])
    play = np.where(frame["liked"], 20_000, 1_000) + rng.integers(0, 900, len(frame))
    columns = {
        "exposure_id": [f"e{k}" for k in range(len(frame))],
        "request_id": frame["request_id"],
        "user_id": frame["user_id"],
        "item_id": [f"i{item}" for item in frame["item"]],
        "position": frame["position"],
        "event_time": frame["event_time"],
        "source": ["organic"] * len(frame),
        "duration_ms": np.full(len(frame), 20_000),
        "play_ms": play,
        **{flag: np.zeros(len(frame), bool) for flag in FLAGS},
        "long_view": frame["liked"],
        "dislike": rng.random(len(frame)) < 0.05,
    }
    table = conform(pa.table(columns), EXPOSURE)
    return table.sort_by([("user_id", "ascending"), ("event_time", "ascending"), ("exposure_id", "ascending")])


def make_features(part: Part, exposures: pa.Table, users: pa.Table) -> PartFeatures:
    """Point-in-time rows by pandas' as-of join, in place of Feast."""
    daily = daily_lifelong(exposures, 64)
    midnights = daily.column("event_timestamp").cast(pa.int64()).to_numpy()
    users_of_rows = daily.column("user_id").to_pandas().astype(object)
    rows = pd.DataFrame({"user_id": users_of_rows, "t": midnights, "row": range(len(daily))})
    names = part.user_ids.to_numpy(zero_copy_only=False)[part.request_user]
    asked = pd.DataFrame({"user_id": names, "t": part.request_time, "n": range(len(names))})
    joined = pd.merge_asof(asked.sort_values("t"), rows.sort_values("t"), on="t", by="user_id").sort_values("n")
    lists = daily.select(list(LIST_TYPES)).take(pa.array(joined["row"].astype("Int64"), from_pandas=True))
    events, counts = events_of_lists(lists)
    attributes = dict(zip(*(users.column(name).to_pylist() for name in ("user_id", "attributes")), strict=True))
    return PartFeatures(
        request=np.arange(len(names)),
        static=np.stack([hash_static(attributes[user]) for user in names]),
        counts=counts,
        events={
            "item": np.array([int(item[1:]) for item in events.item_ids], np.int32),
            "time_ms": events.times,
            "play_ms": events.play_ms,
            "duration_ms": events.duration_ms,
            "labels": events.labels,
        },
    )


def make_catalogue(items: pa.Table) -> Catalogue:
    """SIDs by hand: the first code is the tag, the other two number the items of a tag."""
    row = np.arange(items.num_rows)
    sids = np.stack([row % TAGS, row // TAGS % CODES, row // TAGS // CODES], 1).astype(np.int32)
    return Catalogue.from_items(items, sids=sids, codes=CODES)


@pytest.fixture(scope="session")
def write_log() -> Callable[[Path, pa.Table], Log]:
    """``write_log(folder, exposures)`` writes a run's data folder."""

    def write(folder: Path, exposures: pa.Table) -> Log:
        folder.mkdir(parents=True, exist_ok=True)
        items = make_items()
        names = [f"u{user}" for user in range(USERS)]
        users = conform(
            pa.table({"user_id": names, "attributes": [[f"likes=t{k % TAGS}"] for k in range(USERS)]}), USER
        )
        for name, table in (("items", items), ("users", users)):
            pq.write_table(table, folder / f"{name}.parquet")
        item_ids = items.column("item_id").combine_chunks()
        sequences_of_table(exposures, item_ids, folder, lambda part, rows: make_features(part, rows, users))
        return Log(folder, exposures, make_catalogue(items))

    return write


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory, write_log: Callable[[Path, pa.Table], Log]) -> Log:
    """The log, written once."""
    return write_log(tmp_path_factory.mktemp("run") / "data", make_exposures())


@pytest.fixture(scope="session")
def model_config() -> V2Config:
    return MODEL
