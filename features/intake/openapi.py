"""The OpenAPI description of the collector, made from the very types that validate, and a page that shows it.

The page needs no network and no script. Left out: a console to try requests out.
"""

import html
import json
from functools import cache
from typing import Any

import msgspec

from features.intake.events import MAX_BODY_BYTES, MAX_EVENTS, Batch

FLUSH_TIMEOUT_S, LONGEST_FLUSH_S = 60, 600
"""How long ``POST /v1/flush`` waits: by default, and at most."""

_ABOUT = "What was shown to users, and what they did."
_TEXT = {
    202: "The batch is on disk.",
    400: "The client went away.",
    401: "No known token.",
    403: "`served` events with the client token.",
    408: "The body did not come in time.",
    413: f"More than {MAX_EVENTS} events or {MAX_BODY_BYTES} bytes; split the batch.",
    422: "Malformed or invalid; the reason and the index of the event are named, nothing was accepted.",
    429: "The disk budget is used up; send again after Retry-After seconds.",
    503: "The log cannot be written, or not flushed in time; send again after Retry-After seconds.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_FLAG = {"type": "boolean"}
_FLUSHED = {
    "type": "object",
    "properties": {"flushed": _FLAG, "updates_skipped": {"type": "integer"}},
    "required": ["flushed", "updates_skipped"],
}
_READY = {
    "type": "object",
    "properties": {"ready": _FLAG, "problem": {"type": ["string", "null"]}, "failing": {"type": "object"}},
    "required": ["ready", "problem", "failing"],
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {"type": "string"},
        "reason": {"type": "string", "description": "The word that the metric counts."},
        "index": {"type": ["integer", "null"], "description": "The first offending event."},
    },
    "required": ["error", "reason"],
}
_TIMEOUT = {
    "name": "timeout",
    "in": "query",
    "description": "Seconds.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_FLUSH_S, "default": FLUSH_TIMEOUT_S},
}


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1 as plain values."""
    (batch,), schemas = msgspec.json.schema_components([Batch], ref_template="#/components/schemas/{name}")
    accepted = {"type": "object", "properties": {"accepted": {"type": "integer"}}, "required": ["accepted"]}
    alive = {"type": "object", "properties": {"alive": _FLAG}, "required": ["alive"]}
    events = {
        "summary": "Append a batch of events",
        "description": "All of the batch is accepted or nothing. Send it again whenever there was no 202.",
        "security": [{"token": []}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": batch}}},
        "responses": _answers({202: accepted}, 400, 401, 403, 408, 413, 422, 429, 503),
    }
    flush = {
        "summary": "Wait until everything accepted is in S3 and in the on-line features",
        "security": [{"token": []}],
        "parameters": [_TIMEOUT],
        "responses": _answers({200: _FLUSHED}, 401, 422, 503),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "OneRec event collector",
            "version": "1",
            "description": _ABOUT,
        },
        "paths": {
            "/v1/events": {"post": events},
            "/v1/flush": {"post": flush},
            "/healthz": {"get": {"summary": "Whether the process lives", "responses": _probes(alive)}},
            "/readyz": {"get": {"summary": "Whether batches are accepted", "responses": _probes(_READY)}},
            "/metrics": {"get": {"summary": "Prometheus metrics", "responses": {"200": _text("The metrics.")}}},
        },
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


@cache
def page() -> str:
    """HTML without anything from elsewhere."""
    described = document()
    parts = [f"<h1>{described['info']['title']}</h1><p>{described['info']['description']}</p>"]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {path}</code></h2><p>{html.escape(operation['summary'])}.</p>")
            rows = "".join(
                f"<tr><td>{status}</td><td>{html.escape(answer['description'])}</td></tr>"
                for status, answer in operation["responses"].items()
            )
            parts.append(f"<table>{rows}</table>")
    parts.append('<h1>Types</h1><p>As JSON: <a href="openapi.json">openapi.json</a></p>')
    for name, schema in described["components"]["schemas"].items():
        parts.append(f"<h2>{name}</h2><pre>{html.escape(json.dumps(schema, indent=1))}</pre>")
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:2px 1em 2px 0;vertical-align:top}"
    title = described["info"]["title"]
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style>{''.join(parts)}"


def _answers(good: dict[int, Any], *errors: int) -> dict[str, Any]:
    answers = {str(status): _json(_TEXT.get(status, "Done."), schema) for status, schema in good.items()}
    for status in errors:
        answers[str(status)] = _json(_TEXT[status], {"$ref": "#/components/schemas/Error"})
        if status in (429, 503):
            answers[str(status)]["headers"] = _RETRY
    return answers


def _probes(schema: dict[str, Any]) -> dict[str, Any]:
    return {"200": _json("Yes.", schema), "503": _json("No.", schema)}


def _json(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _text(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"text/plain": {"schema": {"type": "string"}}}}
