"""KuaiRand: Kuaishou's logs with twelve feedback signals (Gao et al., CIKM 2022, arXiv 2208.10696), official layout.

Reads ``log_standard*.csv``, ``user_features*.csv`` and ``video_features_basic*.csv`` of the Pure, 1K and 27K
releases, however many log files there are; a log larger than one chunk is streamed. The log has no request ids:
impressions of a user less than 30 minutes apart share one. It has no ``collect`` signal, so that flag is False. Left
out: the randomised logs, and ``video_features_statistic*.csv``, whose counters over the whole period would leak the
future into every prediction.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.datasets.dataset import TOO_FEW, Chunk, Seen
from features.datasets.interactions import OLDEST_MS, impressions_table, latest_ms
from features.datasets.text import TextFiles, as_text, header, read_text, reject, text_batches, text_chunks
from features.schema import ITEM, TIME, USER, conform

EXPECTED = (
    "KuaiRand: log_standard*.csv, user_features*.csv and video_features_basic*.csv, in this folder or in its data/"
)
UNREAD = {
    "log_random*.csv": "videos shown at random, whatever the user likes: not what a recommender should learn to show",
    "video_features_statistic*.csv": "LEAK: counters over the whole period know the future of every impression in it",
}

_FLAG_COLUMNS = {
    "click": "is_click",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
    "dislike": "is_hate",
    "profile_enter": "is_profile_enter",
    "long_view": "long_view",
}
_LOG_COLUMNS = ("user_id", "video_id", "time_ms", "play_time_ms", "duration_ms", *_FLAG_COLUMNS.values())
_VIDEO_COLUMNS = ("video_id", "author_id", "upload_dt", "video_duration", "music_id", "tag")
_ATTRIBUTES = (
    "user_active_degree",
    "register_days_range",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "is_video_author",
    "onehot_feat0",
    "onehot_feat1",
)
"""Eight categorical columns: as many as the user-static pathway hashes."""
_USER_COLUMNS = ("user_id", *_ATTRIBUTES)


def holds_kuairand(path: Path) -> bool:
    """Whether ``path`` or its ``data`` folder holds a KuaiRand log."""
    return any(next(folder.glob("log_standard*.csv"), None) for folder in (path, path / "data"))


@dataclass(frozen=True)
class KuaiRand:
    """The log below ``path``, the release's folder or its data/ folder."""

    path: Path

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.path if next(self.path.glob("log_standard*.csv"), None) else self.path / "data"

    @property
    def name(self) -> str:
        """The release."""
        return self.folder.resolve().parent.name if self.folder.name == "data" else self.folder.resolve().name

    @property
    def files(self) -> list[Path]:
        """Log, videos and users; raises ValueError when one kind is missing."""
        patterns = ("log_standard*.csv", "video_features_basic*.csv", "user_features*.csv")
        return [file for pattern in patterns for file in _files(self.folder, pattern)]

    @property
    def unread(self) -> dict[str, str]:
        """Files that are there and not read."""
        return {file.name: why for pattern, why in UNREAD.items() for file in sorted(self.folder.glob(pattern))}

    @property
    def text(self) -> TextFiles:
        """The log files."""
        return TextFiles(files=_files(self.folder, "log_standard*.csv"), required=_LOG_COLUMNS, user="user_id")

    @property
    def parts(self) -> int:
        """See ``dataset.Log``."""
        return self.text.partitions

    @property
    def labels(self) -> dict[str, str]:
        """See ``dataset.Published``."""
        return _FLAG_COLUMNS

    @property
    def played(self) -> bool:
        """See ``dataset.Published``."""
        return True

    def check(self) -> None:
        """Reads the headers, and the log until it has met two users; raises ValueError naming what is wrong.

        A log of one user is refused: there is nobody whose behaviour could be told from anybody else's.
        """
        for pattern, required in (("user_features*.csv", _USER_COLUMNS), ("video_features_basic*.csv", _VIDEO_COLUMNS)):
            for file in _files(self.folder, pattern):
                header(file, required)
        users = self.text.first_users(2)
        if not users:
            raise ValueError(f"the log in {self.folder} has no rows; expected impressions in log_standard*.csv")
        if len(users) == 1:
            raise ValueError(f"the log in {self.folder} has 1 user ({users.pop()!r}); {TOO_FEW}")

    def chunks(self, scratch: Path, skip: Collection[str] = ()) -> Iterator[Chunk]:
        """See ``dataset.Log``."""
        return text_chunks(self.text.frames(scratch, skip), _parse, _exposures)

    def items(self, seen: Seen) -> Iterator[tuple[pa.Table, pa.Table]]:
        """See ``dataset.Log``; a missing duration is taken from the log when the video is there."""
        matched = np.zeros(seen.items.num_rows, bool)
        known = seen.items.column("item_id").combine_chunks()
        for file in _files(self.folder, "video_features_basic*.csv"):
            names = [*header(file, _VIDEO_COLUMNS), "file"]
            for batch in text_batches(file, names):
                rows = pc.index_in(batch.column(names.index("video_id")), value_set=known).drop_null().to_numpy()
                matched[rows] = True
                yield _items(batch.to_pandas(), seen)
        alone = seen.items.filter(pa.array(~matched)).column("item_id")
        if len(alone):
            yield _items(
                pd.DataFrame({"video_id": alone.to_pandas()}).reindex(columns=_VIDEO_COLUMNS, fill_value=""), seen
            )

    def users(self, seen: Seen) -> pa.Table:
        """See ``dataset.Log``."""
        users = pd.concat([read_text(file, _USER_COLUMNS) for file in _files(self.folder, "user_features*.csv")])
        users = users[users["user_id"] != ""].drop_duplicates("user_id")
        unknown = pd.Index(seen.users.column("user_id").to_pylist()).difference(pd.Index(users["user_id"]))
        values = users[list(_ATTRIBUTES)].to_numpy()
        attributes = [[f"{n}={v}" for n, v in zip(_ATTRIBUTES, row, strict=True) if v] for row in values]
        table = pa.table(
            {
                "user_id": pa.array([*users["user_id"], *unknown], pa.string()),
                "attributes": pa.array([*attributes, *([] for _ in unknown)], pa.list_(pa.string())),
            }
        )
        return conform(table, USER)


