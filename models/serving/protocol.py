"""The wire forms of a recommendation request: Open Inference Protocol v2 (REST, gRPC) and v1 ``:predict``.

v2 inputs: ``user_id`` BYTES [B]; optional ``time_ms`` INT64 [B] (the request's clock, UTC ms), ``request_id`` BYTES
[B], ``exclude`` BYTES [B, M] (item ids, "" pads). Parameters: num_items, beam_width, mode (beam | sample | session),
temperature, seed, exclude_seen. v1: {"instances": [{"user_id", "time_ms", "request_id", "exclude": [...]}],
"parameters": {...}}.
KServe checks no shapes or types and answers 500 to wrong ones, so everything is checked here, with a 400 that says
what was given and what is expected.
"""

import math
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.errors import InferenceError, InvalidInput
from kserve.protocol.infer_type import to_http_parameters

from models.serving.recommender import MODES, Recommendation

MAX_USERS = 128
MAX_ITEMS = 100
MAX_BEAMS = 512
MAX_EXCLUDED = 10_000
MAX_ID = 128
EARLIEST_MS, LATEST_MS = 946_684_800_000, 4_102_444_800_000  # the years 2000 to 2099
TRANSPORT_PARAMETERS = {"binary_data_output"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a request may choose; equal options can share a batch."""

    num_items: int = 10
    beam_width: int = 0
    mode: str = "beam"
    temperature: float = 1.0
    exclude_seen: bool = True
    seed: int | None = None

    @property
    def beams(self) -> int:
        """The beam width, or a sensible one for ``num_items`` when none was asked for."""
        return self.beam_width or min(max(2 * self.num_items, 32), MAX_BEAMS)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A checked request for B users."""

    user_ids: list[str]
    times_ms: np.ndarray
    request_ids: list[str]
    exclude: list[frozenset[str]]
    options: Options


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is sent back; ``flags`` are distinct and sorted, ``exposure_ids`` match the recommended items."""

    model_version: str
    recommendations: list[Recommendation]
    exposure_ids: list[list[str]]
    flags: list[str]


def parse(payload: Any) -> Query:
    """The query of a v2 request or a v1 body; raises InvalidInput (HTTP 400, gRPC INVALID_ARGUMENT)."""
    if isinstance(payload, InferRequest):
        return _parse_v2(payload)
    if isinstance(payload, Mapping):
        return _parse_v1(payload)
    raise InvalidInput("the body is not a JSON object; send a v2 inference request or {'instances': [...]}")


def _parse_v2(request: InferRequest) -> Query:
    inputs: dict[str, InferInput] = {}
    for each in request.inputs:
        if each.name in inputs:
            raise InvalidInput(f"input {each.name!r} is given twice")
        inputs[each.name] = each
    unknown = sorted(set(inputs) - {"user_id", "time_ms", "request_id", "exclude"})
    if unknown or "user_id" not in inputs:
        raise InvalidInput(f"inputs are {sorted(inputs)}; expected user_id and optionally time_ms, request_id, exclude")
    users = _strings(inputs["user_id"], 1)
    rows = len(users)
    times = _integers(inputs["time_ms"]) if "time_ms" in inputs else None
    requests = _strings(inputs["request_id"], 1).tolist() if "request_id" in inputs else None
    exclude = _strings(inputs["exclude"], 2) if "exclude" in inputs else np.empty((rows, 0), object)
    for name, value in (("time_ms", times), ("request_id", requests), ("exclude", exclude)):
        if value is not None and len(value) != rows:
            raise InvalidInput(f"input {name} has {len(value)} rows; user_id has {rows}")
    parameters = to_http_parameters(request.parameters) if request.parameters else {}
    return _query(
        users.tolist(),
        None if times is None else times.tolist(),
        requests,
        [[item for item in row if item] for row in exclude.tolist()],
        parameters,
    )


def _parse_v1(body: Mapping[str, Any]) -> Query:
    instances = body.get("instances")
    if not isinstance(instances, list):
        raise InvalidInput("the body has no list 'instances'; expected {'instances': [{'user_id': '...'}]}")
    rows: list[dict[str, Any]] = [{"user_id": each} if isinstance(each, str) else each for each in instances]
    known = {"user_id", "time_ms", "request_id", "exclude"}
    for position, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("user_id"), str) or set(row) - known:
            raise InvalidInput(f"instance {position} is not an object with user_id (a string) and only {sorted(known)}")
        if not isinstance(row.get("exclude", []), list) or not all(isinstance(i, str) for i in row.get("exclude", [])):
            raise InvalidInput(f"exclude of instance {position} is not a list of item ids (strings)")
        if type(row.get("time_ms", 0)) is not int or not isinstance(row.get("request_id", ""), str):
            raise InvalidInput(f"instance {position}: time_ms must be an integer and request_id a string")
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidInput("'parameters' is not an object; expected such as {'num_items': 10}")
    now = _now_ms()
    return _query(
        [row["user_id"] for row in rows],
        [row.get("time_ms", now) for row in rows],
        [row.get("request_id") or uuid.uuid4().hex for row in rows],
        [row.get("exclude", []) for row in rows],
        parameters,
    )


def _query(
    users: list[str],
    times: list[int] | None,
    requests: list[str] | None,
    exclude: list[list[str]],
    parameters: Mapping[str, Any],
) -> Query:
    if not 1 <= len(users) <= MAX_USERS:
        raise InvalidInput(f"the request names {len(users)} users; expected 1 to {MAX_USERS}")
    for name, ids in (("user_id", users), ("request_id", requests or [])):
        if not all(1 <= len(each) <= MAX_ID and _clean(each) for each in ids):
            raise InvalidInput(f"a {name} is empty, longer than {MAX_ID} characters or holds control characters")
    for row, times_ms in enumerate(times or []):
        if not EARLIEST_MS <= times_ms < LATEST_MS:
            raise InvalidInput(f"time_ms {times_ms} of row {row} is not in 2000 to 2099; give UTC milliseconds")
    if any(len(row) > MAX_EXCLUDED for row in exclude):
        raise InvalidInput(f"more than {MAX_EXCLUDED} items are excluded for one user")
    return Query(
        user_ids=users,
        times_ms=np.array(times if times is not None else [_now_ms()] * len(users), np.int64),
        request_ids=requests or [uuid.uuid4().hex for _ in users],
        exclude=[frozenset(row) for row in exclude],
        options=_options(parameters),
    )


def _clean(name: str) -> bool:
    """Whether the collector will take the id: valid Unicode without control characters."""
    return not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in name)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _options(parameters: Mapping[str, Any]) -> Options:
    known = {field.name for field in fields(Options)}
    unknown = sorted(set(parameters) - known - TRANSPORT_PARAMETERS)
    if unknown:
        raise InvalidInput(f"unknown parameters {unknown}; expected some of {sorted(known)}")
    chosen: dict[str, Any] = {}
    for name, low, high in (("num_items", 1, MAX_ITEMS), ("beam_width", 1, MAX_BEAMS), ("seed", 0, 2**63 - 1)):
        if name in parameters:
            value = parameters[name]
            if type(value) is not int or not low <= value <= high:
                raise InvalidInput(f"parameter {name} is {value!r}; expected an integer from {low} to {high}")
            chosen[name] = value
    if "temperature" in parameters:
        chosen["temperature"] = _temperature(parameters["temperature"])
    mode, seen = parameters.get("mode", MODES[0]), parameters.get("exclude_seen", True)
    if mode not in MODES:
        raise InvalidInput(f"parameter mode is {mode!r}; expected one of {', '.join(MODES)}")
    if not isinstance(seen, bool):
        raise InvalidInput(f"parameter exclude_seen is {seen!r}; expected true or false")
    return Options(mode=mode, exclude_seen=seen, **chosen)


def _temperature(value: Any) -> float:
    """gRPC parameters have no floats, so a string with a number is accepted too."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.01 <= number <= 100:
        raise InvalidInput(f"parameter temperature is {value!r}; expected a number from 0.01 to 100")
    return number


def _values(tensor: InferInput, dimensions: int) -> np.ndarray:
    """The tensor's values in its shape; JSON data may be flat or nested."""
    shape = list(tensor.shape)
    if len(shape) != dimensions or any(size < 0 for size in shape):
        raise InvalidInput(f"input {tensor.name} has shape {shape}; expected {dimensions} dimension(s), users first")
    if math.prod(shape) > MAX_USERS * MAX_EXCLUDED:
        raise InvalidInput(f"input {tensor.name} of shape {shape} is too large")
    try:
        return np.asarray(tensor.as_numpy()).reshape(shape)
    except (ValueError, TypeError, OverflowError, struct.error, InferenceError) as error:
        raise InvalidInput(f"input {tensor.name}: its data do not make a {tensor.datatype} of shape {shape}") from error


def _strings(tensor: InferInput, dimensions: int) -> np.ndarray:
    """The tensor's values as an object array of str."""
    if tensor.datatype != "BYTES":
        raise InvalidInput(f"input {tensor.name} has datatype {tensor.datatype}; expected BYTES")
    values = _values(tensor, dimensions)
    decoded = np.empty(values.shape, object)
    for place, value in np.ndenumerate(values):
        try:
            decoded[place] = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise InvalidInput(f"input {tensor.name} holds bytes that are not UTF-8") from error
        if not isinstance(decoded[place], str):
            raise InvalidInput(f"input {tensor.name} holds {value!r}; expected strings")
    return decoded


def _integers(tensor: InferInput) -> np.ndarray:
    if tensor.datatype != "INT64":
        raise InvalidInput(f"input {tensor.name} has datatype {tensor.datatype}; expected INT64")
    if isinstance(tensor.data, list) and any(type(value) is not int for value in tensor.data):
        raise InvalidInput(f"input {tensor.name} holds values that are not integers")
    return _values(tensor, 1)


def response_v2(answer: Answer, request: InferRequest, model_name: str) -> InferResponse:
    """The answer as v2 tensors; users with fewer items than others are padded with "" , 0 and SID -1."""
    rows = answer.recommendations
    width = max((len(row.item_ids) for row in rows), default=0)
    levels = rows[0].sids.shape[1]
    item_ids, exposure_ids = (np.full((len(rows), width), "", object) for _ in range(2))
    scores = np.zeros((len(rows), width), np.float32)
    sids = np.full((len(rows), width, levels), -1, np.int32)
    log_probs = np.zeros((len(rows), width, levels), np.float32)
    for row, (recommended, exposures) in enumerate(zip(rows, answer.exposure_ids, strict=True)):
        n = len(recommended.item_ids)
        item_ids[row, :n], exposure_ids[row, :n] = recommended.item_ids, exposures
        scores[row, :n], sids[row, :n], log_probs[row, :n] = recommended.scores, recommended.sids, recommended.log_probs
    named: Sequence[tuple[str, str, np.ndarray]] = (
        ("item_ids", "BYTES", item_ids),
        ("scores", "FP32", scores),
        ("sids", "INT32", sids),
        ("log_probs", "FP32", log_probs),
        ("exposure_ids", "BYTES", exposure_ids),
    )
    return InferResponse(
        response_id=request.id or uuid.uuid4().hex,
        model_name=model_name,
        model_version=answer.model_version,
        infer_outputs=[InferOutput(name, list(data.shape), datatype, data) for name, datatype, data in named],
        parameters={"model_version": answer.model_version, "flags": ",".join(answer.flags)},
        use_binary_outputs=request.use_binary_outputs,
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
    return {"predictions": predictions, "model_version": answer.model_version, "flags": answer.flags}
