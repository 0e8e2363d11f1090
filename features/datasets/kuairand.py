"""KuaiRand: Kuaishou's logs with twelve feedback signals (Gao et al., CIKM 2022, arXiv 2208.10696), official layout.

Reads ``log_standard*.csv``, ``user_features*.csv`` and ``video_features_basic*.csv`` of the Pure, 1K and 27K
releases. The log has no request ids: impressions of a user less than 30 minutes apart share one. It has no
``collect`` signal, so that flag is False. Left out: the randomised logs, and ``video_features_statistic*.csv``, whose
counters over the whole period would leak the future into every prediction.
"""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from features.datasets.dataset import TOO_FEW, Dataset
from features.schema import EXPOSURE, FLAGS, ITEM, TIME, USER, conform, exposure_id

SESSION_GAP_MS = 30 * 60 * 1000

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


def load_kuairand(path: Path) -> Dataset:
    """The log below ``path`` (the release's folder or its data/ folder) without exact duplicates.

    Raises ValueError when a file or a column is missing (named), when the log is empty, or when no row is valid.
    """
    folder = _folder(path)
    log = pd.concat([_read(p, _LOG_COLUMNS) for p in _files(folder, "log_standard*.csv")], ignore_index=True).fillna("")
    if log.empty:
        raise _no_rows(folder)
    duplicated = log.drop(columns="file").duplicated()
    log = log[~duplicated].reset_index(drop=True)
    numbers, reasons = _parse(log)
    rejected = log[reasons != ""].assign(reason=reasons[reasons != ""])
    valid = numbers[reasons == ""]
    if valid.empty:
        raise ValueError(f"all {len(log)} rows of the log in {folder} were rejected; the first: {reasons.iloc[0]}")
    items, rejected_items = _items(folder, valid)
    return Dataset(
        name=folder.parent.name if folder.name == "data" else folder.name,
        items=items,
        users=_users(folder, valid),
        exposures=_exposures(valid),
        rejected=_as_text(pd.concat([rejected, rejected_items], ignore_index=True)),
        duplicates=int(duplicated.sum()),
    )


def check_kuairand(path: Path) -> None:
    """Reads the headers, and the log until it has met two users; raises ValueError as ``load_kuairand`` would.

    A log of one user is refused as well: there is nobody whose behaviour could be told from anybody else's.
    """
    folder = _folder(path)
    logs = _files(folder, "log_standard*.csv")
    for pattern, required in (("user_features*.csv", _USER_COLUMNS), ("video_features_basic*.csv", _VIDEO_COLUMNS)):
        for file in _files(folder, pattern):
            _header(file, required)
    users: set[str] = set()
    for file in logs:
        column = _header(file, _LOG_COLUMNS).index("user_id")
        with file.open(newline="", errors="replace") as text:
            rows = csv.reader(text)
            next(rows)
            for row in rows:
                users.update(row[column : column + 1])
                if len(users) > 1:
                    return
    if not users:
        raise _no_rows(folder)
    raise ValueError(f"the log in {folder} has 1 user ({users.pop()!r}); {TOO_FEW}")


def _folder(path: Path) -> Path:
    return path if next(path.glob("log_standard*.csv"), None) else path / "data"


def _no_rows(folder: Path) -> ValueError:
    return ValueError(f"the log in {folder} has no rows; expected impressions in log_standard*.csv")


def _files(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder} holds no {pattern}; the KuaiRand release has one, copy it there")
    return files


def _read(path: Path, required: tuple[str, ...]) -> pd.DataFrame:
    names = _header(path, required)
    # Everything as text first: a row that does not parse must be shown as it was, not as NaN.
    options = pa.csv.ConvertOptions(column_types={n: pa.string() for n in names}, strings_can_be_null=False)
    malformed: list[str] = []

    def keep_malformed(row: pa.csv.InvalidRow) -> str:
        malformed.append(row.text)
        return "skip"

    parse = pa.csv.ParseOptions(invalid_row_handler=keep_malformed)
    rows = pa.csv.read_csv(path, convert_options=options, parse_options=parse).to_pandas()
    if malformed:
        rows = pd.concat([rows.assign(malformed=""), pd.DataFrame({"malformed": malformed})]).fillna("")
    return rows.assign(file=path.name)


def _header(path: Path, required: tuple[str, ...]) -> list[str]:
    """The names of the columns; raises ValueError when one of ``required`` is not among them."""
    with path.open(errors="replace") as file:
        names = file.readline().strip().split(",")
    missing = [c for c in required if c not in names]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise ValueError(
            f"{path} lacks the column{plural} {', '.join(missing)}; it has {', '.join(filter(None, names)) or 'none'}: "
            "give the file as KuaiRand published it, header included"
        )
    return names


