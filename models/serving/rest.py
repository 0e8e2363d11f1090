"""The REST side: KServe's server with our own endpoints for inference, administration and status.

KServe 0.21 parses every tensor through pydantic, answers 422 or 500 to bodies that do not parse and 501 for what it
never implemented, lets anybody load and unload, and goes on working for clients that hung up. Here a body is parsed
once, errors are sentences with a fitting status (and Retry-After), and a client that goes away cancels its request.
Left out: CloudEvents.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import fastapi
import numpy as np
import orjson
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from kserve import InferRequest, InferResponse
from kserve.constants.constants import FASTAPI_APP_IMPORT_STRING, INFERENCE_CONTENT_LENGTH_HEADER
from kserve.errors import InferenceError, InvalidInput, ModelNotFound, ModelNotReady
from kserve.protocol.rest.server import RESTServer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from models.serving import page
from models.serving.admin import Administrator, receive_weights
from models.serving.errors import DeadlinePassed, Forbidden, NotReady, Overloaded, TooLarge, told
from models.serving.offload import ITEM, LENGTH, VALUE_BYTES, beside
from models.serving.predictor import PredictorModel
from models.serving.telemetry import CLIENT_CLOSED, request_id_of, status_of
from models.serving.transformer import OneRecModel

ServedModel = OneRecModel | PredictorModel
MAX_BODY = 32 * 2**20
"""Bytes of a request: 128 users with 10 000 excluded items each are less."""
REPLACED = ("/infer", ":predict", "/load", "/versions/", ":explain", "/unload")
"""Endings and parts of KServe's own paths that are not offered, or offered by us."""
_JSON = "application/json"


class Rest(RESTServer):
    """``weights`` is where pushed weights are kept for a moment; ``status`` tells what the status page shows."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        administrator: Administrator,
        weights: Path,
        status: Callable[[], Awaitable[dict[str, Any]]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(FASTAPI_APP_IMPORT_STRING, *args, **kwargs)
        self._models = {model.name: model for model in models}
        self._administrator = administrator
        self._weights = weights
        self._status = status

    def _register_endpoints(self, app: fastapi.FastAPI) -> None:
        super()._register_endpoints(_Choosing(app))
        inputs = next(iter(self._models.values())).get_input_types()
        routes: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = [
            ("POST", "/v2/models/{model_name}/infer", self.infer, page.infer(inputs)),
            ("POST", "/v1/models/{model_name}:predict", self.predict, page.predict()),
            ("POST", "/v2/repository/models/{model_name}/load", self.load, page.administration()),
            ("POST", "/v2/repository/models/{model_name}/unload", self.unload, page.administration()),
            ("POST", "/onerec/models/{model_name}/weights", self.push, page.weights()),
            ("GET", "/onerec/status", self.status, {}),
        ]
        for method, path, endpoint, about in routes:
            app.add_api_route(path, endpoint, methods=[method], openapi_extra=about, response_model=None)

    def _add_middlewares(self, app: fastapi.FastAPI) -> None:
        """None: KServe's log every request's timing, which the histograms already hold."""

    def _add_exception_handlers(self, app: fastapi.FastAPI) -> None:
        super()._add_exception_handlers(app)
        app.add_exception_handler(RequestValidationError, _malformed)
        app.add_exception_handler(NotImplementedError, _absent)
        app.add_exception_handler(HTTPException, _not_offered)
        app.add_exception_handler(ClientDisconnect, _gone)
        expected = (InvalidInput, InferenceError, ModelNotFound, ModelNotReady, Overloaded, DeadlinePassed, Forbidden)
        for error in (*expected, NotReady, TooLarge):
            app.add_exception_handler(error, self._expected)

    async def infer(self, request: fastapi.Request, model_name: str) -> Response:
        """Open Inference Protocol v2."""
        with self._reading(request, model_name):
            body = await _body(request)
            headers = {**request.headers, LENGTH: str(len(body))}
            length = _json_length(headers, body)
            asked = await beside(len(body) // VALUE_BYTES, lambda: _parsed(body, length, model_name))
        answer = await _unless_gone(request, self.dataplane.infer(model_name, asked, headers))
        if answer is None:
            return Response(status_code=CLIENT_CLOSED)
        response = answer[0]
        assert isinstance(response, InferResponse)
        items = ITEM * math.prod(response.outputs[0].shape if response.outputs else [])
        return await beside(items, lambda: _encoded(response))

    async def predict(self, request: fastapi.Request, model_name: str) -> Response:
        """Protocol v1."""
        with self._reading(request, model_name):
            body = await _body(request)
            headers = {**request.headers, LENGTH: str(len(body))}
            try:
                asked = await beside(len(body) // VALUE_BYTES, lambda: orjson.loads(body))
            except orjson.JSONDecodeError as error:
                raise InvalidInput(f"the body is not JSON ({error}); send {{'instances': [...]}}") from error
        answer = await _unless_gone(request, self.dataplane.infer(model_name, asked, headers))
        return Response(status_code=CLIENT_CLOSED) if answer is None else _json(answer[0])

    @contextmanager
    def _reading(self, request: fastapi.Request, model_name: str) -> Iterator[None]:
        """A body that is no request, or never came, is counted and logged as what the model itself refuses."""
        try:
            yield
        except (InvalidInput, ClientDisconnect):
            if (model := self._models.get(model_name)) is None:
                raise
            with model.telemetry.request(request_id_of(None, request.headers)):
                raise

    async def load(self, request: fastapi.Request, model_name: str) -> Response:
        """Looks at the model's alias at once; for the administrator."""
        self._administrator.check(request.headers.get("authorization", ""))
        await self.dataplane.model_registry.load(model_name)
        return _json({"name": model_name, "load": True})

    async def unload(self, model_name: str) -> Response:
        """Refused: which bundle is served follows from the alias alone."""
        self.dataplane.model_registry.unload(model_name)
        return _json({"name": model_name, "unload": True})

    async def push(self, request: fastapi.Request, model_name: str) -> Response:
        """Takes a trainer's weights (safetensors); for the administrator, on roll-out servers only."""
        self._administrator.check(request.headers.get("authorization", ""))
        if model_name not in self._models:
            raise ModelNotFound(model_name)
        return _json(await receive_weights(request, self._models[model_name], self._weights))

    async def status(self) -> Response:
        """Each model's version and readiness, and how many served events the collector has not acknowledged."""
        return _json(await self._status())

    async def _expected(self, _: fastapi.Request, error: Exception) -> Response:
        if isinstance(error, ModelNotReady) and not isinstance(error, NotReady):  # KServe's, which knows no reason
            error = NotReady(error.model_name, self._models[error.model_name].predictor.reason)
        retry = getattr(error, "retry_after", None)
        served = f" Served here: {', '.join(self._models)}." if isinstance(error, ModelNotFound) else ""
        return _json({"error": told(error) + served}, status_of(error), {"Retry-After": str(retry)} if retry else None)