def _files(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder} holds no {pattern}; the KuaiRand release has one, copy it there")
    return files


def _parse(log: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Numeric columns and, per row, why it is rejected ("" = valid); the first reason that applies wins."""
    numbers = pd.DataFrame({c: pd.to_numeric(log[c], errors="coerce") for c in _LOG_COLUMNS[2:]})
    numbers["user_id"], numbers["video_id"] = log["user_id"], log["video_id"]
    reasons = pd.Series("", index=log.index, dtype=object)
    reject(reasons, log["malformed"] != "", "the number of columns is not the header's")
    for column in ("user_id", "video_id"):
        reject(reasons, log[column] == "", f"{column} is empty")
    for column in _LOG_COLUMNS[2:]:
        reject(reasons, numbers[column].isna(), f"{column} is not a number")
    for column in _FLAG_COLUMNS.values():
        reject(reasons, ~numbers[column].isin((0, 1)), f"{column} is neither 0 nor 1")
    reject(reasons, numbers["duration_ms"] <= 0, "duration_ms is not positive")
    reject(reasons, numbers["play_time_ms"] < 0, "play_time_ms is negative")
    reject(reasons, numbers["time_ms"] <= 0, "time_ms is not positive")
    reject(reasons, numbers["time_ms"] < OLDEST_MS, "time_ms is before 1990: a clock that was never set")
    reject(reasons, numbers["time_ms"] > latest_ms(), "time_ms lies in the future")
    return numbers, reasons


def _exposures(log: pd.DataFrame) -> pa.Table:
    values = {flag: log[column].to_numpy() == 1 for flag, column in _FLAG_COLUMNS.items()}
    values["duration_ms"] = log["duration_ms"].to_numpy(np.int64)
    values["play_ms"] = log["play_time_ms"].to_numpy(np.int64)
    user, video = log["user_id"].to_numpy(object), log["video_id"].to_numpy(object)
    return impressions_table(user, video, log["time_ms"].to_numpy(np.int64), values)


def _items(videos: pd.DataFrame, seen: Seen) -> tuple[pa.Table, pa.Table]:
    """ITEM rows and rejected rows of video rows."""
    videos = videos[videos["video_id"] != ""].drop_duplicates("video_id").reset_index(drop=True)
    duration = pd.to_numeric(videos["video_duration"], errors="coerce")
    logged = pd.Series(seen.durations_of(pa.array(videos["video_id"], pa.string())))
    duration = duration.where(duration > 0).fillna(logged)
    rejected = videos[duration.isna()].assign(reason="video_duration is not a positive number")
    videos = videos[duration.notna()]
    upload = pd.to_datetime(videos["upload_dt"], errors="coerce", utc=True).dt.as_unit("ms")
    table = pa.table(
        {
            "item_id": pa.array(videos["video_id"], pa.string()),
            "tags": pa.array([t.split(",") if t else None for t in videos["tag"]], pa.list_(pa.string())),
            "author_id": pa.array(videos["author_id"].replace("", None), pa.string()),
            "music_id": pa.array(videos["music_id"].replace({"": None, "0": None, "0.0": None}), pa.string()),
            "duration_ms": duration[duration.notna()].to_numpy(np.int64),
            "upload_time": pa.array(upload, TIME),
        }
    )
    return conform(table, ITEM), as_text(rejected)
