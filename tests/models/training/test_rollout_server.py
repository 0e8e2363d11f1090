"""What the trainer does while its roll-out server is away, wrong or forgetful; the server is a stand-in."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from features.histories.context import cold_context
from features.histories.windows import Limits
from models.architectures import model_of
from models.training import rollout_server
from models.training.alignment import AlignConfig
from models.training.loop import Plan, fit
from models.training.on_policy import Alignment, Asked, Rollouts, Step
from models.training.rollout_server import RolloutsRefused, RolloutsUnavailable, ServerSampler

CONFIG = AlignConfig(
    objective="ecpo",
    signal="rollouts",
    group=4,
    rollout_requests=2,
    push_every=2,
    max_steps=8,
    checkpoint_every=2,
    warmup_steps=0,
    learning_rate=1e-2,
    threads=1,
)


class Server:
    """Draws items by the request's seed; ``away`` are the numbers of the calls that it does not answer."""

    def __init__(self, away: Callable[[int], httpx.Response | None] = lambda call: None) -> None:
        self.away, self.calls, self.version, self.pushes = away, 0, "bundle", []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls += 1
        gone = self.away(self.calls)
        if gone is not None:
            return gone
        if request.url.path.endswith("/weights"):
            self.version = request.headers["x-onerec-version"]
            self.pushes.append(self.version)
            return httpx.Response(200, json={})
        body = json.loads(request.content)
        users, asked = body["inputs"][0]["shape"][0], body["parameters"]
        rows = np.random.default_rng(asked["seed"]).integers(0, 60, (users, asked["num_samples"]))
        sids = np.stack([rows % 4, rows // 4 % 8, rows // 32], -1)
        outputs = [
            {"name": name, "datatype": "", "shape": list(sids.shape), "data": data.ravel().tolist()}
            for name, data in (("sids", sids), ("log_probs", np.full(sids.shape, -2.0)))
        ]
        counts = ",".join([str(asked["num_samples"])] * users)
        about = {"model_version": self.version, "push": len(self.pushes), "counts": counts}
        return httpx.Response(200, json={"parameters": about, "outputs": outputs})


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_server, "PAUSES_S", (0.001, 0.002))

    def unknown(*_: object) -> None:
        raise OSError("no such name")

    monkeypatch.setattr(rollout_server.socket, "gethostbyname_ex", unknown)


def sampler(log, server: Server, **options) -> ServerSampler:
    return several(log, {"http://rollouts": server}, **options)


def several(log, servers: dict[str, Server], **options) -> ServerSampler:
    def connect(address: str) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(servers[address]), base_url=address)

    url = "http://rollouts:8080" if len(servers) > 1 else "http://rollouts"
    return ServerSampler(url, "token", log.catalogue, CONFIG.draw, every=2, connect=connect, **options)


def unreachable(call: int) -> httpx.Response:
    raise httpx.ConnectError("connection refused")


def test_it_waits_for_a_server_that_is_away_for_a_while(log, model_config) -> None:
    gone = {2: 503, 3: 429, 5: 502}

    def away(call: int) -> httpx.Response | None:
        if call == 1:
            unreachable(call)
        return httpx.Response(gone[call], json={"error": "soon"}) if call in gone else None

    server = Server(away)
    asking = sampler(log, server, patience_s=60)
    asking.advance(model_of(model_config), 0)
    samples = asking.draw(cold_context(2, Limits()), 4, seed=1)
    assert (server.calls, len(server.pushes)) == (6, 1)
    assert samples.valid.all()
    asking.close()


def test_it_gives_up_with_what_to_do(log, model_config) -> None:
    asking = sampler(log, Server(unreachable), patience_s=0.02)
    with pytest.raises(RolloutsUnavailable, match=r"http://rollouts did not give a push.*last good checkpoint is kept"):
        asking.advance(model_of(model_config), 0)
    with pytest.raises(RuntimeError, match="nothing was pushed"):
        sampler(log, Server()).draw(cold_context(1, Limits()), 1, seed=0)
    refusing = sampler(log, Server(lambda call: httpx.Response(404, text="no such model")))
    with pytest.raises(RolloutsRefused, match="404: no such model"):
        refusing.advance(model_of(model_config), 0)
    with pytest.raises(ValueError, match="every is 0"):
        ServerSampler("http://rollouts", "token", log.catalogue, every=0)