def _parse(log: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Numeric columns and, per row, why it is rejected ("" = valid); the first reason that applies wins."""
    numbers = pd.DataFrame({c: pd.to_numeric(log[c], errors="coerce") for c in _LOG_COLUMNS[2:]})
    numbers["user_id"], numbers["video_id"] = log["user_id"], log["video_id"]
    reasons = pd.Series("", index=log.index)

    def reject(wrong: pd.Series, reason: str) -> None:
        reasons[wrong & (reasons == "")] = reason

    if "malformed" in log:
        reject(log["malformed"] != "", "the number of columns is not the header's")
    for column in ("user_id", "video_id"):
        reject(log[column] == "", f"{column} is empty")
    for column in _LOG_COLUMNS[2:]:
        reject(numbers[column].isna(), f"{column} is not a number")
    for column in _FLAG_COLUMNS.values():
        reject(~numbers[column].isin((0, 1)), f"{column} is neither 0 nor 1")
    reject(numbers["duration_ms"] <= 0, "duration_ms is not positive")
    reject(numbers["play_time_ms"] < 0, "play_time_ms is negative")
    reject(numbers["time_ms"] <= 0, "time_ms is not positive")
    return numbers, reasons


def _exposures(log: pd.DataFrame) -> pa.Table:
    log = log.sort_values(["user_id", "time_ms"], kind="stable")
    user, time = log["user_id"].to_numpy(), log["time_ms"].to_numpy(np.int64)
    opens = np.ones(len(log), bool)
    opens[1:] = (user[1:] != user[:-1]) | (np.diff(time) >= SESSION_GAP_MS)
    first = np.flatnonzero(opens)[np.cumsum(opens) - 1]
    position = np.arange(len(log)) - first
    requests = [f"{u}-{t}" for u, t in zip(user[first], time[first], strict=True)]
    flags = {flag: log[column].to_numpy() == 1 for flag, column in _FLAG_COLUMNS.items()}
    table = pa.table(
        {
            "exposure_id": [exposure_id(r, "organic", int(p)) for r, p in zip(requests, position, strict=True)],
            "request_id": requests,
            "user_id": user,
            "item_id": log["video_id"].to_numpy(),
            "position": pa.array(position, pa.int32()),
            "event_time": pa.array(time).cast(TIME),
            "source": ["organic"] * len(log),
            "duration_ms": log["duration_ms"].to_numpy(np.int64),
            "play_ms": log["play_time_ms"].to_numpy(np.int64),
            **{flag: flags.get(flag, np.zeros(len(log), bool)) for flag in FLAGS},
        }
    )
    order = np.argsort(time, kind="stable")
    return conform(table.take(pa.array(order)), EXPOSURE)


def _items(folder: Path, log: pd.DataFrame) -> tuple[pa.Table, pd.DataFrame]:
    """ITEM rows and the rejected video rows; a missing duration is taken from the log when the video is there."""
    videos = pd.concat([_read(p, _VIDEO_COLUMNS) for p in _files(folder, "video_features_basic*.csv")])
    videos = videos[videos["video_id"] != ""].drop_duplicates("video_id")
    logged = log.groupby("video_id")["duration_ms"].median()
    unknown = logged.index.difference(pd.Index(videos["video_id"]))
    videos = pd.concat([videos, pd.DataFrame({"video_id": unknown})], ignore_index=True)
    duration = pd.to_numeric(videos["video_duration"], errors="coerce")
    duration = duration.where(duration > 0).fillna(videos["video_id"].map(logged))
    rejected = videos[duration.isna()].assign(reason="video_duration is not a positive number")
    videos = videos[duration.notna()].fillna("")
    upload = pd.to_datetime(videos["upload_dt"], errors="coerce", utc=True).dt.as_unit("ms")
    table = pa.table(
        {
            "item_id": videos["video_id"].to_numpy(),
            "tags": pa.array([t.split(",") if t else None for t in videos["tag"]], pa.list_(pa.string())),
            "author_id": pa.array(videos["author_id"].replace("", None), pa.string()),
            "music_id": pa.array(videos["music_id"].replace({"": None, "0": None, "0.0": None}), pa.string()),
            "duration_ms": duration[duration.notna()].to_numpy(np.int64),
            "upload_time": pa.array(upload, TIME),
        }
    )
    return conform(table, ITEM), rejected


def _users(folder: Path, log: pd.DataFrame) -> pa.Table:
    users = pd.concat([_read(p, _USER_COLUMNS) for p in _files(folder, "user_features*.csv")])
    users = users[users["user_id"] != ""].drop_duplicates("user_id").fillna("")
    unknown = pd.Index(log["user_id"].unique()).difference(users["user_id"])
    values = users[list(_ATTRIBUTES)].to_numpy()
    attributes = [[f"{n}={v}" for n, v in zip(_ATTRIBUTES, row, strict=True) if v] for row in values]
    table = pa.table(
        {
            "user_id": [*users["user_id"], *unknown],
            "attributes": pa.array([*attributes, *([] for _ in unknown)], pa.list_(pa.string())),
        }
    )
    return conform(table, USER)


def _as_text(rejected: pd.DataFrame) -> pa.Table:
    fields = [pa.field(str(c), pa.string()) for c in rejected.columns]
    return pa.Table.from_pandas(rejected, schema=pa.schema(fields), preserve_index=False)
