import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from features.settings import settings
from models.training.loop import TrainingDiverged
from models.training.pretrain import PretrainConfig, pretrain
from models.training.ray import RayUnavailable, TrainingFailed, check

CONFIG = PretrainConfig(batch_requests=16, max_steps=6, warmup_steps=2, threads=1, precision="fp32", log_every=2)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of two CPUs on loopback; its sockets need a short path."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=folder,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 * 2**20,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ONEREC_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield
    settings.cache_clear()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_ray_trains_the_same_weights_and_never_resumes_by_name(log, model_config, tmp_path, address) -> None:
    pretrain(log.folder, log.catalogue, model_config, CONFIG, tmp_path / "here")
    for attempt in range(2):  # Ray itself would hold the second one, of the same name, to be finished
        there = tmp_path / f"there{attempt}"
        metrics = pretrain(log.folder, log.catalogue, model_config, CONFIG, there, ray_address=address, name="run-1")
        assert metrics["step"] == 6
        expected, found = weights(tmp_path / "here"), weights(there)
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert (tmp_path / "home" / "ray" / "run-1").exists()
    again = pretrain(log.folder, log.catalogue, model_config, CONFIG, there, ray_address="127.0.0.1:1", name="run-1")
    assert again == metrics


def test_a_worker_s_failure_arrives_as_what_it_was(log, model_config, tmp_path, address) -> None:
    config = replace(CONFIG, learning_rate=float("inf"))
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        pretrain(log.folder, log.catalogue, model_config, config, tmp_path / "a", ray_address=address, name="run-2")
    (tmp_path / "data").mkdir()
    for name in ("exposures", "features"):
        shutil.copy(log.folder / f"{name}.parquet", tmp_path / "data")
    with pytest.raises(TrainingFailed, match=r"run-3.*items\.parquet"):
        pretrain(
            tmp_path / "data", log.catalogue, model_config, CONFIG, tmp_path / "b", ray_address=address, name="run-3"
        )


@pytest.mark.long
def test_two_workers_share_each_batch(log, model_config, tmp_path, address) -> None:
    model = replace(model_config, dropout=0.0)
    alone = pretrain(log.folder, log.catalogue, model, CONFIG, tmp_path / "one")
    together = pretrain(
        log.folder, log.catalogue, model, CONFIG, tmp_path / "two", ray_address=address, name="run-4", workers=2
    )
    assert together["examples"] == alone["examples"]
    assert together["holdout/loss"] == pytest.approx(alone["holdout/loss"], abs=0.02)


@pytest.mark.parametrize("wrong", ["", "onerec", "127.0.0.1:none"])
def test_addresses_are_checked(wrong: str) -> None:
    with pytest.raises(RayUnavailable, match="expected host:port"):
        check(wrong)


def test_a_dead_ray_is_reported_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RayUnavailable, match="onerec up"):
        check(f"127.0.0.1:{port}")


def test_several_workers_need_ray(log, model_config, tmp_path) -> None:
    with pytest.raises(ValueError, match="2 workers need Ray"):
        pretrain(log.folder, log.catalogue, model_config, CONFIG, tmp_path, workers=2)
