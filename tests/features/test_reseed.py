"""An emptied on-line store gets back what it held, from real object and feature stores."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from features import reseed
from features.histories.context import Pathway
from features.histories.windows import Limits
from features.intake import exposures, partitions
from features.online import OnlineFeatures
from features.repository import write_registry
from features.schema import FEEDBACK, IMPRESSION
from features.settings import Settings
from features.storage import Storage

LIMITS = Limits(short=6, positive=9, lifelong=4)
INDEX = pd.Index([f"i{item}" for item in range(25)], dtype=object)


@pytest.fixture
def online(tmp_path: Path, valkey: tuple[str, int, str]) -> OnlineFeatures:
    config = Settings(home=tmp_path, redis=f"{valkey[0]}:{valkey[1]}", redis_password=valkey[2])
    write_registry(config=config)
    return OnlineFeatures.connect(config=config)


@pytest.mark.parametrize("joined_share", [1.0, 0.0, 0.5])
def test_windows_come_back(
    joined_share: float,
    s3: Storage,
    online: OnlineFeatures,
    make_exposures: Callable[..., pa.Table],
    folded: Callable[..., tuple[Pathway, Pathway]],
) -> None:
    """Whether events were joined to exposures already, not yet, or in part; a second run changes nothing."""
    prefix = f"reseed{joined_share}-"
    log = make_exposures(200, users=5, seed=3, prefix=prefix).sort_by("event_time")
    times = log["event_time"].cast(pa.int64()).to_numpy()
    joined = int(len(log) * joined_share)
    exposures.write(s3, log.slice(0, joined))
    rest = log.slice(max(joined - 20, 0))  # some lie in both
    for kind, schema in (("impression", IMPRESSION), ("feedback", FEEDBACK)):
        partitions.write(s3, partitions.events_root(kind), rest.select(schema.names).cast(schema))
    days = int((times[-1] - times[0]) // 86_400_000) + 2
    assert reseed.reseed(s3, online, days, LIMITS) >= 5
    users = [f"{prefix}{user}" for user in range(5)]
    now = np.full(5, times[-1] + 1)
    context, flags = online.context(users, now, INDEX, LIMITS)
    for name, expected in zip(("short", "positive"), folded(log, users, now, INDEX, LIMITS), strict=True):
        for field in dataclasses.fields(expected):
            actual = getattr(getattr(context, name), field.name)
            np.testing.assert_array_equal(actual, getattr(expected, field.name), err_msg=f"{name}.{field.name}")
    assert "cold" not in flags
    assert reseed.reseed(s3, online, days, LIMITS) == 0


def test_an_empty_store_and_one_that_is_away(
    s3: Storage, online: OnlineFeatures, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reseed.reseed(s3, online, 3) == 0
    monkeypatch.setattr(reseed, "connect", lambda: s3)
    monkeypatch.setattr(reseed, "write_registry", lambda: None)
    monkeypatch.setattr(OnlineFeatures, "connect", lambda: online)
    assert reseed.main(["--days", "3"]) == 0
    assert "0 windows changed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        reseed.main(["--days", "0"])
    assert caught.value.code == 2
