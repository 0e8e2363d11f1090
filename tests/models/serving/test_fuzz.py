"""The model server under requests that nobody should send: an answer or a sentence, never 500, and it lives on."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from schemathesis import GenerationMode

from features.storage import Storage
from models.bundle import publish, set_alias

TIME = datetime(2026, 1, 2, tzinfo=UTC)
NAMES = st.sampled_from(["user_id", "time_ms", "request_id", "exclude", "user", ""])
DATATYPES = st.sampled_from(["BYTES", "INT64", "FP32", "FP16", "BOOL", "UINT8", "NONSENSE", ""])
SIZES = st.sampled_from([0, 1, 2, 3, 128, 129, 10_000, -1, 2**31, 2**62, -(2**62)])
PARAMETERS = st.sampled_from(
    ["num_items", "beam_width", "mode", "temperature", "seed", "exclude_seen", "num_samples", "timeout_ms", "other"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "u", "beam", "sample", "session", "1", "\x00", "é", "x" * 200])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES | JSON,
        "datatype": DATATYPES | JSON,
        "shape": st.lists(SIZES, max_size=3) | JSON,
        "data": st.lists(SCALARS, max_size=4) | JSON,
        "parameters": JSON,
    },
)
V2 = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON,
        "inputs": st.lists(TENSORS, max_size=3) | JSON,
        "parameters": st.dictionaries(PARAMETERS, SCALARS, max_size=3) | JSON,
        "outputs": JSON,
    },
)
V1 = st.fixed_dictionaries({}, optional={"instances": JSON, "parameters": JSON})
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


def quick(examples: int) -> hypothesis.settings:
    return hypothesis.settings(max_examples=examples, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def server(
    start_model_server: Any,
    new_bucket: Any,
    write_bundle,
    keys: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    storage: Storage = new_bucket()
    version = publish(storage, write_bundle(folder / "bundle"), data_time=TIME)
    set_alias(storage, "production", version)
    with start_model_server(folder, storage, keys, "onerec=production") as running:
        running.serving(version)
        yield running
        assert running.infer(["after everything"]).status_code == 200


def fine(answer: Any) -> None:
    """An answer, or a refusal that says why."""
    assert answer.status_code < 500 or answer.status_code == 503, (answer.status_code, answer.text)
    assert answer.status_code < 400 or len(answer.text) > 15, answer.status_code


def fuzz_rest(server: Any, examples: int) -> None:
    """JSON bodies near the protocol's form and far from it."""

    @quick(examples)
    @given(st.sampled_from([("/v2/models/onerec/infer", V2), ("/v1/models/onerec:predict", V1)]), st.data())
    def run(endpoint: tuple[str, Any], data: Any) -> None:
        path, form = endpoint
        fine(server.client.post(path, json=data.draw(form | JSON)))

    run()


def test_json_bodies_of_any_form_get_an_answer_or_a_sentence(server: Any) -> None:
    fuzz_rest(server, 120)


def test_bodies_that_are_no_json(server: Any) -> None:
    @quick(60)
    @given(st.binary(max_size=60), st.sampled_from(["", "0", "5", "-1", "9" * 30, "x"]), st.booleans())
    def run(body: bytes, length: str, first: bool) -> None:
        path = "/v2/models/onerec/infer" if first else "/v1/models/onerec:predict"
        headers = {"inference-header-content-length": length} if length else {}
        fine(server.client.post(path, content=body, headers=headers))

    run()


def fuzz_operations(server: Any, examples: int) -> None:
    """Requests made from the OpenAPI page, those that fit it and those that do not."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * (operation.method == "post")
        cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

        @quick(examples)
        @given(cases)
        def run(case: Any) -> None:
            fine(case.call())

        run()


def test_operations_of_the_openapi_page(server: Any) -> None:
    fuzz_operations(server, 4)


def grpc_requests() -> st.SearchStrategy[Any]:
    """v2 requests as protobuf knows them: every field may disagree with every other."""
    contents = st.builds(
        pb.InferTensorContents,
        bytes_contents=st.lists(st.binary(max_size=5), max_size=3),
        int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
        fp32_contents=st.lists(st.floats(width=32), max_size=2),
    )
    tensor = st.builds(
        pb.ModelInferRequest.InferInputTensor,
        name=NAMES,
        datatype=DATATYPES,
        shape=st.lists(SIZES, max_size=3),
        contents=contents,
    )
    parameter = (
        st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1))
        | st.builds(pb.InferParameter, string_param=st.text(max_size=5))
        | st.builds(pb.InferParameter, bool_param=st.booleans())
    )
    return st.builds(
        pb.ModelInferRequest,
        model_name=st.sampled_from(["onerec", "nothing", ""]),
        id=st.text(max_size=5),
        inputs=st.lists(tensor, max_size=3),
        parameters=st.dictionaries(PARAMETERS, parameter, max_size=3),
        raw_input_contents=st.lists(st.binary(max_size=12), max_size=3),
    )


def ended(call: Any) -> tuple[Any, Any]:
    """(answer or None, how the call ended)."""
    try:
        return call()
    except grpc.RpcError as error:
        return None, error


def fuzz_grpc(server: Any, examples: int) -> None:
    """Every call ends with a status that was meant."""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)

        @quick(examples)
        @given(grpc_requests())
        def run(request: Any) -> None:
            _, call = ended(lambda: stub.ModelInfer.with_call(request, timeout=20))
            assert call.code() in EXPECTED, (call.code(), call.details())
            assert call.code() == grpc.StatusCode.OK or len(call.details() or "") > 5

        run()


def test_grpc_calls_of_any_form_get_an_answer_or_a_status(server: Any) -> None:
    fuzz_grpc(server, 120)


def test_numbers_beyond_json_and_far_too_many_users(server: Any) -> None:
    def parameters(text: str) -> httpx.Response:
        body = '{"inputs":[{"name":"user_id","datatype":"BYTES","shape":[1],"data":["u"]}],"parameters":' + text + "}"
        return server.client.post("/v2/models/onerec/infer", content=body)

    for text in ('{"num_items":1e400}', '{"num_items":-5}', '{"beam_width":513}', '{"num_items":' + "9" * 400 + "}"):
        assert parameters(text).status_code == 400
    assert parameters('{"temperature":NaN}').status_code == 400
    assert server.infer([f"u{n}" for n in range(10_000)]).status_code == 400
    assert server.infer(["u"], num_items=100).status_code == 200
    everything = [{"name": "exclude", "datatype": "BYTES", "shape": [1, 120], "data": [f"i{n}" for n in range(120)]}]
    empty = server.infer(["u"], inputs=everything)
    assert empty.status_code == 200
    found = {output["name"]: output["data"] for output in empty.json()["outputs"]}
    assert found["item_ids"] == []


@pytest.mark.long
def test_long_fuzzing(server: Any) -> None:
    fuzz_rest(server, 3000)
    fuzz_grpc(server, 3000)
    fuzz_operations(server, 150)
    assert json.loads(server.client.get("/onerec/status").text)
