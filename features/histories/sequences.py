"""Every user's events in order and an index of all requests by time, on disk: what training reads, memory-mapped.

``SequenceWriter`` appends parts of whole users (``features.histories.parts``); ``Sequences`` opens the folder and
gathers the pathways of any requests from it. Each request stores how many of its user's events precede it, so a
context is a slice that ends there: nothing at or after the request can enter it, and nothing is searched for. The
pathways equal ``windows.fold`` on the user's log. Left out: compression, since a compressed file cannot be mapped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from features.histories.columns import Growing, read_columns
from features.histories.context import STATIC_FIELDS, Pathway, compact
from features.histories.parts import Part
from features.histories.requests import Requests
from features.histories.windows import spans

EVENTS = pa.schema(
    [
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("time_ms", pa.int64()),
        ("play_ms", pa.int64()),
        ("duration_ms", pa.int64()),
        ("labels", pa.int32()),
    ]
)
"""One row an exposure, in the order of exposures.parquet: by (user, time, id)."""
POSITIVES = pa.schema([("row", pa.int64())])
USERS = pa.schema([("user_id", pa.large_string()), ("start", pa.int64()), ("positive_start", pa.int64())])
REQUESTS = pa.schema(
    [
        ("request_id", pa.large_string()),
        ("user", pa.int32()),
        ("time_ms", pa.int64()),
        ("size", pa.int64()),
        ("before", pa.int64()),
        ("positive_before", pa.int64()),
        ("features", pa.int64()),
    ]
)
"""One row a request in order of time; ``features`` is its row in FEATURES, -1 when it is not trained on."""
TARGETS = pa.schema([("row", pa.int64())])
"""The exposures of the first request, of the second, and so on: rows of EVENTS."""
FEATURES = pa.schema([("static", pa.list_(pa.int64(), STATIC_FIELDS)), ("lifelong", pa.int64())])
"""One row a trainable request: hashed attributes and its row in LIFELONG."""
LIFELONG = pa.schema([("start", pa.int64()), ("count", pa.int64())])
"""One row a distinct lifelong list: a slice of LIFELONG_EVENTS."""
LIFELONG_EVENTS = EVENTS.remove(EVENTS.get_field_index("user"))
FILES = {
    "events": EVENTS,
    "positives": POSITIVES,
    "users": USERS,
    "requests": REQUESTS,
    "targets": TARGETS,
    "features": FEATURES,
    "lifelong": LIFELONG,
    "lifelong_events": LIFELONG_EVENTS,
}
CHUNK = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class PartFeatures:
    """Point-in-time features of F of a part's requests."""

    request: np.ndarray
    """int64 [F], rows of the part's requests, ascending."""
    static: np.ndarray
    """int64 [F, STATIC_FIELDS]"""
    counts: np.ndarray
    """int64 [F], how many lifelong events each request has."""
    events: dict[str, np.ndarray]
    """LIFELONG_EVENTS' columns of all requests, one after the other."""


