"""Any log in CSV or Parquet, by a map from our fields to its columns.

``user_id``, ``item_id`` and ``event_time`` are needed. With ``duration_ms`` and ``play_ms`` the rows are impressions,
otherwise interactions (``features.datasets.interactions``). ``event_time`` is ISO 8601 (UTC unless it says otherwise)
or a number whose size says whether it counts seconds, milli-, micro- or nanoseconds. A map is ``field=column,...`` or
a TOML or JSON file with tables ``columns`` and ``items`` (its ``file`` and the ITEM fields). Left out: user attributes.
"""

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from features.datasets.dataset import TOO_FEW, Chunk, Seen, no_rejects
from features.datasets.interactions import OLDEST_MS, impressions_table, interactions_table, latest_ms
from features.datasets.text import TextFiles, as_text, header, read_text, reject, text_chunks
from features.schema import FLAGS, ITEM, TIME, USER, conform

NEEDED = ("user_id", "item_id", "event_time")
PLAYED = ("duration_ms", "play_ms")
FIELDS = (*NEEDED, *PLAYED, "request_id", *FLAGS)
ITEM_FIELDS = ("item_id", "title", "tags", "author_id", "music_id", "duration_ms", "upload_time")
SEPARATORS = "|,;"
"""What may stand between tags; the first that occurs in the column is taken."""

_TRUE, _FALSE = ("1", "1.0", "true", "t", "yes"), ("", "0", "0.0", "false", "f", "no")
_EXAMPLE = "such as user_id=uid,item_id=iid,event_time=ts"


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """Which column holds which field; raises ValueError for fields that do not exist, are missing or named twice."""

    columns: Mapping[str, str]
    items: Mapping[str, str] = field(default_factory=dict)
    items_file: str = ""

    def __post_init__(self) -> None:
        for kind, given, known in (("columns", self.columns, FIELDS), ("items", self.items, ITEM_FIELDS)):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"the map's {kind} name {', '.join(unknown)}; the fields are {', '.join(known)}")
            if not all(isinstance(column, str) and column for column in given.values()):
                raise ValueError(f"the map's {kind} are {dict(given)}; each field needs the name of one column")
            twice = sorted({c for c in given.values() if list(given.values()).count(c) > 1})
            if twice:
                raise ValueError(f"the map's {kind} use {', '.join(twice)} for two fields; each column means one thing")
        missing = [name for name in NEEDED if name not in self.columns]
        if missing:
            raise ValueError(f"the map lacks {', '.join(missing)}; give a column for each, {_EXAMPLE}")
        if ("duration_ms" in self.columns) != ("play_ms" in self.columns):
            raise ValueError("the map has one of duration_ms and play_ms; give both, or neither for plain interactions")
        if bool(self.items) != bool(self.items_file) or (self.items and "item_id" not in self.items):
            raise ValueError("the map's items need a file and a column for item_id, beside the other fields")


