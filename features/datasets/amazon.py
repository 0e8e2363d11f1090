"""Amazon review sequences in the layout of the S3-Rec / TIGER protocol (arXiv 2008.07873, 2305.05065).

``interactions.parquet`` has one row a user (user_id, item_ids, timestamps, -1 unknown; without that column all are),
its lists in the published order; ``items.parquet`` has item_id and, where they are known, title and attributes (brand
and categories, which become tags). Ids are numbers or text. Times are seconds; numbers of the size of milli-, micro- or
nanoseconds, whole days since 1970 and ISO 8601 are understood. The published order is kept although events of one day
lie there by ascending ASIN: leave-one-out figures of papers are measured on it. A time in the future or before 1990 is
as good as none. ``shuffle_ties`` puts each user's events of one time into a random order instead. Left out: the
``keywords`` (the title again, cut short), ratings and review texts.
"""

import html
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.datasets.columns import milliseconds, split_tags
from features.datasets.dataset import TOO_FEW, Chunk, Dataset, Seen, collect
from features.datasets.interactions import DAY_MS, OLDEST_MS, UNKNOWN_TIME, interactions_table, latest_ms
from features.datasets.text import as_strings, as_text, header, parquet_batches
from features.schema import ITEM, USER, conform

EXPECTED = "Amazon sequences: interactions.parquet and items.parquet"
CHUNK_USERS = 50_000

_LOG, _ITEMS = "interactions.parquet", "items.parquet"
_LOG_COLUMNS = ("user_id", "item_ids")
_TIMES = "timestamps"
_ITEM_COLUMNS = ("item_id", "title", "attributes")
_UNEQUAL = "item_ids and timestamps have not the same length"
_EMPTY = "user_id or an item id is empty"
_NOTHING = "item_ids is empty"


def holds_amazon(path: Path) -> bool:
    """Whether ``path`` is a folder of Amazon sequences."""
    return (path / _LOG).is_file()


