import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from features.runs import folder_digest
from features.settings import settings
from models.rewards.reward import save_reward
from models.tokenizer.tokenizer import TokenizerConfig
from models.training.align import align
from models.training.alignment import AlignConfig
from models.training.loop import TrainingDiverged
from models.training.pretrain import PretrainConfig, pretrain
from models.training.ray import RayUnavailable, TrainingFailed, check
from models.training.tokenizer import fit_tokenizer
from pipelines.processes import free_ports

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


@pytest.mark.long
def test_a_worker_s_failure_arrives_as_what_it_was(log, model_config, tmp_path, address, monkeypatch) -> None:
    monkeypatch.setattr("models.training.ray.MAX_FAILURES", 0)
    config = replace(CONFIG, learning_rate=float("inf"))
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        pretrain(log.folder, log.catalogue, model_config, config, tmp_path / "a", ray_address=address, name="run-2")
    shutil.copytree(log.folder, tmp_path / "data")
    (tmp_path / "data" / "items.parquet").unlink()
    with pytest.raises(TrainingFailed, match=r"run-3.*items\.parquet"):
        pretrain(
            tmp_path / "data", log.catalogue, model_config, CONFIG, tmp_path / "b", ray_address=address, name="run-3"
        )


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_workers_make_the_same_steps_as_one(log, model_config, tmp_path, address, parallel) -> None:
    model, config = replace(model_config, dropout=0.0), replace(CONFIG, weight_decay=0.0)
    alone = pretrain(log.folder, log.catalogue, model, config, tmp_path / "one")
    config = replace(config, parallel=parallel, ema_decay=0.0)
    job = {"ray_address": address, "name": f"share-{parallel}", "workers": 2}
    together = pretrain(log.folder, log.catalogue, model, config, tmp_path / "two", **job)
    assert together["examples"] == alone["examples"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert together["holdout/loss"] == pytest.approx(alone["holdout/loss"], rel=1e-4)
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)


@pytest.mark.long
def test_two_workers_roll_out_and_sharding_changes_nothing(log, model_config, random_reward, tmp_path, address) -> None:
    model = replace(model_config, dropout=0.0)
    pretrain(log.folder, log.catalogue, model, CONFIG, tmp_path / "init")
    save_reward(tmp_path / "reward.safetensors", random_reward(log.catalogue))
    config = AlignConfig(
        objective="ecpo",
        signal="hybrid",
        users_share=1.0,
        group=8,
        push_every=4,
        batch_requests=16,
        max_steps=4,
        checkpoint_every=2,
        weight_decay=0.0,
        threads=1,
        log_every=1,
    )
    for parallel in ("ddp", "fsdp"):
        metrics = align(
            *(log.folder, log.catalogue, replace(config, parallel=parallel), tmp_path / parallel),
            init=tmp_path / "init",
            reward=tmp_path,
            ray_address=address,
            name=f"align-{parallel}",
            workers=2,
        )
        assert (metrics["step"], metrics["rollouts/staleness"]) == (4, 3)
    expected, found = weights(tmp_path / "ddp"), weights(tmp_path / "fsdp")
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)


@pytest.mark.long
@pytest.mark.parametrize("kill_at", [5, 9])
def test_a_killed_worker_changes_nothing(log, model_config, tmp_path, address, kill_at: int) -> None:
    """SIGKILL of one of two workers: Ray starts both anew, they go on from the checkpoint to the same weights."""
    config = replace(CONFIG, epochs=2, max_steps=24, checkpoint_every=4, log_every=1, ema_decay=0.5)
    job = {"ray_address": address, "workers": 2}
    pretrain(log.folder, log.catalogue, model_config, config, tmp_path / "whole", name=f"whole-{kill_at}", **job)
    killer = Thread(target=kill_a_worker, args=(tmp_path / "killed" / "metrics.jsonl", kill_at))
    killer.start()
    pretrain(log.folder, log.catalogue, model_config, config, tmp_path / "killed", name=f"killed-{kill_at}", **job)
    killer.join()
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))
    assert (tmp_path / "killed" / "killed").exists()


def kill_a_worker(log: Path, step: int) -> None:
    """Waits for the record of ``step``, then kills the youngest training worker below this process."""
    while not log.exists() or f'"step": {step},' not in log.read_text():
        time.sleep(0.01)
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2, [p.cmdline() for p in psutil.Process().children(recursive=True)]
    workers[-1].send_signal(signal.SIGKILL)
    (log.parent / "killed").touch()


@pytest.mark.parametrize("wrong", ["", "onerec", "127.0.0.1:none"])
def test_addresses_are_checked(wrong: str) -> None:
    with pytest.raises(RayUnavailable, match="expected host:port"):
        check(wrong)


def test_a_dead_ray_is_reported_at_once() -> None:
    with pytest.raises(RayUnavailable, match="onerec up"):
        check(f"127.0.0.1:{next(free_ports(1))}")


def test_several_workers_need_ray(log, model_config, tmp_path) -> None:
    with pytest.raises(ValueError, match="2 workers need Ray"):
        pretrain(log.folder, log.catalogue, model_config, CONFIG, tmp_path, workers=2)


@pytest.mark.long
def test_ray_fits_the_same_tokenizer(log, tmp_path, address) -> None:
    config = TokenizerConfig(codes=8, dim=8, width=16, layers=1, batch=16, max_steps=6)
    for name, where in (("here", ""), ("there", address)):
        fit_tokenizer(log.folder, config, tmp_path / name, ray_address=where, name="run-5")
    assert folder_digest(tmp_path / "here") == folder_digest(tmp_path / "there")