def read_map(given: str) -> ColumnMap:
    """A map from ``field=column,...`` or the path of a .toml or .json file; raises ValueError saying what is wrong."""
    if "=" in given:
        pairs = [pair.partition("=") for pair in given.split(",") if pair.strip()]
        names = [name.strip() for name, _, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the map {given!r} names {', '.join(twice)} twice")
        return ColumnMap(columns={name.strip(): column.strip() for name, _, column in pairs})
    path = Path(given)
    if path.suffix not in (".toml", ".json") or not path.is_file():
        raise ValueError(f"the map {given!r} is neither pairs ({_EXAMPLE}) nor a .toml or .json file that exists")
    try:
        tables = tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the map {path} cannot be read: {error}") from error
    if not isinstance(tables, dict) or set(tables) - {"columns", "items"} or "columns" not in tables:
        raise ValueError(f"the map {path} must hold a table `columns`, and may hold one named `items`")
    items = dict(tables.get("items", {}))
    return ColumnMap(columns=tables["columns"], items_file=str(items.pop("file", "")), items=items)


@dataclass(frozen=True)
class Columns:
    """The CSV or Parquet files at ``path`` (one file, or all of a folder) read by ``map``."""

    path: Path
    map: ColumnMap

    @property
    def name(self) -> str:
        """The file or folder."""
        return self.path.resolve().stem

    @property
    def files(self) -> list[Path]:
        """The log's files, then that of the items; raises ValueError without any."""
        return [*self.text.files, *([self._items_path] if self.map.items else [])]

    @property
    def unread(self) -> dict[str, str]:
        """Nothing is left aside."""
        return {}

    @property
    def text(self) -> TextFiles:
        """The log files."""
        if not self.path.exists():
            raise ValueError(f"{self.path} does not exist; give a CSV or Parquet file, or a folder of them")
        found = [self.path] if self.path.is_file() else sorted(self.path.iterdir())
        files = [p for p in found if p.suffix in (".csv", ".parquet") and p != self._items_path]
        if not files:
            raise ValueError(f"{self.path} holds no .csv or .parquet file")
        return TextFiles(files=files, required=tuple(self.map.columns.values()), user=self.map.columns["user_id"])

    @property
    def parts(self) -> int:
        """See ``dataset.Log``."""
        return self.text.partitions

    @property
    def labels(self) -> dict[str, str]:
        """See ``dataset.Published``."""
        return {name: column for name, column in self.map.columns.items() if name in FLAGS}

    @property
    def played(self) -> bool:
        """See ``dataset.Published``."""
        return "play_ms" in self.map.columns

    def check(self) -> None:
        """Reads the headers, and the log until it has met two users; raises ValueError naming what is wrong."""
        if self.map.items:
            header(self._items_path, tuple(self.map.items.values()))
        users = self.text.first_users(2)
        if not users:
            raise ValueError(f"the log {self.path} has no rows with a {self.map.columns['user_id']}")
        if len(users) == 1:
            raise ValueError(f"the log {self.path} has 1 user ({users.pop()!r}); {TOO_FEW}")

    def chunks(self, scratch: Path, skip: Collection[str] = ()) -> Iterator[Chunk]:
        """See ``dataset.Log``."""
        return text_chunks(self.text.frames(scratch, skip), self._parse, self._exposures)

    def items(self, seen: Seen) -> Iterator[tuple[pa.Table, pa.Table]]:
        """See ``dataset.Log``; items without a row of their own get what the log says of them."""
        rows = pd.DataFrame(columns=ITEM_FIELDS, dtype=object)
        rejected = no_rejects()
        if self.map.items:
            given = read_text(self._items_path, tuple(self.map.items.values()))
            wrong = given[self.map.items["item_id"]] == ""
            rejected = as_text(given[wrong].assign(reason=f"{self.map.items['item_id']} is empty"))
            rows = pd.DataFrame({name: given.loc[~wrong, column] for name, column in self.map.items.items()})
            rows = rows.drop_duplicates("item_id")
        unknown = pd.Index(seen.items.column("item_id").to_pylist()).difference(pd.Index(rows["item_id"]))
        rows = pd.concat([rows, pd.DataFrame({"item_id": unknown})], ignore_index=True)
        yield _items(rows.reindex(columns=ITEM_FIELDS).fillna(""), seen), rejected

    def users(self, seen: Seen) -> pa.Table:
        """See ``dataset.Log``: only their ids are known."""
        return conform(seen.users, USER)

    @property
    def _items_path(self) -> Path:
        folder = self.path.parent if self.path.is_file() else self.path
        return folder / self.map.items_file

    def _parse(self, raw: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
        """Our fields and, per row, why it is rejected ("" = valid)."""
        given = {name: raw[column] for name, column in self.map.columns.items()}
        reasons = pd.Series("", index=raw.index, dtype=object)
        reject(reasons, raw["malformed"] != "", "the number of columns is not the header's")
        log = pd.DataFrame(index=raw.index)
        for name in ("user_id", "item_id", *(("request_id",) if "request_id" in given else ())):
            log[name] = given[name]
            reject(reasons, given[name] == "", f"{self.map.columns[name]} is empty")
        log["time"] = milliseconds(given["event_time"])
        reject(reasons, log["time"].isna(), f"{self.map.columns['event_time']} is no time")
        reject(reasons, log["time"] < OLDEST_MS, f"{self.map.columns['event_time']} is before 1990: a clock never set")
        reject(reasons, log["time"] > latest_ms(), f"{self.map.columns['event_time']} lies in the future")
        for name in (n for n in PLAYED if n in given):
            log[name] = pd.to_numeric(given[name], errors="coerce")
            reject(reasons, log[name].isna(), f"{self.map.columns[name]} is not a number")
            reject(reasons, log[name] < 0, f"{self.map.columns[name]} is negative")
        if "duration_ms" in given:
            reject(reasons, log["duration_ms"] == 0, f"{self.map.columns['duration_ms']} is not positive")
        for name in (n for n in FLAGS if n in given):
            text = given[name].str.lower()
            log[name] = text.isin(_TRUE)
            reject(reasons, ~text.isin((*_TRUE, *_FALSE)), f"{self.map.columns[name]} is neither true nor false")
        return log, reasons

    def _exposures(self, log: pd.DataFrame) -> pa.Table:
        flags = {name: log[name].to_numpy(bool) for name in FLAGS if name in log}
        user, item = log["user_id"].to_numpy(object), log["item_id"].to_numpy(object)
        times = log["time"].to_numpy(np.int64)
        requests = log["request_id"].to_numpy(object) if "request_id" in log else None
        if "duration_ms" not in log and requests is None:
            order = np.lexsort((np.arange(len(log)), times, pd.factorize(user)[0]))
            flags = {name: flag[order] for name, flag in flags.items()}
            return interactions_table(user[order], item[order], times[order], flags or None)
        nothing = np.zeros(len(log), np.int64)
        values = {name: log[name].to_numpy(np.int64) if name in log else nothing for name in PLAYED}
        if "duration_ms" not in log and not flags:
            flags = {name: np.ones(len(log), bool) for name in ("click", "long_view")}
        return impressions_table(user, item, times, {**values, **flags}, requests)


def milliseconds(text: pd.Series) -> pd.Series:
    """float64, UTC; a number below 1e11 counts seconds, below 1e14 milli-, below 1e17 microseconds; NaN is no time."""
    number = pd.to_numeric(text, errors="coerce")
    unit = np.select([number < 1e11, number < 1e14, number < 1e17], [1e3, 1.0, 1e-3], 1e-6)
    result = number * unit
    written = number.isna() & (text != "")
    if written.any():
        parsed = pd.to_datetime(text[written], errors="coerce", utc=True, format="ISO8601")
        stamps = parsed.dt.as_unit("ms").astype(np.int64).astype(np.float64)
        result[written] = stamps.where(parsed.notna())
    return result.floordiv(1)


def split_tags(texts: Sequence[str]) -> list[list[str] | None]:
    """The tags in each text, None where there are none; see ``SEPARATORS``."""
    separator = next((s for s in SEPARATORS if any(s in text for text in texts)), SEPARATORS[0])
    return [[tag.strip() for tag in text.split(separator) if tag.strip()] or None for text in texts]


def _items(rows: pd.DataFrame, seen: Seen) -> pa.Table:
    duration = pd.to_numeric(rows["duration_ms"], errors="coerce")
    logged = pd.Series(seen.durations_of(pa.array(rows["item_id"], pa.string())))
    duration = duration.where(duration > 0).fillna(logged).fillna(0)
    upload = milliseconds(rows["upload_time"])
    columns: dict[str, pa.Array] = {
        name: pa.array(rows[name].replace("", None), pa.string()) for name in ("title", "author_id", "music_id")
    }
    columns |= {
        "item_id": pa.array(rows["item_id"], pa.string()),
        "tags": pa.array(split_tags(rows["tags"].tolist()), pa.list_(pa.string())),
        "duration_ms": pa.array(duration.to_numpy(np.int64)),
        "upload_time": pa.array(upload.to_numpy(), from_pandas=True).cast(pa.int64()).cast(TIME),
    }
    return conform(pa.table(columns), ITEM)