class SequenceWriter:
    """Builds the files of ``FILES`` in ``folder`` from parts; ``close`` puts all requests in order of time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scratch = folder / "growing"
        self._files = {name: Growing(self._scratch / name, schema) for name, schema in FILES.items()}

    def append(self, part: Part, features: PartFeatures | None = None) -> None:
        """Adds a part: users that no other part has. Without ``features`` its requests are context only."""
        files = self._files
        rows, users, positives = files["events"].rows, files["users"].rows, files["positives"].rows
        columns = {name: getattr(part, name) for name in EVENTS.names}
        files["events"].append(columns | {"user": part.user + np.int32(users)})
        files["positives"].append({"row": part.positive + rows})
        starts = {"start": part.start + rows, "positive_start": part.positive_start + positives}
        files["users"].append({"user_id": part.user_ids, **starts})
        row_of_features = np.full(len(part.request_time), -1)
        if features is not None:
            row_of_features[features.request] = files["features"].rows + np.arange(len(features.request))
            self._append_features(features)
        files["requests"].append(
            {
                "request_id": part.request_ids,
                "user": part.request_user + np.int32(users),
                "time_ms": part.request_time,
                "size": part.request_size,
                "before": part.before + rows,
                "positive_before": part.positive_before + positives,
                "features": row_of_features,
            }
        )
        files["targets"].append({"row": part.target + rows})

    def close(self) -> dict[str, int]:
        """Finishes the files; returns their rows."""
        ordered = self._ordered()
        counts = {}
        for name, file in self._files.items():
            counts[name] = file.rows
            if name in ordered:
                file.discard()
                file = ordered[name]
            file.finish(self.folder / f"{name}.arrow")
        self._scratch.rmdir()
        return counts

    def _ordered(self) -> dict[str, Growing]:
        """Requests and targets of all parts in order of time; nothing of the parts' stays mapped."""
        requests, targets = self._files["requests"], self._files["targets"]
        ordered = {name: Growing(self._scratch / f"{name}-ordered", FILES[name]) for name in ("requests", "targets")}
        sizes, rows, names = requests.column("size"), targets.column("row"), requests.array("request_id")
        first = np.cumsum(sizes) - sizes
        numbers = {name: requests.column(name) for name in REQUESTS.names if name != "request_id"}
        for chosen in _chunks(np.argsort(numbers["time_ms"], kind="stable")):
            columns = {name: column[chosen] for name, column in numbers.items()}
            ordered["requests"].append({"request_id": names.take(pa.array(chosen)), **columns})
            ordered["targets"].append({"row": rows[spans(first[chosen], sizes[chosen])]})
        return ordered

    def _append_features(self, features: PartFeatures) -> None:
        """Lists that repeat the one before (requests between two midnights share theirs) are stored once."""
        fresh = ~_repeats(features.counts, features.events)
        files = self._files
        row = files["lifelong"].rows + np.cumsum(fresh) - 1
        counts = features.counts[fresh]
        start = files["lifelong_events"].rows + np.cumsum(counts) - counts
        kept = np.repeat(fresh, features.counts)
        files["lifelong_events"].append({name: column[kept] for name, column in features.events.items()})
        files["lifelong"].append({"start": start, "count": counts})
        files["features"].append({"static": features.static, "lifelong": row})


def _chunks(order: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(order), CHUNK):
        yield order[start : start + CHUNK]


def _repeats(counts: np.ndarray, events: dict[str, np.ndarray]) -> np.ndarray:
    """bool [F]: the list of a row has the same events as the one before it."""
    same = np.r_[False, counts[1:] == counts[:-1]][: len(counts)]
    row = np.repeat(np.arange(len(counts)), counts)
    at = np.flatnonzero(same[row])
    back = at - counts[row[at]]
    for column in events.values():
        same[row[at[column[at] != column[back]]]] = False
    return same