@dataclass(frozen=True)
class Amazon:
    """The sequences in the folder ``path``; every interaction is a click and a long view.

    With a seed in ``shuffle_ties``, events of a user that carry the same time are put into a random order.
    """

    path: Path
    shuffle_ties: int | None = None

    @property
    def name(self) -> str:
        """The folder."""
        return self.path.resolve().name

    @property
    def files(self) -> list[Path]:
        """Sequences and items; raises ValueError when the items are missing."""
        if not (self.path / _ITEMS).is_file():
            raise ValueError(
                f"{self.path} holds {_LOG} but no {_ITEMS}; put it there, one row an item: item_id, and title and "
                "attributes where they are known"
            )
        return [self.path / _LOG, self.path / _ITEMS]

    @property
    def unread(self) -> dict[str, str]:
        """Files that are there and not read."""
        return {name: "the names of attribute ids" for name in ("attributes.csv",) if (self.path / name).exists()}

    @property
    def parts(self) -> int:
        """See ``dataset.Log``."""
        return -(-pq.read_metadata(self.path / _LOG).num_rows // CHUNK_USERS)

    @property
    def labels(self) -> dict[str, str]:
        """See ``dataset.Published``."""
        return {}

    @property
    def played(self) -> bool:
        """See ``dataset.Published``."""
        return False

    def check(self) -> None:
        """Reads the two files' columns and the number of users; raises ValueError naming what is wrong."""
        self._columns()
        if pq.read_metadata(self.path / _LOG).num_rows == 1:
            raise ValueError(f"the log in {self.path} has 1 user; {TOO_FEW}")

    def chunks(self, scratch: Path, skip: Collection[str] = ()) -> Iterator[Chunk]:
        """See ``dataset.Log``; a row is a user, so each batch of rows is a chunk."""
        for number, batch in enumerate(parquet_batches(self.path / _LOG, self._columns(), CHUNK_USERS)):
            if f"users-{number}" not in skip:
                rows, rejected = _rows(batch)
                if self.shuffle_ties is not None:
                    rows["item_id"] = _shuffled(rows, (self.shuffle_ties, number))
                yield _chunk(f"users-{number}", rows, rejected)

    def items(self, seen: Seen) -> Iterator[tuple[pa.Table, pa.Table]]:
        """See ``dataset.Log``; items that only the log names get a row without title.

        Raises ValueError when ids of the log and of the items have nothing in common.
        """
        path = self.path / _ITEMS
        columns = [name for name in header(path, _ITEM_COLUMNS[:1]) if name in _ITEM_COLUMNS]
        schema = pa.schema([pq.read_schema(path).field(name) for name in columns])
        table = pa.Table.from_batches(parquet_batches(path, columns), schema).combine_chunks()
        ids, named = set(_texts(table["item_id"].combine_chunks())), seen.items["item_id"].to_pylist()
        if ids and ids.isdisjoint(named):
            raise ValueError(
                f"{path} describes none of the {len(named)} items of {_LOG} (ids such as {min(named)!r} there, "
                f"{min(ids)!r} here); give both the same ids"
            )
        yield _items(table, seen)

    def users(self, seen: Seen) -> pa.Table:
        """See ``dataset.Log``: nothing is known of the users."""
        return conform(seen.users, USER)

    def _columns(self) -> list[str]:
        """What to read of the log; raises ValueError where rows or a column are missing or hold no lists."""
        log, items = self.files
        header(items, _ITEM_COLUMNS[:1])
        names, schema = header(log, _LOG_COLUMNS), pq.read_schema(log)
        if not pq.read_metadata(log).num_rows:
            raise ValueError(f"{log} has no rows; expected one row a user")
        lists = ["item_ids", *([_TIMES] if _TIMES in names and not pa.types.is_null(schema.field(_TIMES).type) else [])]
        for name in lists:
            kind = schema.field(name).type
            if not _holds_lists(kind):
                raise ValueError(
                    f"{log} has {name} of type {kind}; expected one row a user, with lists. A table of one row an "
                    "interaction is read by a map of its columns (--map user_id=...,item_id=...,event_time=...)"
                )
        return ["user_id", *lists]


def load_amazon(path: Path, *, shuffle_ties: int | None = None) -> Dataset:
    """The whole log in memory; see ``Amazon``."""
    return collect(Amazon(path, shuffle_ties), path)


def _rows(batch: pa.RecordBatch) -> tuple[pd.DataFrame, pa.Table]:
    """(row, user_id, item_id, time_ms) of each interaction; as text the rows that cannot be read, with the reason."""
    users, items, lengths = _texts(batch["user_id"]), _texts(batch["item_ids"].flatten()), _lengths(batch["item_ids"])
    row = np.repeat(np.arange(len(users)), lengths)
    timed = _TIMES in batch.schema.names
    unequal = _lengths(batch[_TIMES]) != lengths if timed else np.zeros(len(users), bool)
    nothing = lengths == 0
    bad = unequal | nothing | (users == "")
    bad[row[items == ""]] = True
    rejected = pd.DataFrame(
        {name: [str(value) for value in batch.filter(pa.array(bad))[name].to_pylist()] for name in batch.schema.names}
    )
    reasons = np.select([unequal, nothing], [_UNEQUAL, _NOTHING], _EMPTY)[bad]
    kept = ~bad[row]
    times = np.full(len(row), UNKNOWN_TIME)[kept]
    if timed:
        times = _times(batch.filter(pa.array(~bad))[_TIMES].flatten())
    rows = pd.DataFrame({"row": row[kept], "user_id": users[row[kept]], "item_id": items[kept], "time_ms": times})
    return rows, as_text(rejected.assign(file=_LOG, reason=reasons))


def _times(given: pa.Array) -> np.ndarray:
    """int64 UTC ms; UNKNOWN_TIME where nothing is given, or what a clock that was never set would say."""
    if pa.types.is_temporal(given.type):
        given = given.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
    values = given.to_pandas()
    numbers = pd.to_numeric(values, errors="coerce")
    known = numbers[numbers >= 0]
    days = len(known) and known.between(OLDEST_MS // DAY_MS, latest_ms() // DAY_MS).all()
    times = numbers * DAY_MS if days else milliseconds(values)
    return np.where(times.between(OLDEST_MS, latest_ms()), times, UNKNOWN_TIME).astype(np.int64)


def _chunk(key: str, rows: pd.DataFrame, rejected: pa.Table) -> Chunk:
    """Without exact repeats; what repeats without a time may have happened at another."""
    repeats = rows.duplicated(["user_id", "item_id", "time_ms"]) & (rows["time_ms"] != UNKNOWN_TIME)
    rows = rows[~repeats]
    known = rows[rows["time_ms"] != UNKNOWN_TIME]
    backwards = known.groupby("user_id")["time_ms"].diff() < 0
    user, item, times = (rows[name].to_numpy() for name in ("user_id", "item_id", "time_ms"))
    return Chunk(
        key=key,
        exposures=interactions_table(user, item, times),
        rejected=rejected,
        duplicates=int(repeats.sum()),
        untimed=len(rows) - len(known),
        unordered=known.loc[backwards, "user_id"].nunique(),
    )


def _items(table: pa.Table, seen: Seen) -> tuple[pa.Table, pa.Table]:
    """ITEM rows of what is known and of what only the log names, and the rows without an id or of an id seen before."""
    ids = pd.Series(_texts(table["item_id"].combine_chunks()))
    wrong = (ids == "") | ids.duplicated()
    titles = _texts(table["title"].combine_chunks()) if "title" in table.column_names else np.full(len(ids), "")
    tags = _tags(table["attributes"].combine_chunks()) if "attributes" in table.column_names else [None] * len(ids)
    kept = np.flatnonzero(~wrong)
    unknown = sorted(set(seen.items["item_id"].to_pylist()) - set(ids))
    columns = {
        "item_id": pa.array([*ids[kept], *unknown], pa.string()),
        "title": pa.array([*(html.unescape(titles[k]) or None for k in kept), *([None] * len(unknown))], pa.string()),
        "tags": pa.array([*(tags[k] for k in kept), *([None] * len(unknown))], pa.list_(pa.string())),
        "duration_ms": pa.array([0] * (len(kept) + len(unknown)), pa.int64()),
    }
    reasons = np.where(ids == "", "item_id is empty", "item_id stands there twice; the first row counts")
    rejected = pd.DataFrame({"item_id": ids, "title": titles, "file": _ITEMS, "reason": reasons})
    return conform(pa.table(columns), ITEM), as_text(rejected[wrong])


def _tags(given: pa.Array) -> list[list[str] | None]:
    """From lists, or from text that holds several."""
    if not _holds_lists(given.type):
        return split_tags([html.unescape(text) for text in _texts(given)])
    lists = given.to_pylist()
    return [[html.unescape(str(tag)) for tag in tags if tag is not None] or None if tags else None for tags in lists]


def _holds_lists(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _lengths(lists: pa.Array) -> np.ndarray:
    lengths: np.ndarray = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _texts(values: pa.Array) -> np.ndarray:
    texts: np.ndarray = as_strings(values).to_numpy(zero_copy_only=False)
    return texts


def _shuffled(rows: pd.DataFrame, seed: tuple[int, int]) -> np.ndarray:
    """The items with each run of equal (row, time) permuted; what has no time stays where it is."""
    if rows.empty:
        return rows["item_id"].to_numpy()
    row, times = rows["row"].to_numpy(), rows["time_ms"].to_numpy()
    opens = np.r_[True, (row[1:] != row[:-1]) | (times[1:] != times[:-1]) | (times[1:] < 0)]
    chance = np.random.default_rng(seed).random(len(rows))
    shuffled: np.ndarray = rows["item_id"].to_numpy()[np.lexsort((chance, np.cumsum(opens)))]
    return shuffled
