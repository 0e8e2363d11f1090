"""Roll-outs that a trainer asks a real roll-out server's endpoints for, beside those it draws itself."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastapi
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from scipy.stats import chi2_contingency

from features.histories.context import Context, Pathway
from features.storage import Storage
from models.bundle import Bundle, publish
from models.pathways import PATHWAYS, to_tensors
from models.serving.admin import Administrator
from models.serving.lookup import FeatureLookup
from models.serving.predictor import Predictor
from models.serving.rest import Rest
from models.serving.rollout import Pinned
from models.serving.server import Plane, Repository
from models.serving.telemetry import Telemetry
from models.serving.trainer import RolloutModel
from models.training.alignment import AlignConfig
from models.training.loop import Plan, fit
from models.training.on_policy import Alignment, Asked, Rollouts, Step
from models.training.rollout_server import RolloutsRefused, RolloutsUnavailable, ServerSampler
from models.training.rollouts import DrawConfig, InProcessSampler

FREE = DrawConfig(constrained=False)


def contexts(bundle: Bundle, requests: int = 3) -> Context:
    """Users of different histories, on the left padding as everywhere."""
    rng, n = np.random.default_rng(0), len(bundle.catalogue)

    def pathway(length: int) -> Pathway:
        shape = (requests, length)
        there = np.arange(length) >= rng.integers(0, length + 1, (requests, 1))
        values = {
            "item": np.where(there, rng.integers(0, n, shape), -1).astype(np.int32),
            "age_s": np.sort(rng.integers(1, 10**6, shape), 1)[:, ::-1] / np.float32(10),
            "play_ms": rng.integers(0, 20_000, shape).astype(np.float32),
            "duration_ms": rng.integers(5_000, 30_000, shape).astype(np.float32),
            "labels": rng.integers(0, 512, shape).astype(np.int32),
        }
        return Pathway(**{k: v if k == "item" else np.where(there, v, v.dtype.type(0)) for k, v in values.items()})

    limits = bundle.limits
    parts = {name: pathway(getattr(limits, name)) for name in PATHWAYS}
    return Context(static=rng.integers(0, 1024, (requests, 8)), **parts)


@pytest.fixture(scope="module")
def folder(write_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("rollout") / "bundle")


@pytest.fixture
def pinned(s3: Storage, folder: Path, tmp_path: Path) -> Pinned:
    made = Pinned("onerec", publish(s3, folder, data_time=datetime(2026, 1, 1, tzinfo=UTC)), s3, tmp_path / "cache")
    made.start()
    return made


@pytest.fixture
def client(pinned: Pinned, store: Any, tmp_path: Path) -> Iterator[TestClient]:
    lookup = FeatureLookup(lambda: store, ThreadPoolExecutor(1), budget_s=30.0)
    model = RolloutModel(Predictor(pinned, ThreadPoolExecutor(1)), lookup, Telemetry("onerec"), 30_000)
    repository = Repository()
    repository.update(model)

    async def status() -> dict[str, Any]:
        return await model.predictor.about()

    plane, extension = Plane(model_registry=repository), ModelRepositoryExtension(repository)
    rest = Rest([model], Administrator("admin-token"), tmp_path / "pushed", status, plane, extension, 0)
    app = fastapi.FastAPI()
    rest._register_endpoints(app)
    rest._add_exception_handlers(app)
    with TestClient(app) as asking:
        yield asking


def counts(samples: Any, codes: int) -> np.ndarray:
    """How often each SID was drawn for each request."""
    key = (samples.tokens * codes ** torch.arange(samples.tokens.shape[-1])).sum(-1).numpy()
    return np.stack([np.bincount(row, minlength=codes ** samples.tokens.shape[-1]) for row in key])


@pytest.mark.parametrize("config", [DrawConfig(), FREE], ids=["constrained", "free"])
def test_the_server_and_this_process_draw_from_the_same_distribution(
    client: TestClient, folder: Path, config: DrawConfig
) -> None:
    bundle = Bundle.load(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in bundle.model.parameters():  # not the weights that the server began with
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    here = InProcessSampler(bundle.model, bundle.catalogue, config)
    there = ServerSampler("http://127.0.0.1", "admin-token", bundle.catalogue, config, connect=lambda _: client)
    asked = contexts(bundle)
    found = []
    for sampler in (here, there):
        assert sampler.advance(bundle.model, 0)
        found.append(sampler.draw(asked, 500, seed=3))
    for samples in found:
        logits = bundle.model(to_tensors(asked, bundle.catalogue), samples.tokens).log_softmax(-1)
        expected = logits.gather(-1, samples.tokens[..., None])[..., 0]
        torch.testing.assert_close(samples.log_probs, expected.detach(), atol=1e-4, rtol=0)
        assert (samples.legality == 1) == config.constrained
        named = [bundle.catalogue.items_of(sid) for sid in samples.tokens.flatten(0, 1).numpy()]
        ids = [bundle.catalogue.item_ids[row] if row >= 0 else None for row in samples.items.ravel()]
        assert all(item in names if item else not names for item, names in zip(ids, named, strict=True))
    # A chi-square test of homogeneity per request over the SIDs drawn at least ten times, at one in ten thousand.
    first, second = (counts(samples, bundle.catalogue.codes) for samples in found)
    for a, b in zip(first, second, strict=True):
        common = a + b >= 10
        table = np.stack([np.r_[a[common], a[~common].sum() + 1], np.r_[b[common], b[~common].sum() + 1]])
        assert chi2_contingency(table).pvalue > 1e-4


def test_pushes_lag_and_a_restarted_server_gets_the_last_push_again(
    client: TestClient, pinned: Pinned, folder: Path
) -> None:
    bundle = Bundle.load(folder)
    asked = contexts(bundle)
    sampler = ServerSampler("http://127.0.0.1", "admin-token", bundle.catalogue, every=3, connect=lambda _: client)
    pushed, stale = [], []
    for step in range(5):
        pushed.append(sampler.advance(bundle.model, step))
        samples = sampler.draw(asked, 2, seed=step)
        stale.append((int(samples.push[0]), int(samples.staleness[0])))
    assert pushed == [True, False, False, True, False]
    assert stale == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    pinned.start()  # as after a restart: the bundle's own weights
    assert pinned.recommender.push == 0
    assert sampler.draw(asked, 2, seed=0).staleness.tolist() == [1] * 3
    assert pinned.recommender.bundle.version == sampler.version
    sampler.close()


def test_beams_come_in_order_and_few_items_are_padded(client: TestClient, folder: Path) -> None:
    bundle = Bundle.load(folder)
    asked = contexts(bundle)
    found = []
    for sampler in (
        InProcessSampler(bundle.model, bundle.catalogue),
        ServerSampler("http://127.0.0.1", "admin-token", bundle.catalogue, connect=lambda _: client),
    ):
        sampler.advance(bundle.model, 0)
        found.append(sampler.draw(asked, 12, seed=0, mode="beam"))
    assert torch.equal(found[0].tokens[:, 0], found[1].tokens[:, 0])
    assert (found[0].log_probs.sum(-1).diff() <= 1e-6).all()
    with pytest.raises(ValueError, match="1 to 100"):
        sampler.draw(asked, 101, seed=0, mode="beam")


def test_a_wrong_token_and_another_architecture_are_refused(client: TestClient, folder: Path) -> None:
    bundle = Bundle.load(folder)
    stranger = ServerSampler("http://127.0.0.1", "guessed", bundle.catalogue, connect=lambda _: client)
    with pytest.raises(RolloutsRefused, match="not the administrator's token"):
        stranger.advance(bundle.model, 0)
    sampler = ServerSampler("http://127.0.0.1", "admin-token", bundle.catalogue, connect=lambda _: client)
    with pytest.raises(RolloutsRefused, match="not of this architecture"):
        sampler.advance(torch.nn.Linear(2, 2), 0)  # type: ignore[arg-type]
    nobody = [{"name": "static", "datatype": "INT64", "shape": [1, 8], "data": [0] * 8}]
    assert client.post("/v2/models/onerec/infer", json={"inputs": nobody}).status_code == 400
    plain = {"inputs": [{"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}
    assert client.post("/v2/models/onerec/infer", json=plain).json()["parameters"]["push"] == 0


LEARNING = AlignConfig(
    objective="ecpo",
    signal="rollouts",
    group=8,
    rollout_requests=4,
    push_every=3,
    checkpoint_every=3,
    max_steps=12,
    warmup_steps=0,
    log_every=1,
    patience_s=3.0,
    threads=1,
)


def trained(server: Any, folder: Path, output: Path, dies_at: int = 0) -> tuple[dict[str, Any], torch.Tensor]:
    """Twelve steps on roll-outs of ``server``, which is killed at judgement ``dies_at``; metrics and all weights."""
    bundle = Bundle.load(folder)
    everybody = contexts(bundle, 20)
    judged: list[int] = []

    def reward(context: Any, items: np.ndarray, requests: np.ndarray) -> np.ndarray:
        judged.append(1)
        if len(judged) == dies_at:
            server.process.kill()
        return items / len(bundle.catalogue)

    sampler = ServerSampler(
        server.url, "admin-token", bundle.catalogue, LEARNING.draw, every=3, patience_s=LEARNING.patience_s
    )
    given = Rollouts(
        asked=Asked(count=20, of=everybody.take), reward=reward, sampler=sampler, catalogue=bundle.catalogue
    )
    bundle.model.requires_grad_(True)
    plan = Plan(
        steps=LEARNING.max_steps,
        example=lambda number: Step(number=number, logged=None),
        objective=Alignment(bundle.model, LEARNING, given),
        training={},
        guard=lambda: None,
    )
    metrics = fit(bundle.model, plan, LEARNING, output)
    assert server.status()["models"]["onerec"]["version"] == sampler.version
    return metrics, torch.cat([value.flatten() for value in bundle.model.state_dict().values()])


@pytest.mark.long
def test_a_trainer_and_a_roll_out_server_as_processes(
    s3: Storage, folder: Path, keys: dict[str, str], start_model_server: Callable[..., Any], tmp_path: Path
) -> None:
    """Samples come over HTTP while weights go back; a server that dies stops the run, another one lets it go on."""
    version = publish(s3, folder, data_time=datetime(2026, 1, 1, tzinfo=UTC))

    def running(name: str) -> Any:
        place = tmp_path / name
        place.mkdir()
        return start_model_server(place, s3, keys, f"onerec={version}", "--role", "rollout")

    with running("first") as server:
        server.serving(version)
        metrics, whole = trained(server, folder, tmp_path / "whole")
        assert metrics["rollouts/samples_per_s"] > 0
        assert 0 < metrics["rollouts/wait_share"] < 1
        with pytest.raises(RolloutsUnavailable, match="last good checkpoint is kept"):
            trained(server, folder, tmp_path / "cut", dies_at=8)
        assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    with running("second") as server:
        server.serving(version)
        metrics, resumed = trained(server, folder, tmp_path / "cut")
    assert metrics["step"] == 12
    torch.testing.assert_close(resumed, whole)