class _Choosing:
    """Stands for the application while KServe registers its endpoints; takes those that are not ``REPLACED``."""

    def __init__(self, app: fastapi.FastAPI) -> None:
        self._app = app

    def include_router(self, router: fastapi.APIRouter) -> None:
        """As the application's, with a part of the router."""
        kept = [route for route in router.routes if not any(part in getattr(route, "path", "") for part in REPLACED)]
        router.routes[:] = kept
        self._app.include_router(router)


async def _unless_gone(request: fastapi.Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of ``work``; None when the client went away first, and then ``work`` is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # after the body, the only message left is the disconnect
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _body(request: fastapi.Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise TooLarge(f"the body is larger than {MAX_BODY} bytes")
        parts.append(part)
    return b"".join(parts)


def _json_length(headers: dict[str, str], body: bytes) -> int:
    """How much of the body is JSON; binary tensors follow."""
    given = headers.get(INFERENCE_CONTENT_LENGTH_HEADER.lower())
    if given is None:
        return len(body)
    if not given.isascii() or not given.isdigit() or len(given) > 12 or int(given) > len(body):
        raise InvalidInput(
            f"header {INFERENCE_CONTENT_LENGTH_HEADER} is {given[:40]!r}; the body has {len(body)} bytes"
        )
    return int(given)


def _parsed(body: bytes, json_length: int, model_name: str) -> InferRequest:
    """KServe's parser takes well-formed requests for granted; whatever it raises is the client's mistake."""
    try:
        request = InferRequest.from_bytes(body, json_length, model_name)
    except Exception as error:
        said = f"{error}" if isinstance(error, InvalidInput) else f"{type(error).__name__}: {error}"
        raise InvalidInput(
            f"the body is not a v2 inference request ({said}); "
            "expected {'inputs': [{'name', 'shape', 'datatype', 'data'}]}"
        ) from error
    for tensor in request.inputs:
        if not isinstance(tensor.name, str) or not isinstance(tensor.datatype, str):
            raise InvalidInput("an input has no name or datatype (strings)")
    if request.id is not None and not isinstance(request.id, str):
        raise InvalidInput(f"id is {request.id!r}; expected a string")
    return request


def _encoded(response: InferResponse) -> Response:
    if response._requested_outputs or response._use_binary_outputs:
        return _chosen(response)
    outputs = [
        {"name": each.name, "shape": each.shape, "datatype": each.datatype, "data": _flat(each.data)}
        for each in response.outputs
    ]
    about = {"id": response.id, "model_name": response.model_name, "model_version": response.model_version}
    return _json({**about, "parameters": response.parameters, "outputs": outputs})


def _chosen(response: InferResponse) -> Response:
    """Some of the outputs, or binary ones, as KServe writes them."""
    try:
        body, json_length = response.to_rest()
    except (AttributeError, TypeError, InferenceError) as error:
        raise InvalidInput(f"the requested outputs cannot be written ({error})") from error
    if json_length is None:
        return _json(body)
    headers = {INFERENCE_CONTENT_LENGTH_HEADER: str(json_length)}
    return Response(body, media_type="application/octet-stream", headers=headers)


def _flat(data: np.ndarray) -> np.ndarray | list[Any]:
    """Row by row; orjson writes numbers straight from the array."""
    flat = data.ravel()
    return flat.tolist() if flat.dtype == object else flat


def _json(body: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), status, headers, _JSON)


async def _absent(_: fastapi.Request, error: Exception) -> Response:
    return _json({"error": f"this is not offered ({error})"}, HTTPStatus.NOT_FOUND)


async def _gone(_: fastapi.Request, error: Exception) -> Response:
    """Nobody is there to read it: the client hung up while it was still sending."""
    return Response(status_code=CLIENT_CLOSED)


async def _not_offered(request: fastapi.Request, error: Exception) -> Response:
    """A path or method that nobody has: Starlette's own answer says neither what was given nor what there is."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:200]}"
    what = f"{asked} is not offered ({error.detail}); GET /openapi.json lists what is"
    return _json({"error": what}, error.status_code, dict(error.headers or {}))


async def _malformed(_: fastapi.Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return _json({"error": f"the request is malformed: {place}: {first['msg']}"}, HTTPStatus.BAD_REQUEST)
