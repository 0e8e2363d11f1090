"""The REST endpoints without a socket: statuses, headers, the administrator's token, the OpenAPI page."""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fastapi
import httpx
import numpy as np
import pytest
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from prometheus_client import REGISTRY

from models.bundle import Bundle
from models.serving.admin import Administrator
from models.serving.admission import Limits
from models.serving.protocol import PARAMETERS
from models.serving.recommender import Recommender
from models.serving.rest import Rest
from models.serving.rollout import Pinned
from models.serving.server import Plane, Repository

USER = {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["a"]}
INFER = "/v2/models/onerec/infer"


def client(model: Any, folder: Path, token: str = "admin-token") -> httpx.AsyncClient:
    repository = Repository()
    repository.update(model)
    plane, extension = Plane(model_registry=repository), ModelRepositoryExtension(repository)

    async def status() -> dict[str, Any]:
        return await model.predictor.about()

    rest = Rest([model], Administrator(token), folder, status, plane, extension, 0)
    app = fastapi.FastAPI()
    rest._register_endpoints(app)
    rest._add_exception_handlers(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def run(model: Any, folder: Path, work: Callable[[httpx.AsyncClient], Awaitable[None]], **options: str) -> None:
    async def main() -> None:
        async with client(model, folder, **options) as asking:
            await work(asking)

    asyncio.run(main())


def test_answers_in_json_chosen_outputs_and_binary(predictor: Any, caller: Any, store: Any, tmp_path: Path) -> None:
    async def work(asking: httpx.AsyncClient) -> None:
        body = {"id": "mine", "inputs": [USER], "parameters": {"num_items": 3}}
        plain = (await asking.post(INFER, json=body)).json()
        assert (plain["id"], plain["model_name"]) == ("mine", "onerec")
        named = {each["name"]: each for each in plain["outputs"]}
        assert {name: each["shape"] for name, each in named.items()} == {
            "item_ids": [1, 3],
            "scores": [1, 3],
            "sids": [1, 3, 3],
            "log_probs": [1, 3, 3],
            "exposure_ids": [1, 3],
        }
        chosen = (await asking.post(INFER, json={**body, "outputs": [{"name": "scores"}]})).json()["outputs"]
        assert [each["name"] for each in chosen] == ["scores"]
        np.testing.assert_allclose(chosen[0]["data"], named["scores"]["data"], rtol=1e-6)
        binary = await asking.post(INFER, json={**body, "parameters": {"num_items": 3, "binary_data_output": True}})
        assert binary.status_code == 200
        assert int(binary.headers["inference-header-content-length"]) < len(binary.content)
        unknown = await asking.post(INFER, json={**body, "outputs": [{"name": "nothing"}]})
        assert unknown.status_code == 400
        assert "nothing" in unknown.json()["error"]

    run(caller(predictor(), store), tmp_path, work)


def test_wrong_requests_get_400_and_never_500(predictor: Any, caller: Any, store: Any, tmp_path: Path) -> None:
    good = {"inputs": [USER]}
    wrong: list[Any] = [
        [], 1, None, "x", {}, {"inputs": None}, {"inputs": [1]}, {"inputs": [{}]}, {"inputs": []},
        {"inputs": [USER, USER]}, {"inputs": [USER | {"name": 5}]}, {"inputs": [USER | {"shape": "1"}]},
        {"inputs": [USER | {"shape": [10**12]}]}, {"inputs": [USER | {"shape": [-1]}]},
        {"inputs": [USER | {"datatype": 5}]}, {"inputs": [USER | {"data": {"a": 1}}]},
        {"inputs": [USER | {"data": [5]}]}, {"inputs": [USER | {"data": None}]},
        {"inputs": [USER | {"shape": [10_000], "data": ["u"] * 10_000}]},
        {**good, "parameters": [1]}, {**good, "parameters": {"num_items": -1}},
        {**good, "parameters": {"num_items": 10**30}}, {**good, "parameters": {"beam_width": 100_000}},
        {**good, "parameters": {"num_samples": 5}}, {**good, "parameters": {"timeout_ms": 0}},
        {**good, "parameters": {"mode": "sample", "constrained": False}}, {**good, "id": 5},
        {**good, "parameters": {"mode": "sample", "num_samples": 5, "constrained": False}},
        {**good, "outputs": [5]}, {**good, "outputs": [{}]}, {**good, "outputs": "x"},
    ]  # fmt: skip

    async def work(asking: httpx.AsyncClient) -> None:
        for body in wrong:
            answer = await asking.post(INFER, json=body)
            assert (answer.status_code, len(answer.json()["error"]) > 15) == (400, True), (body, answer.text)
        for length in ("0" * 5_000, "-1", "x"):  # Python refuses numbers of so many digits
            torn = await asking.post(INFER, json=good, headers={"inference-header-content-length": length})
            assert torn.status_code == 400
        late = {"x-request-timeout-ms": "soon"}
        assert (await asking.post(INFER, json=good, headers=late)).status_code == 400
        unknown = await asking.post("/v2/models/nobody/infer", json=good)
        assert unknown.status_code == 404
        assert unknown.json()["error"].endswith("Served here: onerec.")
        torn = await asking.post(INFER, content=b"{")
        assert "expected {'inputs': [" in torn.json()["error"]
        for way, path, status in (("POST", "/v1/models/onerec:explain", 405), ("GET", INFER, 405), ("GET", "/x", 404)):
            answer = await asking.request(way, path)
            assert answer.status_code == status
            assert answer.json()["error"].startswith(f"{way} {path} is not offered")
        long = (await asking.post(INFER, json={**good, "parameters": {"mode": "x" * 10**6}})).json()["error"]
        assert len(long) < 1_000
        assert long.startswith("parameter mode is 'xxx")
        assert long.endswith("expected one of beam, sample, session")
        assert (await asking.post("/v2/models/onerec/versions/1/infer", json=good)).status_code == 404
        everything = {"name": "exclude", "datatype": "BYTES", "shape": [1, 120], "data": [f"i{k}" for k in range(120)]}
        nothing = await asking.post(INFER, json={"inputs": [USER, everything]})
        assert nothing.status_code == 200
        assert nothing.json()["outputs"][0]["shape"] == [1, 0]

    run(caller(predictor(), store), tmp_path, work)


def test_what_is_no_request_at_all_is_counted_and_logged_too(
    predictor: Any, caller: Any, store: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> float:
        return REGISTRY.get_sample_value("onerec_requests_total", {"model": "onerec", "status": "400"}) or 0.0

    async def work(asking: httpx.AsyncClient) -> None:
        for path in (INFER, "/v1/models/onerec:predict"):
            before = refused()
            caplog.clear()
            assert (await asking.post(path, content=b"{", headers={"x-request-id": "r-9"})).status_code == 400
            assert refused() == before + 1
            assert [each.fields["request_id"] for each in caplog.records if each.message == "request"] == ["r-9"]
        assert (await asking.post("/v2/models/nobody/infer", content=b"{")).status_code in (400, 404)
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> dict[str, Any]:
            return messages.pop()

        async def send(_: Any) -> None:
            pass

        caplog.clear()
        scope = {"type": "http", "method": "POST", "path": INFER, "headers": [], "query_string": b"", "root_path": ""}
        await asking._transport.app(scope, receive, send)  # a client that hangs up while it sends is no error of ours
        assert [each.fields["status"] for each in caplog.records if each.message == "request"] == [499]

    caplog.set_level(logging.INFO)
    run(caller(predictor(), store), tmp_path, work)


class Stuck(Recommender):
    """Runs until it is told to go on."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.runs, self.going = 0, asyncio.Event()

    def recommend(self, *arguments: Any, **options: Any) -> Any:
        self.runs += 1
        asyncio.run_coroutine_threadsafe(self.going.wait(), self.loop).result()
        return super().recommend(*arguments, **options)


def test_a_full_queue_a_deadline_and_a_missing_version(
    predictor: Any, caller: Any, store: Any, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    stuck = Stuck(tiny_bundle)
    here = predictor(stuck, limits=Limits(max_rows=1, queue_rows=1))

    async def work(asking: httpx.AsyncClient) -> None:
        stuck.loop = asyncio.get_running_loop()
        first = asyncio.create_task(asking.post(INFER, json={"inputs": [USER]}))
        while not stuck.runs:
            await asyncio.sleep(0.005)
        late = await asking.post(INFER, json={"inputs": [USER]}, headers={"x-request-timeout-ms": "30"})
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert "not run" in late.text
        waiting = asyncio.create_task(asking.post(INFER, json={"inputs": [USER]}))
        while not here.waiting:
            await asyncio.sleep(0.005)
        full = await asking.post(INFER, json={"inputs": [USER]})
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert (await asking.get("/v2/health/live")).status_code == 200
        stuck.going.set()
        assert [(await each).status_code for each in (first, waiting)] == [200, 200]
        assert stuck.runs == 2
        here.source.recommender, here.source.reason = None, "no version yet"
        gone = await asking.post(INFER, json={"inputs": [USER]})
        ready = await asking.get("/v2/models/onerec/ready")
        for answer in (gone, ready):
            assert answer.status_code == 503
            assert "no version yet" in answer.text
            assert answer.headers["retry-after"]

    run(caller(here, store), tmp_path, work)


def test_a_client_that_hangs_up_cancels_its_request(
    predictor: Any, caller: Any, store: Any, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    stuck = Stuck(tiny_bundle)
    here = predictor(stuck, limits=Limits(max_rows=1))

    async def work(asking: httpx.AsyncClient) -> None:
        stuck.loop = asyncio.get_running_loop()
        app, body = (
            asking._transport.app,
            b'{"inputs":[{"name":"user_id","datatype":"BYTES","shape":[1],"data":["a"]}]}',
        )
        first = asyncio.create_task(asking.post(INFER, json={"inputs": [USER]}))
        while not stuck.runs:
            await asyncio.sleep(0.005)
        hung_up = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": INFER, "headers": [], "query_string": b"", "root_path": ""}
        going = asyncio.create_task(app(scope, receive, send))
        while not here.waiting:
            await asyncio.sleep(0.005)
        hung_up.set()
        await going
        assert here.waiting == 0
        stuck.going.set()
        await first
        assert stuck.runs == 1

    run(caller(here, store), tmp_path, work)


def test_load_is_for_the_administrator(predictor: Any, caller: Any, store: Any, tmp_path: Path) -> None:
    here = predictor()

    async def work(asking: httpx.AsyncClient) -> None:
        path = "/v2/repository/models/onerec/load"
        for header, status in ({}, 401), ({"authorization": "Basic x"}, 401), ({"authorization": "Bearer no"}, 403):
            assert (await asking.post(path, headers=header)).status_code == status
        assert here.source.checked == 0
        token = {"authorization": "Bearer admin-token"}
        assert (await asking.post(path, headers=token)).json() == {"name": "onerec", "load": True}
        assert here.source.checked == 1
        assert (await asking.post("/v2/repository/models/nobody/load", headers=token)).status_code == 404
        assert (await asking.post("/v2/repository/models/onerec/unload")).status_code == 400
        assert (await asking.post("/v2/repository/models/nobody/unload")).status_code == 404
        pushed = await asking.post("/onerec/models/onerec/weights", headers=token, content=b"x")
        assert pushed.status_code == 400
        assert "roll-out servers only" in pushed.text

    run(caller(here, store), tmp_path, work)

    async def nobody(asking: httpx.AsyncClient) -> None:
        answer = await asking.post("/v2/repository/models/onerec/load", headers={"authorization": "Bearer "})
        assert answer.status_code == 403

    run(caller(here, store), tmp_path, nobody, token="")


def test_weights_are_pushed_over_http(
    predictor: Any, caller: Any, store: Any, tiny_bundle: Bundle, write_bundle: Any, tmp_path: Path
) -> None:
    here = predictor(Recommender(tiny_bundle, push=0))
    pinned = Pinned("onerec", tiny_bundle.version, None, tmp_path)
    pinned.recommender, here.source = here.source.recommender, pinned
    weights = (write_bundle(tmp_path / "new", seed=3) / "model.safetensors").read_bytes()

    async def work(asking: httpx.AsyncClient) -> None:
        about = {"x-onerec-sha256": hashlib.sha256(weights).hexdigest(), "x-onerec-version": "step-1"}
        path, token = "/onerec/models/onerec/weights", {"authorization": "Bearer admin-token"}
        assert (await asking.post(path, headers=about, content=weights)).status_code == 401
        assert (await asking.post(path, headers=token, content=weights)).status_code == 400
        torn = await asking.post(path, headers={**token, **about}, content=weights[:-1])
        assert torn.status_code == 400
        assert "sha256" in torn.text
        huge = await asking.post(path, headers={**token, **about}, content=bytes(pinned.limit + 1))
        assert huge.status_code == 413
        good = await asking.post(path, headers={**token, **about}, content=weights)
        assert good.json() == {"name": "onerec", "version": "step-1", "push": 1}
        body = {"inputs": [USER], "parameters": {"mode": "sample", "num_samples": 4}}
        answer = (await asking.post(INFER, json=body)).json()
        assert (answer["model_version"], answer["parameters"]["push"]) == ("step-1", 1)
        assert answer["outputs"][2]["shape"] == [1, 4, 3]

    run(caller(here, store), tmp_path / "pushed", work)
    assert not list((tmp_path / "pushed").iterdir())


def test_the_openapi_page_names_every_parameter_and_input(
    predictor: Any, caller: Any, store: Any, tmp_path: Path
) -> None:
    async def work(asking: httpx.AsyncClient) -> None:
        paths = (await asking.get("/openapi.json")).json()["paths"]
        infer = paths["/v2/models/{model_name}/infer"]["post"]
        schema = infer["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]["parameters"]["properties"]) == set(PARAMETERS)
        names = schema["properties"]["inputs"]["items"]["properties"]["name"]["enum"]
        assert names == ["user_id", "time_ms", "request_id", "exclude"]
        assert {"200", "400", "429", "503"} <= set(infer["responses"])
        assert "/onerec/models/{model_name}/weights" in paths
        metadata = (await asking.get("/v2/models/onerec")).json()
        assert [each["name"] for each in metadata["inputs"]] == names
        assert [each["name"] for each in metadata["outputs"]][-1] == "exposure_ids"

    run(caller(predictor(), store), tmp_path, work)


def test_the_largest_request_is_answered_and_does_not_stop_the_event_loop(
    predictor: Any, caller: Any, store: Any, tmp_path: Path
) -> None:
    users, excluded = 128, [f"i{k}" for k in range(60)] + [f"unknown{k}" for k in range(1_940)]
    body = {
        "inputs": [
            USER | {"shape": [users], "data": [f"u{row}" for row in range(users)]},
            {"name": "exclude", "datatype": "BYTES", "shape": [users, len(excluded)], "data": excluded * users},
        ],
        "parameters": {"num_items": 100, "beam_width": 64},
    }

    async def work(asking: httpx.AsyncClient) -> None:
        asked = asyncio.create_task(asking.post(INFER, json=body))
        ticks = 0
        while not asked.done():
            await asyncio.sleep(0.001)
            ticks += 1
        named = {each["name"]: each for each in (await asked).json()["outputs"]}
        assert named["item_ids"]["shape"][0] == users
        assert not set(named["item_ids"]["data"]) & set(excluded)
        assert ticks > 20
        huge = await asking.post(INFER, content=bytes(33 * 2**20))
        assert huge.status_code == 413

    run(caller(predictor(), store), tmp_path, work)
