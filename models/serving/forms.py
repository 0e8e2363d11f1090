"""The wire forms of a recommendation: Open Inference Protocol v2 (REST and gRPC) and v1 ``:predict``.

v2 inputs: ``user_id`` BYTES [B]; optional ``time_ms`` INT64 [B] (the request's clock, UTC ms), ``request_id`` BYTES
[B], ``exclude`` BYTES [B, M] (item ids, "" pads). v1: {"instances": [{"user_id", "time_ms", "request_id", "exclude":
[...]}], "parameters": {...}}. The parameters are those of ``models.serving.protocol``.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import to_http_parameters

from models.serving import tensors
from models.serving.protocol import Answer, Query, check_users, checked_query, now_ms
from models.serving.recommender import Recommendation

INPUTS: list[dict[str, Any]] = [
    {"name": "user_id", "datatype": "BYTES", "shape": [-1]},
    {"name": "time_ms", "datatype": "INT64", "shape": [-1]},
    {"name": "request_id", "datatype": "BYTES", "shape": [-1]},
    {"name": "exclude", "datatype": "BYTES", "shape": [-1, -1]},
]
"""v2 metadata; -1 is any size."""
PREDICTED: list[dict[str, Any]] = [
    {"name": "item_ids", "datatype": "BYTES", "shape": [-1, -1]},
    {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
    {"name": "sids", "datatype": "INT32", "shape": [-1, -1, -1]},
    {"name": "log_probs", "datatype": "FP32", "shape": [-1, -1, -1]},
]
OUTPUTS = [*PREDICTED, {"name": "exposure_ids", "datatype": "BYTES", "shape": [-1, -1]}]

_KNOWN = {"user_id", "time_ms", "request_id", "exclude"}


def parse(payload: Any) -> Query:
    """The query of a v2 request or a v1 body; raises InvalidInput (HTTP 400, gRPC INVALID_ARGUMENT)."""
    if isinstance(payload, InferRequest):
        return _parse_v2(payload)
    if isinstance(payload, Mapping):
        return _parse_v1(payload)
    raise InvalidInput("the body is not a JSON object; send a v2 inference request or {'instances': [...]}")


def parameters_of(request: InferRequest) -> Mapping[str, Any]:
    """The request's parameters, from whichever wire."""
    try:
        parameters: dict[str, Any] = to_http_parameters(request.parameters) if request.parameters else {}
    except AttributeError as error:
        raise InvalidInput("'parameters' is not an object; expected such as {'num_items': 10}") from error
    return parameters


def _parse_v2(request: InferRequest) -> Query:
    inputs = tensors.named(request, ["user_id"], ["time_ms", "request_id", "exclude"])
    users = tensors.strings(inputs["user_id"], 1)
    rows = len(users)
    times = tensors.integers(inputs["time_ms"], 1) if "time_ms" in inputs else None
    requests = tensors.strings(inputs["request_id"], 1).tolist() if "request_id" in inputs else None
    exclude = tensors.strings(inputs["exclude"], 2) if "exclude" in inputs else np.empty((rows, 0), object)
    for name, value in (("time_ms", times), ("request_id", requests), ("exclude", exclude)):
        if value is not None and len(value) != rows:
            raise InvalidInput(f"input {name} has {len(value)} rows; user_id has {rows}")
    return checked_query(
        users.tolist(),
        None if times is None else times.tolist(),
        requests,
        [[item for item in row if item] for row in exclude.tolist()],
        parameters_of(request),
    )


def _parse_v1(body: Mapping[str, Any]) -> Query:
    instances = body.get("instances")
    if not isinstance(instances, list):
        raise InvalidInput("the body has no list 'instances'; expected {'instances': [{'user_id': '...'}]}")
    check_users(len(instances))
    rows: list[dict[str, Any]] = [{"user_id": each} if isinstance(each, str) else each for each in instances]
    for position, row in enumerate(rows):
        _check_instance(position, row)
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidInput("'parameters' is not an object; expected such as {'num_items': 10}")
    now = now_ms()
    return checked_query(
        [row["user_id"] for row in rows],
        [row.get("time_ms", now) for row in rows],
        [row.get("request_id") or uuid.uuid4().hex for row in rows],
        [row.get("exclude", []) for row in rows],
        parameters,
    )


def _check_instance(position: int, row: Any) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("user_id"), str) or set(row) - _KNOWN:
        raise InvalidInput(f"instance {position} is not an object with user_id (a string) and only {sorted(_KNOWN)}")
    if not isinstance(row.get("exclude", []), list) or not all(isinstance(i, str) for i in row.get("exclude", [])):
        raise InvalidInput(f"exclude of instance {position} is not a list of item ids (strings)")
    if type(row.get("time_ms", 0)) is not int or not isinstance(row.get("request_id", ""), str):
        raise InvalidInput(f"instance {position}: time_ms must be an integer and request_id a string")


def padded(rows: Sequence[Recommendation]) -> dict[str, np.ndarray]:
    """``PREDICTED`` as arrays; users with fewer items than others are padded with "" , 0 and SID -1."""
    width = max((len(row) for row in rows), default=0)
    levels = rows[0].sids.shape[1]
    item_ids = np.full((len(rows), width), "", object)
    scores = np.zeros((len(rows), width), np.float32)
    sids = np.full((len(rows), width, levels), -1, np.int32)
    log_probs = np.zeros((len(rows), width, levels), np.float32)
    for row, each in enumerate(rows):
        n = len(each)
        item_ids[row, :n], scores[row, :n] = each.item_ids, each.scores
        sids[row, :n], log_probs[row, :n] = each.sids, each.log_probs
    return {"item_ids": item_ids, "scores": scores, "sids": sids, "log_probs": log_probs}


def response_v2(answer: Answer, request: InferRequest, model_name: str) -> InferResponse:
    """The answer as v2 tensors."""
    arrays = padded(answer.recommendations)
    exposures = np.full(arrays["item_ids"].shape, "", object)
    for row, ids in enumerate(answer.exposure_ids):
        exposures[row, : len(ids)] = ids
    return response_of({**arrays, "exposure_ids": exposures}, request, model_name, answer.parameters)


def response_of(
    arrays: Mapping[str, np.ndarray], request: InferRequest, model_name: str, parameters: Mapping[str, Any]
) -> InferResponse:
    """A v2 response of ``arrays``, encoded as the request wants; ``model_version`` is among the parameters."""
    kinds = {each["name"]: each["datatype"] for each in OUTPUTS}
    return InferResponse(
        response_id=request.id or uuid.uuid4().hex,
        model_name=model_name,
        model_version=parameters["model_version"],
        infer_outputs=[InferOutput(name, list(data.shape), kinds[name], data) for name, data in arrays.items()],
        parameters=dict(parameters),
        # KServe fails on arrays when a gRPC request came in raw tensors; without being asked it writes raw ones anyway.
        use_binary_outputs=request.use_binary_outputs and not request.from_grpc,
        requested_outputs=request.request_outputs,
    )


def response_v1(answer: Answer) -> dict[str, Any]:
    """The answer as {"predictions": [one object a user], "model_version", "flags"}."""
    predictions = [
        {
            "item_ids": row.item_ids,
            "scores": row.scores.tolist(),
            "sids": row.sids.tolist(),
            "log_probs": row.log_probs.tolist(),
            "exposure_ids": exposures,
        }
        for row, exposures in zip(answer.recommendations, answer.exposure_ids, strict=True)
    ]
    return {"predictions": predictions, **answer.parameters, "flags": answer.flags}
