"""Transformer and predictor with gRPC between them answer as one process does, and refuse alike."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from kserve import InferInput, InferRequest
from kserve.errors import InvalidInput
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from watched import NOW_MS

from models.bundle import Bundle
from models.serving.admin import Administrator
from models.serving.admission import Limits
from models.serving.contexts import Contexts
from models.serving.errors import DeadlinePassed, NotReady, Overloaded
from models.serving.grpc_server import Grpc
from models.serving.predictor import Predictor, PredictorModel
from models.serving.protocol import Options
from models.serving.recommender import Recommender
from models.serving.remote import RemotePredictor
from models.serving.server import Plane, Repository
from pipelines.processes import free_ports


def ask(users: list[str], parameters: dict | None = None, exclude: list[list[str]] | None = None) -> InferRequest:
    tensors = [
        InferInput("user_id", [len(users)], "BYTES", users),
        InferInput("time_ms", [len(users)], "INT64", [NOW_MS] * len(users)),
        InferInput("request_id", [len(users)], "BYTES", [f"r{row}" for row in range(len(users))]),
    ]
    if exclude is not None:
        flat = [item for row in exclude for item in row]
        tensors.append(InferInput("exclude", [len(users), len(exclude[0])], "BYTES", flat))
    return InferRequest("onerec", tensors, parameters=parameters or {})


def outputs(response: Any) -> dict[str, Any]:
    return {each.name: each.data for each in response.outputs} | response.parameters


def split(predictor: Predictor, work: Callable[[RemotePredictor, Grpc], Awaitable[None]]) -> None:
    """Runs ``work`` with the predictor behind real gRPC on loopback."""

    async def main() -> None:
        address = f"127.0.0.1:{next(free_ports(1))}"
        repository = Repository()
        repository.update(PredictorModel(predictor, 30_000))
        plane, extension = Plane(model_registry=repository), ModelRepositoryExtension(repository)
        server = Grpc(address, plane, extension, Administrator("admin-token"), 0)
        serving = asyncio.create_task(server.start(1))
        remote = RemotePredictor("onerec", address)
        try:
            while not await remote.ready():
                await asyncio.sleep(0.01)
            await work(remote, server)
        finally:
            await server._server.stop(0)
            await serving

    asyncio.run(main())


def test_the_answers_are_the_same(predictor: Any, caller: Any, store: Any) -> None:
    here = predictor()

    async def work(remote: RemotePredictor, _: Grpc) -> None:
        one, two = caller(here, store), caller(remote, store)
        requests = [
            ask(["a", "b", "stranger"]),
            ask(["c"], {"num_items": 100, "beam_width": 256, "exclude_seen": False}),
            ask(["a", "b"], {"mode": "sample", "seed": 7, "temperature": 0.7}),
            ask(["a"], {"mode": "sample", "num_samples": 9, "seed": 1}),
            ask(["b", "c"], {"num_items": 20}, [["i1", "i2"], ["i3", ""]]),
        ]
        for request in requests:
            in_one, in_two = outputs(await one.predict(request)), outputs(await two.predict(request))
            assert in_one.keys() == in_two.keys()
            assert in_one["item_ids"].size
            for name, value in in_one.items():
                if name in ("scores", "log_probs"):  # rows of another batch size may round otherwise
                    np.testing.assert_allclose(value, in_two[name], atol=1e-5)
                else:
                    assert np.array_equal(value, in_two[name]), name
        everything = ask(["a", "b"], {}, [[f"i{k}" for k in range(120)], ["i1"] + [""] * 119])
        for model in (one, two):
            left = outputs(await model.predict(everything))["item_ids"].tolist()
            assert left[0] == [""] * 10
            assert "" not in left[1]
        nothing = ask(["a"], {}, [[f"i{k}" for k in range(120)]])
        assert [outputs(await model.predict(nothing))["item_ids"].shape for model in (one, two)] == [(1, 0), (1, 0)]
        body = {"instances": [{"user_id": "a", "time_ms": NOW_MS, "request_id": "r"}]}
        assert (await remote.about())["version"] == here.source.recommender.bundle.version
        v1 = [await model.predict(body) for model in (one, two)]
        assert v1[0]["predictions"][0]["item_ids"] == v1[1]["predictions"][0]["item_ids"]

    split(here, work)


def test_what_the_predictor_refuses_is_refused_in_the_same_words(predictor: Any, caller: Any, store: Any) -> None:
    here = predictor()

    async def work(remote: RemotePredictor, server: Grpc) -> None:
        for parameters in ({"mode": "session"}, {"mode": "sample", "num_samples": 2, "constrained": False}):
            said = []
            for each in (here, remote):
                with pytest.raises(InvalidInput) as refused:
                    await caller(each, store).predict(ask(["a"], parameters))
                said.append(str(refused.value))
            assert said[0] == said[1]
        model = caller(remote, store)
        here.source.recommender = None
        here.source.reason = "no alias"
        with pytest.raises(NotReady, match="no alias"):
            await model.predict(ask(["a"]))
        assert not await model.healthy()
        await server._server.stop(0)
        with pytest.raises(NotReady, match="the predictor at"):
            await model.predict(ask(["a"]))

    split(here, work)


@pytest.mark.parametrize("code", [StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.NOT_FOUND])
def test_a_predictor_that_goes_away_is_one_that_is_not_ready(code: StatusCode) -> None:
    remote = RemotePredictor("onerec", "elsewhere:1")
    client = SimpleNamespace(infer=AsyncMock(side_effect=AioRpcError(code, Metadata(), Metadata(), "gone")))
    remote._opened = client  # type: ignore[assignment]
    contexts = Contexts.of([None], np.array([NOW_MS]), [frozenset()], Options())
    with pytest.raises(NotReady, match="elsewhere:1 says: gone"):
        asyncio.run(remote.predict(contexts, "r", time.monotonic() + 5))


class Slow(Recommender):
    """Counts its runs and takes its time."""

    runs = 0

    def recommend(self, *arguments: Any, **options: Any) -> Any:
        self.runs += 1
        time.sleep(0.3)
        return super().recommend(*arguments, **options)


def test_deadlines_full_queues_and_callers_who_leave(
    predictor: Any, caller: Any, store: Any, tiny_bundle: Bundle
) -> None:
    slow = Slow(tiny_bundle)
    here = predictor(slow, limits=Limits(max_rows=1, queue_rows=1))

    async def work(remote: RemotePredictor, _: Grpc) -> None:
        model = caller(remote, store)
        first = asyncio.create_task(model.predict(ask(["a"])))
        while not slow.runs:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(model.predict(ask(["b"])))
        while not here.waiting:
            await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="waiting already"):
            await model.predict(ask(["c"]))
        waiting.cancel()
        while here.waiting:  # the row leaves the other process's queue before the model is free
            await asyncio.sleep(0.01)
        assert slow.runs == 1
        with pytest.raises(DeadlinePassed, match="not run"):
            await model.predict(ask(["c"], {"timeout_ms": 50}))
        await first
        assert slow.runs == 1

    split(here, work)
