"""What drift is measured on: one number or name an exposure, for exposures, features, predictions and reward.

List columns cannot be tested, so SIDs become a code a level, log-probabilities their sum, a user's history how long it
is and how much of it was liked. Left out: what only training sees, such as hashed attributes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.histories.windows import is_positive
from features.schema import FLAGS, label_bits

SID_LEVELS = 3
LONG_CONTEXT = 256
"""Earlier views beyond so many are all alike to the model's short pathways."""
RARE = ("like", "follow", "comment", "forward", "collect", "profile_enter", "dislike")


@dataclass(frozen=True, kw_only=True)
class Column:
    """How one column is tested; only ``decides`` columns count for the verdict."""

    name: str
    method: str
    threshold: float
    categorical: bool = False
    decides: bool = True


COLUMNS = (
    Column(name="play_ratio", method="psi", threshold=0.03),
    Column(name="long_view", method="psi", threshold=0.02),
    Column(name="click", method="psi", threshold=0.02),
    Column(name="reward", method="psi", threshold=0.03),
    Column(name="engaged_tag", method="jensenshannon", threshold=0.15, categorical=True),
    Column(name="duration_s", method="psi", threshold=0.20),
    *(Column(name=name, method="psi", threshold=0.02) for name in RARE),
    Column(name="item_age_days", method="wasserstein", threshold=0.5, decides=False),
    Column(name="history_views", method="wasserstein", threshold=0.5, decides=False),
    Column(name="history_positive", method="wasserstein", threshold=0.5, decides=False),
    Column(name="log_prob", method="wasserstein", threshold=0.25, decides=False),
    *(
        Column(name=f"sid_{level}", method="jensenshannon", threshold=0.25, categorical=True, decides=False)
        for level in range(1, SID_LEVELS + 1)
    ),
)
"""Thresholds are ours, set on quiet and drifting weeks of the simulator (docs/log.md)."""


def frame(exposures: pa.Table, items: pa.Table) -> pd.DataFrame:
    """Scalars per exposure that drift is measured on: list columns cannot be tested.

    ``reward`` needs a reference (``rewarded``), the columns of ``contexts`` the user's earlier views; both come later.
    """
    duration = exposures["duration_ms"].to_numpy().astype(np.float64)
    play = exposures["play_ms"].to_numpy().astype(np.float64)
    long_view = exposures["long_view"].to_numpy(zero_copy_only=False)
    row = pc.index_in(exposures["item_id"], value_set=items["item_id"].combine_chunks())
    tags = pc.fill_null(pc.list_element(_first(items["tags"]), 0), "none").take(row)
    log_probs = pd.Series(exposures["log_probs"].to_pylist(), dtype=object)
    uploaded = items["upload_time"].take(row).cast(pa.int64())
    age_ms = pc.subtract(exposures["event_time"].cast(pa.int64()), uploaded).to_numpy(zero_copy_only=False)
    return pd.DataFrame(
        {
            "play_ratio": np.clip(play / np.maximum(duration, 1), 0, 3),
            "engaged_tag": pc.fill_null(tags, "unknown").to_pandas().where(long_view),
            "duration_s": duration / 1000,
            **{name: exposures[name].to_numpy(zero_copy_only=False).astype(float) for name in FLAGS},
            "item_age_days": age_ms.astype(float) / 86_400_000,
            "log_prob": log_probs.map(lambda values: float(np.sum(values)) if values is not None else np.nan),
            **_sid_columns(exposures),
        }
    )


def _first(tags: pa.ChunkedArray) -> pa.ChunkedArray:
    """The lists, an empty one as null: ``list_element`` refuses to look into it."""
    return pc.if_else(pc.greater(pc.fill_null(pc.list_value_length(tags), 0), 0), tags, pa.scalar(None, tags.type))


def _sid_columns(exposures: pa.Table) -> dict[str, pd.Series]:
    """The code of each level as text; None for what was served without a semantic ID."""
    sids = pd.Series(exposures["sid"].to_pylist(), dtype=object)
    return {
        f"sid_{level}": sids.map(
            lambda sid, place=level - 1: str(sid[place]) if sid is not None and len(sid) > place else None
        )
        for level in range(1, SID_LEVELS + 1)
    }


def rewarded(reference: pd.DataFrame, each: pd.DataFrame) -> np.ndarray:
    """Reward [n] of ``each``: -1 disliked, 1 in the longest-watched quarter of its durations in the reference, else 0.

    OneRec-V2's duration-aware reward (arXiv 2508.20900, 3.1.1) with everybody's plays of an octave of durations in
    place of the user's own: a distribution of many rows, that a person's few views cannot move.
    """
    octaves = [np.floor(np.log2(f["duration_s"].to_numpy() + 1)) for f in (reference, each)]
    ratio = pd.Series(reference["play_ratio"].to_numpy())
    top = ratio.groupby(octaves[0]).quantile(0.75)
    bound = pd.Series(octaves[1]).map(top).fillna(ratio.quantile(0.75)).to_numpy()
    long = (each["play_ratio"].to_numpy() > bound).astype(float)
    return np.where(each["dislike"].to_numpy() > 0, -1.0, long)


def contexts(exposures: pa.Table) -> pd.DataFrame:
    """What the model knew of the user at each exposure: his earlier views in the table, and how many he had liked."""
    play, duration = (exposures[name].to_numpy() for name in ("play_ms", "duration_ms"))
    liked = is_positive(play, duration, label_bits(exposures).to_numpy(zero_copy_only=False))
    rows = pd.DataFrame({"user": exposures["user_id"].to_pandas(), "time": exposures["event_time"].cast(pa.int64())})
    rows["liked"] = liked
    ordered = rows.sort_values("time", kind="stable")
    by_user = ordered.groupby("user")
    views = by_user.cumcount()
    positive = by_user["liked"].cumsum() - ordered["liked"]
    found = pd.DataFrame(
        {
            "history_views": views.clip(upper=LONG_CONTEXT).astype(float),
            "history_positive": (positive / views.where(views > 0)).astype(float),
        }
    )
    return found.sort_index()