class Sequences:
    """The folder that ``SequenceWriter`` wrote, mapped: opening it reads nothing."""

    def __init__(self, folder: Path) -> None:
        missing = [f"{name}.arrow" for name in FILES if not (folder / f"{name}.arrow").exists()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; prepare the run's data first")
        self.folder = folder
        batches = {name: read_columns(folder / f"{name}.arrow") for name in FILES}
        self.columns = {
            name: {field: _numpy(batch.column(field)) for field in batch.schema.names if not field.endswith("_id")}
            for name, batch in batches.items()
        }
        """The numbers of every file of ``FILES``, by its name."""
        self.user_ids: pa.Array = batches["users"].column("user_id")
        self.request_ids: pa.Array = batches["requests"].column("request_id")
        self.events, self.features = self.columns["events"], self.columns["features"]
        if len(self.columns["targets"]["row"]) != len(self):
            raise ValueError(f"{folder} was not written whole; prepare the run's data again")

    def __len__(self) -> int:
        """How many exposures there are."""
        return len(self.events["user"])

    @cached_property
    def requests(self) -> Requests:
        """All requests in order of time; ``rows`` are rows of the exposures."""
        columns = self.columns["requests"]
        return Requests(
            names=self.request_ids,
            users=self.user_ids,
            user=columns["user"],
            times_ms=columns["time_ms"],
            offsets=np.r_[0, np.cumsum(columns["size"])],
            rows=self.columns["targets"]["row"],
        )

    @cached_property
    def trainable(self) -> np.ndarray:
        """int64, ascending: the requests that have features."""
        return np.flatnonzero(self.columns["requests"]["features"] >= 0)

    def static(self, chosen: np.ndarray) -> np.ndarray:
        """int64 [B, STATIC_FIELDS], attributes of the requests numbered ``chosen``, all of them trainable."""
        return np.asarray(self.features["static"][self._features_of(chosen)])

    def short(self, chosen: np.ndarray, item_rows: np.ndarray, limit: int) -> Pathway:
        """The newest ``limit`` events before each request; ``item_rows`` turns items into catalogue rows (or -1)."""
        requests, users = self.columns["requests"], self.columns["users"]
        end, start = requests["before"][chosen], users["start"][requests["user"][chosen]]
        return self._pathway(self.events, None, start, end, requests["time_ms"][chosen], item_rows, limit)

    def positive(self, chosen: np.ndarray, item_rows: np.ndarray, limit: int) -> Pathway:
        """The newest ``limit`` events with high engagement before each request."""
        requests, users = self.columns["requests"], self.columns["users"]
        end, start = requests["positive_before"][chosen], users["positive_start"][requests["user"][chosen]]
        index = self.columns["positives"]["row"]
        return self._pathway(self.events, index, start, end, requests["time_ms"][chosen], item_rows, limit)

    def lifelong(self, chosen: np.ndarray, item_rows: np.ndarray, limit: int) -> Pathway:
        """The lifelong list of each request as the feature store knew it, its newest ``limit``."""
        row = self.features["lifelong"][self._features_of(chosen)]
        lists = self.columns["lifelong"]
        start = lists["start"][row]
        times = self.columns["requests"]["time_ms"][chosen]
        events = self.columns["lifelong_events"]
        return self._pathway(events, None, start, start + lists["count"][row], times, item_rows, limit)

    def _features_of(self, chosen: np.ndarray) -> np.ndarray:
        row = self.columns["requests"]["features"][chosen]
        assert (row >= 0).all(), "a request without features has no context"
        return row

    @staticmethod
    def _pathway(
        events: dict[str, np.ndarray],
        index: np.ndarray | None,
        start: np.ndarray,
        end: np.ndarray,
        times_ms: np.ndarray,
        item_rows: np.ndarray,
        limit: int,
    ) -> Pathway:
        """[B, limit]: the last rows of start..end of ``events``, or of the rows that ``index`` lists."""
        if not len(events["time_ms"]) or (index is not None and not len(index)):
            return Pathway.empty(len(start), limit)
        rows = end[:, None] - limit + np.arange(limit)
        valid = rows >= start[:, None]
        rows = np.where(valid, rows, 0)
        rows = rows if index is None else index[rows]

        def gather(column: np.ndarray, kind: type) -> np.ndarray:
            return np.where(valid, column[rows], 0).astype(kind)

        known = valid & (events["item"][rows] >= 0)
        item = np.where(known, item_rows[np.where(known, events["item"][rows], 0)], -1) if len(item_rows) else -1
        age_s = np.where(valid, (times_ms[:, None] - events["time_ms"][rows]) / 1000, 0)
        pathway = Pathway(
            item=np.broadcast_to(item, rows.shape).astype(np.int32),
            age_s=age_s.astype(np.float32),
            play_ms=gather(events["play_ms"], np.float32),
            duration_ms=gather(events["duration_ms"], np.float32),
            labels=gather(events["labels"], np.int32),
        )
        return compact(pathway) if (pathway.item[valid] < 0).any() else pathway


def _numpy(column: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        return _numpy(column.flatten()).reshape(len(column), column.type.list_size)
    values: np.ndarray = column.to_numpy(zero_copy_only=True)
    return values
