"""Amazon review sequences in the layout of the S3-Rec / TIGER protocol (arXiv 2008.07873, 2305.05065).

``interactions.parquet`` has one row a user (user_id, item_ids, timestamps in seconds, -1 unknown; without that column
all are), its lists in the published order; ``items.parquet`` has item_id, title and attributes (brand and categories,
which become tags). The published order is kept although events of one day lie there by ascending ASIN: leave-one-out
figures of papers are measured on it. A time in the future or before 1990 is as good as none. ``shuffle_ties`` puts each
user's events of one time into a random order instead. Left out: the ``keywords`` (the title again, cut short), ratings
and review texts.
"""

import html
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.datasets.dataset import TOO_FEW, Chunk, Dataset, Seen, collect, no_rejects
from features.datasets.interactions import OLDEST_MS, UNKNOWN_TIME, interactions_table, latest_ms
from features.datasets.text import header
from features.schema import ITEM, USER, conform

EXPECTED = "Amazon sequences: interactions.parquet and items.parquet"
CHUNK_USERS = 50_000

_LOG, _ITEMS = "interactions.parquet", "items.parquet"
_LOG_COLUMNS = ("user_id", "item_ids")
_TIMES = "timestamps"
_ITEM_COLUMNS = ("item_id", "title", "attributes")
_UNEQUAL = "item_ids and timestamps have not the same length"
_EMPTY = "user_id or an item id is empty"


def holds_amazon(path: Path) -> bool:
    """Whether ``path`` is a folder of Amazon sequences."""
    return (path / _LOG).is_file() and (path / _ITEMS).is_file()


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
        """Sequences and items."""
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
        header(self.path / _LOG, _LOG_COLUMNS)
        header(self.path / _ITEMS, _ITEM_COLUMNS)
        users = pq.read_metadata(self.path / _LOG).num_rows
        if users == 0:
            raise ValueError(f"{self.path / _LOG} has no rows; expected one row a user")
        if users == 1:
            raise ValueError(f"the log in {self.path} has 1 user; {TOO_FEW}")

    def chunks(self, scratch: Path, skip: Collection[str] = ()) -> Iterator[Chunk]:
        """See ``dataset.Log``; a row is a user, so each batch of rows is a chunk."""
        timed = _TIMES in header(self.path / _LOG, _LOG_COLUMNS)
        file = pq.ParquetFile(self.path / _LOG)
        columns = [*_LOG_COLUMNS, *([_TIMES] if timed else [])]
        batches = file.iter_batches(batch_size=CHUNK_USERS, columns=columns)
        for number, batch in enumerate(batches):
            if f"users-{number}" not in skip:
                log, rejected = _split(_timed(pa.Table.from_batches([batch])))
                yield Chunk(key=f"users-{number}", exposures=self._exposures(log, number), rejected=rejected)

    def items(self, seen: Seen) -> Iterator[tuple[pa.Table, pa.Table]]:
        """See ``dataset.Log``; items that only the log names get a row without title."""
        header(self.path / _ITEMS, _ITEM_COLUMNS)
        table = pq.read_table(self.path / _ITEMS, columns=list(_ITEM_COLUMNS))
        ids = _strings(table["item_id"])
        titles = [html.unescape(title) if title else None for title in table["title"].to_pylist()]
        tags = [[html.unescape(tag) for tag in names] if names else None for names in table["attributes"].to_pylist()]
        unknown = sorted(set(seen.items["item_id"].to_pylist()) - set(ids))
        columns = {
            "item_id": pa.array([*ids, *unknown], pa.string()),
            "title": pa.array([*titles, *([None] * len(unknown))], pa.string()),
            "tags": pa.array([*tags, *([None] * len(unknown))], pa.list_(pa.string())),
            "duration_ms": pa.array([0] * (len(ids) + len(unknown)), pa.int64()),
        }
        yield conform(pa.table(columns), ITEM), no_rejects()

    def users(self, seen: Seen) -> pa.Table:
        """See ``dataset.Log``: nothing is known of the users."""
        return conform(seen.users, USER)

    def _exposures(self, log: pa.Table, number: int) -> pa.Table:
        counts = log["item_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        users = np.repeat(_strings(log["user_id"]), counts)
        items = _strings(log["item_ids"].combine_chunks().flatten())
        seconds = log["timestamps"].combine_chunks().flatten().cast(pa.int64()).fill_null(UNKNOWN_TIME).to_numpy()
        if self.shuffle_ties is not None:
            owner = np.repeat(np.arange(len(counts)), counts)
            items = _shuffled(items, owner, seconds, (self.shuffle_ties, number))
        known = (seconds * 1000 >= OLDEST_MS) & (seconds * 1000 <= latest_ms())
        return interactions_table(users, items, np.where(known, seconds * 1000, UNKNOWN_TIME))


def load_amazon(path: Path, *, shuffle_ties: int | None = None) -> Dataset:
    """The whole log in memory; see ``Amazon``."""
    return collect(Amazon(path, shuffle_ties), path)


def _timed(log: pa.Table) -> pa.Table:
    """With a column of unknown times where there is none."""
    if _TIMES in log.column_names:
        return log
    lengths = log["item_ids"].combine_chunks().value_lengths().to_pylist()
    unknown = [None if length is None else [UNKNOWN_TIME] * length for length in lengths]
    return log.append_column(_TIMES, pa.array(unknown, pa.list_(pa.int64())))


def _split(log: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows whose lists can be read side by side, and the others as text with the reason."""
    log = log.combine_chunks()
    items, times = (log[name].combine_chunks() for name in ("item_ids", "timestamps"))
    lengths = [values.value_lengths().fill_null(0).to_numpy() for values in (items, times)]
    nulls = np.zeros(log.num_rows, bool) | ~log["user_id"].combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    of_item = np.repeat(np.arange(log.num_rows), lengths[0])
    nulls[of_item[items.flatten().is_null().to_numpy(zero_copy_only=False)]] = True
    unequal = lengths[0] != lengths[1]
    bad = log.filter(pa.array(nulls | unequal))
    columns: dict[str, list[str]] = {
        name: [str(value) for value in bad[name].to_pylist()] for name in (*_LOG_COLUMNS, _TIMES)
    }
    columns["file"] = [_LOG] * bad.num_rows
    columns["reason"] = [_UNEQUAL if row else _EMPTY for row in unequal[nulls | unequal]]
    return log.filter(pa.array(~(nulls | unequal))), pa.table({k: pa.array(v, pa.string()) for k, v in columns.items()})


def _strings(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    strings: np.ndarray = values.cast(pa.string()).to_numpy(zero_copy_only=False)
    return strings


def _shuffled(items: np.ndarray, user: np.ndarray, seconds: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """``items`` with each run of equal (user, time) permuted; a row without a time stays where it is."""
    if not len(items):
        return items
    opens = np.r_[True, (user[1:] != user[:-1]) | (seconds[1:] != seconds[:-1]) | (seconds[1:] < 0)]
    shuffled: np.ndarray = items[np.lexsort((np.random.default_rng(seed).random(len(items)), np.cumsum(opens)))]
    return shuffled
