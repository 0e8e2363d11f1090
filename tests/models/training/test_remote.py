from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from features.storage import StorageUnavailable
from models.training import remote
from models.training.checkpoint import CHECKPOINT
from models.training.config import FitConfig
from models.training.loop import Loss, Plan, fit
from models.training.pretrain import PretrainConfig, pretrain
from models.training.remote import Remote, insistently
from models.training.stage import Workshop

CONFIG = FitConfig(warmup_steps=2, checkpoint_every=4, threads=1)
KEY = "checkpoints/run/pretrain.safetensors"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 1)


def plan(die_at: int = -1) -> Plan:
    def objective(model: nn.Module, x: torch.Tensor) -> Loss:
        if x[0, 0] == die_at:
            raise KeyboardInterrupt
        return Loss((model(x).squeeze(1) - x.sum(1)).square().mean(), {}, 4, 4)

    def example(step: int) -> torch.Tensor:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        x[0, 0] = step
        return x

    return Plan(steps=11, example=example, objective=objective, training={}, remote=KEY)


def test_a_machine_without_a_checkpoint_goes_on_from_the_store(environment, s3, tmp_path) -> None:
    whole, resumed = network(), network()
    fit(whole, plan(), CONFIG, tmp_path / "whole")
    s3.remove(KEY)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), plan(die_at=9), CONFIG, tmp_path / "lost")
    assert list(s3.keys("checkpoints/")) == [KEY]
    metrics = fit(resumed, plan(), CONFIG, tmp_path / "elsewhere")
    assert torch.equal(resumed.weight, whole.weight)
    assert metrics["examples"] == 44
    assert metrics["uploads_failed"] == 0
    assert (tmp_path / "elsewhere" / CHECKPOINT).read_bytes() == s3.get(KEY)
    remote.remove(KEY)
    assert not list(s3.keys("checkpoints/"))


def test_a_store_that_is_away_is_counted_and_training_goes_on(environment, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "connect", lambda: Away())
    found = Remote(KEY)
    (tmp_path / CHECKPOINT).write_bytes(b"weights")
    found.send(tmp_path / CHECKPOINT)
    found.send(tmp_path / CHECKPOINT)
    assert found.close(tmp_path / CHECKPOINT) == {"uploads_failed": 2}
    with pytest.raises(StorageUnavailable):
        Remote(KEY).fetch(tmp_path / "other" / CHECKPOINT)


class Away:
    def put_file(self, *_: object) -> None:
        raise StorageUnavailable("gone")

    get_file = put_file


def test_a_passing_failure_is_tried_again() -> None:
    answers = iter([StorageUnavailable("once"), StorageUnavailable("twice"), None])

    def work() -> None:
        answer = next(answers)
        if answer:
            raise answer

    insistently(work)
    assert next(answers, "all") == "all"


def test_a_stage_on_a_new_machine_ends_as_on_the_old_one(
    environment, s3, log, model_config, tmp_path, monkeypatch
) -> None:
    config = PretrainConfig(batch_requests=16, max_steps=10, checkpoint_every=4, threads=1)
    job = (log.folder, log.catalogue, model_config, config)
    pretrain(*job, tmp_path / "whole")
    build, calls = Workshop.example, iter(range(100))

    def dies(self, batch):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return build(self, batch)

    monkeypatch.setattr(Workshop, "example", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain(*job, tmp_path / "old", store="checkpoints/r1/pretrain")
    monkeypatch.setattr(Workshop, "example", build)
    assert len(list(s3.keys("checkpoints/r1/pretrain/"))) == 1
    other = replace(config, seed=1, max_steps=4)  # a retry with other settings neither resumes it nor is refused
    pretrain(*job[:3], other, tmp_path / "other", store="checkpoints/r1/pretrain")
    metrics = pretrain(*job, tmp_path / "new", store="checkpoints/r1/pretrain")
    whole, new = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "new"))
    assert all(torch.equal(new[name], whole[name]) for name in whole)
    assert (metrics["step"], metrics["uploads_failed"]) == (10, 0)
    assert not list(s3.keys("checkpoints/"))
