"""What ``/openapi.json`` says of our own endpoints: inputs, parameters and answers by name."""

from typing import Any

from models.serving.protocol import PARAMETERS, TIMEOUT_HEADER

_RETRY = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
_ANSWERS: dict[str, Any] = {
    "200": {"description": "The answer"},
    "400": {"description": "Wrong request; the body's `error` says what was given and what is expected"},
    "404": {"description": "No such model"},
    "413": {"description": "The body is too large"},
    "429": {"description": "Too much waits already", "headers": _RETRY},
    "503": {"description": "No version in service, or the deadline passed before the model ran", "headers": _RETRY},
}
_HEADERS = [
    {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "schema": {"type": "integer", "minimum": 1},
        "description": "answer within this many milliseconds or not at all",
    },
    {"name": "x-request-id", "in": "header", "schema": {"type": "string"}, "description": "names the request in logs"},
]
_BEARER = {"name": "authorization", "in": "header", "schema": {"type": "string"}, "description": "Bearer <token>"}
_REFUSED = {"401": {"description": "No administrator's token"}, "403": {"description": "Not the administrator's token"}}


def _parameters() -> dict[str, Any]:
    properties = {name: {"type": kind, "description": text} for name, (kind, text) in PARAMETERS.items()}
    return {"type": "object", "properties": properties}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def infer(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of v2 inference with these inputs."""
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"type": "string", "enum": [each["name"] for each in inputs]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "datatype": {"type": "string", "enum": sorted({each["datatype"] for each in inputs})},
            "data": {"type": "array", "items": {}},
        },
    }
    schema = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": tensor, "minItems": 1},
            "parameters": _parameters(),
        },
    }
    return {**_body(schema), "responses": _ANSWERS, "parameters": _HEADERS}


def predict() -> dict[str, Any]:
    """Of v1 ``:predict``."""
    instance = {
        "type": "object",
        "required": ["user_id"],
        "properties": {
            "user_id": {"type": "string"},
            "time_ms": {"type": "integer"},
            "request_id": {"type": "string"},
            "exclude": {"type": "array", "items": {"type": "string"}},
        },
    }
    instances = {"type": "array", "items": instance, "minItems": 1}
    properties = {"instances": instances, "parameters": _parameters()}
    schema = {"type": "object", "required": ["instances"], "properties": properties}
    return {**_body(schema), "responses": _ANSWERS, "parameters": _HEADERS}


def administration() -> dict[str, Any]:
    """Of what asks for the administrator's token."""
    answers = {status: _ANSWERS[status] for status in ("200", "400", "404", "503")}
    return {"responses": {**answers, **_REFUSED}, "parameters": [_BEARER]}


def weights() -> dict[str, Any]:
    """Of a push of weights."""
    names = {"x-onerec-sha256": "of the body, 64 hexadecimal digits", "x-onerec-version": "named in every answer"}
    headers = [
        {"name": name, "in": "header", "required": True, "schema": {"type": "string"}, "description": text}
        for name, text in names.items()
    ]
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    answers = {status: _ANSWERS[status] for status in ("200", "400", "404", "413")}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {**answers, **_REFUSED},
        "parameters": [_BEARER, *headers],
    }
