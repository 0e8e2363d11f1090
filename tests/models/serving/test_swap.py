"""Followers swap whole bundles: several replicas converge, roll back the same way, and what they leave is freed."""

import asyncio
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from features.histories.context import Context
from features.storage import Storage
from models.bundle import publish, set_alias
from models.pathways import PATHWAYS
from models.serving.cache import prune
from models.serving.contexts import Contexts
from models.serving.predictor import Predictor
from models.serving.protocol import Options
from models.serving.recommender import Recommender
from models.serving.reload import Follower

TIME = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def versions(s3: Storage, write_bundle: Callable[..., Path], tmp_path: Path) -> list[str]:
    folders = [write_bundle(tmp_path / str(seed), seed=seed) for seed in range(2)]
    return [publish(s3, folder, data_time=TIME + timedelta(days=day)) for day, folder in enumerate(folders)]


def nobody() -> Contexts:
    return Contexts.of([None], np.array([1_767_312_000_000]), [frozenset()], Options())


def test_replicas_converge_and_roll_back(s3: Storage, versions: list[str], tmp_path: Path) -> None:
    replicas = [Follower("onerec", "production", s3, tmp_path / str(each)) for each in range(2)]
    for version in (*versions, versions[0]):
        set_alias(s3, "production", version)
        for replica in replicas:
            replica.check()
        assert [replica.version for replica in replicas] == [version, version]
        assert all(replica.about()["ready"] and not replica.reason for replica in replicas)


def test_swaps_under_load_fail_nothing_name_one_version_each_and_free_the_old_one(
    s3: Storage, versions: list[str], tmp_path: Path
) -> None:
    set_alias(s3, "production", versions[0])
    follower = Follower("onerec", "production", s3, tmp_path / "cache")
    follower.check()
    left: list[weakref.ref] = []

    async def ask(predictor: Predictor, going: asyncio.Event, seen: list[str]) -> None:
        while not going.is_set():
            answer = await predictor.predict(nobody(), "r", time.monotonic() + 60)
            seen.append(answer.model_version)

    async def main() -> list[str]:
        predictor, done, seen = Predictor(follower, ThreadPoolExecutor(1)), asyncio.Event(), []
        callers = [asyncio.create_task(ask(predictor, done, seen)) for _ in range(3)]
        for swap in range(1, 7):
            left.append(weakref.ref(follower.recommender.bundle.model))
            set_alias(s3, "production", versions[swap % 2])
            await asyncio.to_thread(follower.check)
            enough = len(seen) + 3
            while len(seen) < enough:
                await asyncio.sleep(0.005)
        done.set()
        await asyncio.gather(*callers)  # nobody was failed
        return seen

    seen = asyncio.run(main())
    assert set(seen) == set(versions)
    gc.collect()
    assert [freed() for freed in left] == [None] * len(left)


def test_a_new_version_warms_up_on_the_model_s_thread_before_it_serves(
    s3: Storage, versions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = Follower(
        *("onerec", "production", s3, tmp_path / "cache"), warm_up=(2, 5), threads=ThreadPoolExecutor(1, "model")
    )
    ran: list[tuple[str, int, str, str | None]] = []
    recommend = Recommender.recommend

    def recorded(self: Recommender, context: Context, **options: Any) -> Any:
        behaviours = sum(int((getattr(context, name).item >= 0).sum()) for name in PATHWAYS)
        ran.append((self.bundle.version, behaviours, threading.current_thread().name, follower.version))
        return recommend(self, context, **options)

    monkeypatch.setattr(Recommender, "recommend", recorded)
    for version, before in ((versions[0], None), (versions[1], versions[0])):
        ran.clear()
        set_alias(s3, "production", version)
        follower.check()
        assert ran == [(version, behaviours, "model_0", before) for behaviours in (0, 2, 5)]
        assert follower.version == version


def test_a_version_that_cannot_answer_is_refused(
    s3: Storage, versions: list[str], write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    set_alias(s3, "production", versions[0])
    follower = Follower("onerec", "production", s3, tmp_path / "cache", threads=ThreadPoolExecutor(1))
    follower.check()
    weights = write_bundle(tmp_path / "nan", seed=5) / "model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights)
    bad = publish(s3, weights.parent, data_time=TIME)
    set_alias(s3, "production", bad)
    follower.check()
    assert follower.version == versions[0]
    assert follower.reason.startswith(f"refused {bad}: the model's logits are NaN")


@pytest.mark.parametrize("stored", [b"{not json", b'["x"]', b'{"name": "x"}', b'{"version": ".."}'])
def test_an_alias_that_is_none_changes_nothing_but_the_reason(
    s3: Storage, versions: list[str], tmp_path: Path, stored: bytes
) -> None:
    set_alias(s3, "production", versions[0])
    follower = Follower("onerec", "production", s3, tmp_path / "cache")
    follower.check()
    s3.put("models/onerec/aliases/production.json", stored)
    for _ in range(2):
        follower.check(retry_refused=True)
        assert "alias 'production' cannot be read" in follower.reason or "no complete bundle '..'" in follower.reason
        assert follower.version == versions[0]
    assert (tmp_path / "cache" / versions[0]).is_dir()
    set_alias(s3, "production", versions[1])
    follower.check()
    assert (follower.version, follower.reason) == (versions[1], "")


def test_whatever_goes_wrong_with_a_bundle_it_is_refused_and_left_alone_for_a_while(
    s3: Storage, versions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_alias(s3, "production", versions[0])
    follower, tried = Follower("onerec", "production", s3, tmp_path / "cache"), []
    follower.check()

    def broken(self: Recommender) -> None:
        tried.append(self.bundle.version)
        raise IndexError("index 9 is out of bounds")

    monkeypatch.setattr(Recommender, "prove", broken)
    set_alias(s3, "production", versions[1])
    for _ in range(3):
        follower.check()
    assert tried == [versions[1]]
    assert follower.reason.startswith(f"refused {versions[1]}: index 9")
    assert follower.version == versions[0]


def test_old_bundles_leave_the_disk_but_not_those_that_somebody_serves(tmp_path: Path) -> None:
    names = [f"2026010{day}T000000-{day:08x}" for day in range(1, 7)]
    for age, name in enumerate(reversed(names)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "else").mkdir()
    (tmp_path / "frozen.serving").write_text(names[0])
    assert prune(tmp_path, "onerec", names[1], 2) == [names[3], names[2]]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {*names[:2], *names[4:], "else"}
    os.utime(tmp_path / names[4])
    assert prune(tmp_path, "onerec", names[1], 0) == [names[5]]  # used a moment ago: somebody may be loading it
    assert (tmp_path / names[4]).exists()