def test_two_trainers_on_one_server_are_told_apart(log, model_config) -> None:
    server = Server()
    asking = sampler(log, server, patience_s=0.01)
    asking.advance(model_of(model_config), 0)
    server.version = "another-trainer.step-3"
    assert asking.draw(cold_context(1, Limits()), 2, seed=0).valid.all()  # ours were pushed again
    assert server.pushes == [asking.version] * 2

    class Contested(Server):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            answer = super().__call__(request)
            self.version = "another-trainer.step-4"
            return answer

    contested = sampler(log, Contested(), patience_s=0.01)
    contested.advance(model_of(model_config), 0)
    with pytest.raises(RolloutsUnavailable, match="a server of its own"):
        contested.draw(cold_context(1, Limits()), 2, seed=0)


def test_a_name_of_several_addresses_is_several_servers(log, model_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are pushed to and share the requests; one that was restarted, or is gone, is made up for."""
    servers = {f"http://10.0.0.{n}:8080": Server() for n in (1, 2, 3)}
    hosts = ["10.0.0.3", "10.0.0.1", "10.0.0.2"]
    monkeypatch.setattr(rollout_server.socket, "gethostbyname_ex", lambda name: (name, [], hosts))
    monkeypatch.setattr(rollout_server, "USERS_A_CALL", 1)
    asking = several(log, servers, patience_s=1.0)
    asking.advance(model_of(model_config), 0)
    assert [server.pushes for server in servers.values()] == [[asking.version]] * 3
    context = cold_context(6, Limits())
    first = asking.draw(context, 4, seed=1)
    assert [server.calls for server in servers.values()] == [3] * 3
    one, two, three = servers.values()
    two.version = "bundle"
    three.away = unreachable
    again = asking.draw(context, 4, seed=1)
    assert torch.equal(first.tokens, again.tokens)
    assert (len(one.pushes), len(two.pushes), len(three.pushes)) == (1, 2, 1)


def align(log, model_config, server: Server, folder: Path) -> dict:
    torch.manual_seed(0)
    model = model_of(replace(model_config, dropout=0.0))
    with_server = sampler(log, server, patience_s=0.01)
    rollouts = Rollouts(
        asked=Asked(count=20, of=lambda rows: cold_context(len(rows), Limits())),
        reward=lambda context, items, requests: items / 60,
        sampler=with_server,
        catalogue=log.catalogue,
    )
    plan = Plan(
        steps=CONFIG.max_steps,
        example=lambda number: Step(number=number, logged=None),
        objective=Alignment(model, CONFIG, rollouts),
        training={"test": 1},
        guard=lambda: None,
    )
    metrics = fit(model, plan, CONFIG, folder)
    return {**metrics, "weights": torch.cat([value.flatten() for value in model.state_dict().values()])}


def test_a_server_that_dies_leaves_the_last_good_checkpoint_and_a_rerun_goes_on_from_it(
    log, model_config, tmp_path: Path
) -> None:
    whole = align(log, model_config, Server(), tmp_path / "whole")
    dies_at = 9  # pushes at steps 0, 2 and 4, draws at 0 to 4: the ninth call is the draw of step 5
    with pytest.raises(RolloutsUnavailable, match="did not give roll-outs"):
        align(log, model_config, Server(lambda call: unreachable(call) if call >= dies_at else None), tmp_path / "cut")
    kept = load_file(tmp_path / "cut" / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    again = Server()
    resumed = align(log, model_config, again, tmp_path / "cut")
    assert [push.split(".")[1] for push in again.pushes] == ["step-4", "step-6"]
    assert resumed["step"] == whole["step"] == 8
    assert torch.equal(resumed["weights"], whole["weights"])
