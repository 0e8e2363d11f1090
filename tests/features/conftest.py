"""A made-up exposure log for the tests that need any, and a real one for those that need truth."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from features.histories.context import Pathway, pathway_from_windows
from features.histories.windows import Limits, empty_window, fold, positives, window_of
from features.schema import EXPOSURE, FLAGS

START = 1_700_000_000_000
MINUTE, DAY = 60_000, 86_400_000
ITEMS = 30
KUAIRAND = Path(__file__).resolve().parents[2] / "../shared/data/KuaiRand-Pure"


@pytest.fixture(scope="session")
def kuairand() -> Path:
    """A KuaiRand-Pure folder: the one that ONEREC_TEST_KUAIRAND names, else the one that lies beside the checkout."""
    if given := os.environ.get("ONEREC_TEST_KUAIRAND"):
        assert Path(given).is_dir(), f"ONEREC_TEST_KUAIRAND names {given}, which is no folder"
        return Path(given)
    if not KUAIRAND.is_dir():
        pytest.skip(f"no KuaiRand-Pure: ONEREC_TEST_KUAIRAND is not set and {KUAIRAND} is no folder")
    return KUAIRAND.resolve()


def draw_exposures(rows: int, *, users: int = 5, seed: int = 0, prefix: str = "u", days: int = 8) -> pa.Table:
    """EXPOSURE rows in order of time, on whole minutes so that some tie: users ``prefix``0.., items i0..i29.

    Four exposures in a row of a user are a request. Every exposure was watched for some time.
    """
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows)
    nth = np.array([(user[:row] == user[row]).sum() for row in range(rows)], np.int64)
    duration = rng.integers(5_000, 60_000, rows)
    columns = {
        "exposure_id": [f"{prefix}{seed}-exposure{row}" for row in range(rows)],
        "request_id": [f"{prefix}{each}-request{number // 4}" for each, number in zip(user, nth, strict=True)],
        "user_id": [f"{prefix}{each}" for each in user],
        "item_id": [f"i{item}" for item in rng.integers(0, ITEMS, rows)],
        "sid": pa.nulls(rows, EXPOSURE.field("sid").type),
        "position": rng.integers(0, 10, rows).astype(np.int32),
        "event_time": START + np.sort(rng.integers(0, days * DAY // MINUTE, rows)) * MINUTE,
        "source": ["organic"] * rows,
        "model_version": pa.nulls(rows, pa.string()),
        "log_probs": pa.nulls(rows, EXPOSURE.field("log_probs").type),
        "duration_ms": duration,
        "play_ms": 1 + (rng.random(rows) ** 2 * 1.2 * duration).astype(np.int64),
        **{flag: rng.random(rows) < 0.1 for flag in FLAGS},
    }
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in EXPOSURE], schema=EXPOSURE)


@pytest.fixture(scope="session")
def make_exposures() -> Callable[..., pa.Table]:
    """``draw_exposures``; a fixture because test modules cannot import from a conftest."""
    return draw_exposures


def fold_log(
    log: pa.Table, users: list[str], times: np.ndarray, item_index: pd.Index, limits: Limits
) -> tuple[Pathway, Pathway]:
    """Short-term and positive pathways by the slow reference: a fold for each (user, time) over the user's log."""
    events, owner = window_of(log), np.array(log["user_id"].to_pylist(), object)
    logs = [events.take(owner == user) for user in users]
    short = [fold(empty_window(), own, limits.short, time) for own, time in zip(logs, times, strict=True)]
    positive = [fold(empty_window(), positives(own), limits.positive, t) for own, t in zip(logs, times, strict=True)]
    return (
        pathway_from_windows(short, times, item_index, limits.short),
        pathway_from_windows(positive, times, item_index, limits.positive),
    )


@pytest.fixture(scope="session")
def folded() -> Callable[..., tuple[Pathway, Pathway]]:
    """``fold_log``."""
    return fold_log
