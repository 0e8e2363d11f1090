"""The real server process on real object storage and a real Valkey."""

import asyncio
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from kserve import InferenceGRPCClient, InferInput, InferRequest
from pydantic import SecretStr
from watched import NOW_MS, watched

from features.offline import apply
from features.online import OnlineFeatures
from features.schema import exposure_id
from features.settings import Settings
from features.storage import Storage
from models.bundle import Bundle, fetch, publish, set_alias

TIME = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def storage(new_bucket: Callable[[], Storage]) -> Storage:
    return new_bucket()


@pytest.fixture(scope="module")
def versions(storage: Storage, write_bundle, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bundles")
    return [
        publish(storage, write_bundle(folder / str(seed), seed=seed), data_time=TIME + timedelta(days=seed))
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def server(
    start_model_server: Any,
    storage: Storage,
    versions: list[str],
    keys: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """Serves onerec=production; the alias points at the first version. onerec-frozen has no alias yet."""
    folder = tmp_path_factory.mktemp("server")
    set_alias(storage, "production", versions[0])
    with start_model_server(folder, storage, keys, "onerec=production", "onerec-frozen=frozen") as running:
        running.serving(versions[0])
        yield running


def outputs(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body = response.json()
    named = {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in body["outputs"]}
    return named | body["parameters"] | {"top_version": body["model_version"]}


def test_a_model_without_alias_is_not_ready_and_becomes_so(server: Any, storage: Storage, versions: list[str]) -> None:
    assert server.client.get("/v2/models/onerec/ready").status_code == 200
    assert server.client.get("/v2/models/nothing/ready").status_code == 404
    for answer in (server.client.get("/v2/models/onerec-frozen/ready"), server.infer(["u"], "onerec-frozen")):
        assert answer.status_code == 503
        assert "alias 'frozen' does not exist yet" in answer.json()["error"]
    assert not server.status()["models"]["onerec-frozen"]["ready"]
    set_alias(storage, "frozen", versions[2])
    server.serving(versions[2], "onerec-frozen")
    assert outputs(server.infer(["u"], "onerec-frozen"))["model_version"] == versions[2]
    assert outputs(server.infer(["u"]))["model_version"] == versions[0]


def test_v2_answers_and_its_served_events_reach_the_collector(server: Any, versions: list[str]) -> None:
    clock = [
        {"name": "time_ms", "datatype": "INT64", "shape": [2], "data": [NOW_MS, NOW_MS + 5]},
        {"name": "request_id", "datatype": "BYTES", "shape": [2], "data": ["ra", "rb"]},
        {"name": "exclude", "datatype": "BYTES", "shape": [2, 1], "data": ["", "i3"]},
    ]
    answer = outputs(server.infer(["a", "b"], inputs=clock, num_items=7))
    assert answer["item_ids"].shape == answer["scores"].shape == answer["exposure_ids"].shape == (2, 7)
    assert answer["sids"].shape == answer["log_probs"].shape == (2, 7, 3)
    assert answer["model_version"] == answer["top_version"] == versions[0]
    assert "i3" not in answer["item_ids"][1]
    for row, request in enumerate(("ra", "rb")):
        expected = [exposure_id(request, versions[0], slot) for slot in range(7)]
        assert answer["exposure_ids"][row].tolist() == expected
    server.wait(lambda: server.status()["served_queue"] == 0)
    events = {event["exposure_id"]: event for event in server.collector.events if event["user_id"] in ("a", "b")}
    assert len(events) == 14
    event = events[answer["exposure_ids"][1][2]]
    assert (event["user_id"], event["request_id"], event["position"]) == ("b", "rb", 2)
    assert (event["item_id"], event["model_version"]) == (answer["item_ids"][1][2], versions[0])
    assert (event["event_time"], event["sid"]) == (NOW_MS + 5, answer["sids"][1][2].tolist())
    np.testing.assert_allclose(event["log_probs"], answer["log_probs"][1][2], rtol=1e-6)


def test_v1_and_grpc_give_the_same_items(server: Any) -> None:
    parameters = {"num_items": 6, "beam_width": 40}
    v2 = outputs(server.infer(["a"], **parameters))
    v1 = server.client.post(
        "/v1/models/onerec:predict", json={"instances": [{"user_id": "a"}], "parameters": parameters}
    ).json()
    assert v1["predictions"][0]["item_ids"] == v2["item_ids"][0].tolist()
    assert v1["model_version"] == v2["model_version"]

    async def ask() -> Any:
        client = InferenceGRPCClient(server.grpc)
        user = InferInput("user_id", [1], "BYTES", [b"a"])
        answer = await client.infer(InferRequest("onerec", [user], parameters=parameters))
        await client.close()
        return answer

    answer = asyncio.run(ask())
    found = {each.name: each.as_numpy() for each in answer.outputs}
    assert [item.decode() for item in found["item_ids"][0]] == v2["item_ids"][0].tolist()
    np.testing.assert_allclose(found["scores"], v2["scores"], atol=1e-5)


def test_wrong_requests_are_answered_400_with_a_sentence(server: Any) -> None:
    def post(
        json: Any = None, content: bytes | None = None, path: str = "/v2/models/onerec/infer", **headers: str
    ) -> Any:
        return server.client.post(path, json=json, content=content, headers=headers)

    user = {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["u"]}
    wrong = [
        server.infer(["u"], num_items=0),
        server.infer(["u"], mode="best"),
        server.infer([]),
        server.infer(["u"] * 129),
        post({"inputs": [user | {"shape": [2]}]}),
        post({"inputs": [user | {"datatype": "FP16"}]}),
        post({"inputs": [user | {"datatype": "NONSENSE"}]}),
        post({"inputs": "u"}),
        post({"inputs": [user], "parameters": {"num_items": [1]}}),
        post([1]),
        post("text"),
        post(content=b"{", **{"content-type": "application/json"}),
        post(content=b'{"inputs": [{}]}', **{"inference-header-content-length": "16"}),
        post(content=b"{}", **{"inference-header-content-length": "x"}),
        post(content=b"{", path="/v1/models/onerec:predict"),
        post([], path="/v1/models/onerec:predict"),
        post({"instances": [5]}, path="/v1/models/onerec:predict"),
    ]
    for position, answer in enumerate(wrong):
        assert answer.status_code == 400, (position, answer.status_code, answer.text)
        assert len(answer.json()["error"]) > 15
    assert server.infer(["u"], model="nothing").status_code == 404
    assert "Traceback" not in server.log.read_text()


def test_grpc_errors_have_their_status(server: Any) -> None:
    async def codes() -> list[Any]:
        client = InferenceGRPCClient(server.grpc, retries=0)
        users = [InferInput("user_id", [1], "BYTES", [name]) for name in (b"", b"u")]
        found = []
        # A status that quotes what is longer than trailers may be would reach nobody.
        asked = (("onerec", users[0], {}), ("nothing", users[1], {}), ("onerec", users[1], {"mode": "é" * 30_000}))
        for model, user, parameters in asked:
            with pytest.raises(grpc.RpcError) as error:
                await client.infer(InferRequest(model, [user], parameters=parameters))
            found.append(error.value.code())
        await client.close()
        return found

    wrong, unknown = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    assert asyncio.run(codes()) == [wrong, unknown, wrong]


def test_known_users_get_their_context(
    server: Any, storage: Storage, keys: dict[str, str], versions: list[str], tmp_path: Path
) -> None:
    cold = outputs(server.infer(["known", "stranger"]))
    home = server.log.parent / "home"
    config = Settings(home=home, redis=keys["redis"], redis_password=SecretStr(keys["redis_password"]))
    apply(home / "feast", config)
    bundle = Bundle.load(fetch(storage, versions[0], tmp_path))
    seen = bundle.catalogue.item_ids[20:24]
    window = watched(seen)
    OnlineFeatures.connect(home / "feast", config).push_windows(["known"], [window], [window], np.array([NOW_MS - 500]))
    clock = [{"name": "time_ms", "datatype": "INT64", "shape": [2], "data": [NOW_MS, NOW_MS]}]
    assert "features_unavailable" in cold["flags"]

    def flags() -> str:
        return str(outputs(server.infer(["known", "stranger"], inputs=clock))["flags"])

    server.wait(lambda: flags() == "cold_user")
    answer = outputs(server.infer(["known", "stranger"], inputs=clock, num_items=50, beam_width=256))
    assert not set(answer["item_ids"][0]) & set(seen)
    everything = outputs(server.infer(["known", "stranger"], inputs=clock, num_items=100, exclude_seen=False))
    assert set(everything["item_ids"][0]) & set(seen)
    assert answer["item_ids"][0].tolist() != answer["item_ids"][1].tolist()
    assert outputs(server.infer(["known"], inputs=[clock[0] | {"shape": [1], "data": [NOW_MS]}]))["flags"] == ""


def test_a_swap_under_load_fails_no_request(server: Any, storage: Storage, versions: list[str]) -> None:
    stop, failures, seen = threading.Event(), [], set()

    def ask(worker: int) -> None:
        while not stop.is_set():
            answer = server.infer([f"u{worker}", f"w{worker}"], num_items=5)
            if answer.status_code != 200:
                failures.append(answer.text)
                continue
            found = outputs(answer)
            seen.add(found["model_version"])
            # An exposure id names its version: all of them must be of the one the response names.
            if found["top_version"] != found["model_version"]:
                failures.append("two versions")

    workers = [threading.Thread(target=ask, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for version in (versions[1], versions[2], versions[0]):
        set_alias(storage, "production", version)
        server.serving(version)
    stop.set()
    for worker in workers:
        worker.join()
    assert failures == []
    assert seen >= {versions[1], versions[2]}


def test_a_corrupt_bundle_is_refused_with_the_reason(
    server: Any, storage: Storage, versions: list[str], write_bundle, tmp_path: Path
) -> None:
    bad = publish(storage, write_bundle(tmp_path / "bad", seed=9), data_time=TIME)
    key = f"models/onerec/{bad}/model.safetensors"
    good = storage.get(key)
    storage.put(key, good[:-1] + bytes([good[-1] ^ 1]))
    set_alias(storage, "production", bad)
    loaded = server.load()
    assert loaded.status_code == 503
    assert "model.safetensors is corrupt" in loaded.json()["error"]
    assert f"{versions[0]} stays in service" in server.status()["models"]["onerec"]["reason"]
    assert outputs(server.infer(["u"]))["model_version"] == versions[0]
    metrics = server.client.get("/metrics").text
    assert f'onerec_bundle_refused_total{{model="onerec",version="{bad}"}}' in metrics
    storage.put(key, good)
    assert server.load().json()["load"] is True
    assert outputs(server.infer(["u"]))["model_version"] == bad
    set_alias(storage, "production", versions[0])
    server.load()
    assert outputs(server.infer(["u"]))["model_version"] == versions[0]


def test_models_cannot_be_unloaded_from_outside(server: Any) -> None:
    answer = server.client.post("/v2/repository/models/onerec/unload")
    assert answer.status_code == 400
    assert server.client.get("/v2/models/onerec/ready").status_code == 200


def test_without_any_backing_service_it_starts_waits_and_stops(
    start_model_server: Any, storage: Storage, versions: list[str], keys: dict[str, str], tmp_path: Path
) -> None:
    nowhere = {"s3_endpoint": "127.0.0.1:9", "redis": "127.0.0.1:9"}
    with start_model_server(tmp_path, storage, keys | nowhere, "onerec=production") as lonely:
        lonely.wait(lambda: "does not answer" in lonely.status()["models"]["onerec"]["reason"])
        assert lonely.client.get("/v2/models/onerec/ready").status_code == 503
        assert lonely.client.get("/v2/health/live").status_code == 200

        async def ask() -> Any:
            client = InferenceGRPCClient(lonely.grpc, retries=0)
            with pytest.raises(grpc.RpcError) as error:
                await client.infer(InferRequest("onerec", [InferInput("user_id", [1], "BYTES", [b"u"])]))
            await client.close()
            return error.value

        refusal = asyncio.run(ask())
        assert (refusal.code(), "does not answer" in refusal.details()) == (grpc.StatusCode.UNAVAILABLE, True)
        lonely.process.send_signal(signal.SIGTERM)
        assert lonely.process.wait(20) == 0


def test_without_valkey_it_answers_and_says_so_and_sigterm_delivers_what_was_served(
    start_model_server: Any, storage: Storage, versions: list[str], keys: dict[str, str], tmp_path: Path
) -> None:
    set_alias(storage, "production", versions[0])
    with start_model_server(tmp_path, storage, keys | {"redis": "127.0.0.1:9"}, "onerec=production") as alone:
        alone.serving(versions[0])
        alone.collector.status = 503
        answer = outputs(alone.infer(["u1", "u2"], num_items=4))
        assert answer["flags"] == "features_unavailable"
        assert (answer["item_ids"] != "").all()
        alone.collector.status = 202
        alone.process.send_signal(signal.SIGTERM)
        assert alone.process.wait(20) == 0
        on_disk = sum(len(p.read_text().splitlines()) for p in (tmp_path / "home/served").glob("*.jsonl"))
        assert len(alone.collector.events) + on_disk == 8


@pytest.mark.long
def test_two_processes_answer_as_one_and_say_so_when_the_other_is_gone(
    server: Any, start_model_server: Any, storage: Storage, versions: list[str], keys: dict[str, str], tmp_path: Path
) -> None:
    set_alias(storage, "production", versions[0])
    server.load()
    folders = [tmp_path / role for role in ("predictor", "transformer")]
    for folder in folders:
        folder.mkdir()
    options = ["--role", "transformer", "--model", "onerec"]
    with start_model_server(folders[0], storage, keys, "--role", "predictor", "onerec=production") as predictor:
        predictor.serving(versions[0])
        options += ["--predictor_host", predictor.grpc]
        with start_model_server(folders[1], storage, keys, *options) as transformer:
            transformer.serving(versions[0])
            clock = [{"name": "time_ms", "datatype": "INT64", "shape": [2], "data": [NOW_MS, NOW_MS]}]
            asked = {"users": ["known", "u"], "inputs": clock, "num_items": 7, "beam_width": 64}
            one, two = outputs(server.infer(**asked)), outputs(transformer.infer(**asked))
            for name in ("item_ids", "sids", "model_version"):
                assert np.array_equal(one[name], two[name])
            np.testing.assert_allclose(one["log_probs"], two["log_probs"], atol=1e-5)
            assert transformer.infer(["u"], mode="session").status_code == 400
            assert predictor.infer(["u"]).status_code == 400
            transformer.wait(lambda: len(transformer.collector.events) == 14)
            assert predictor.collector.events == []
            predictor.process.send_signal(signal.SIGTERM)
            assert predictor.process.wait(20) == 0
            refused = transformer.infer(["u"])
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert transformer.client.get("/v2/models/onerec/ready").status_code == 503
            assert transformer.client.get("/v2/health/live").status_code == 200


@pytest.mark.long
def test_leaving_says_so_first_and_serves_on_for_a_while(
    start_model_server: Any, storage: Storage, versions: list[str], keys: dict[str, str], tmp_path: Path
) -> None:
    set_alias(storage, "production", versions[0])
    with start_model_server(tmp_path, storage, keys, "onerec=production", "--drain_s", "3") as server:
        server.serving(versions[0])
        server.process.send_signal(signal.SIGTERM)
        server.wait(lambda: server.client.get("/v2/models/onerec/ready").status_code == 503)
        assert server.infer(["u"]).status_code == 200
        server.wait(lambda: server.infer(["u"]).headers.get("connection") == "close")
        assert server.process.wait(30) == 0


@pytest.mark.long
def test_a_roll_out_server_samples_from_what_the_trainer_pushes_and_shows_nobody(
    start_model_server: Any, storage: Storage, versions: list[str], keys: dict[str, str], write_bundle, tmp_path: Path
) -> None:
    weights = (write_bundle(tmp_path / "trained", seed=11) / "model.safetensors").read_bytes()
    headers = {"authorization": "Bearer admin-token", "x-onerec-version": "step-1"}
    headers["x-onerec-sha256"] = hashlib.sha256(weights).hexdigest()
    group = {"mode": "sample", "num_samples": 8, "seed": 1}
    with start_model_server(tmp_path, storage, keys, "--role", "rollout", f"onerec={versions[1]}") as server:
        server.serving(versions[1])
        set_alias(storage, "production", versions[0])
        before = outputs(server.infer(["u"], **group))
        assert (before["model_version"], before["push"], before["sids"].shape) == (versions[1], 0, (1, 8, 3))
        pushed = server.client.post("/onerec/models/onerec/weights", headers=headers, content=weights)
        assert pushed.json() == {"name": "onerec", "version": "step-1", "push": 1}
        after = outputs(server.infer(["u"], **group))
        assert (after["model_version"], after["push"]) == ("step-1", 1)
        assert not np.array_equal(before["log_probs"], after["log_probs"])
        assert server.load().status_code == 400
        assert server.collector.events == []
        assert server.status()["models"]["onerec"]["bundle"] == versions[1]
