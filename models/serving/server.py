"""kserve.ModelServer made fit for this platform: one host, quiet logs, 400 for malformed bodies, no false readiness.

What KServe 0.21 does otherwise (found by reading and running it): it listens on every interface, refuses to start
while no model is ready, answers 422 or 500 to bodies that do not parse, logs a traceback for every 400, unloads all
models before it has drained, and lets anybody unload a model. Left out: authentication of the repository's ``load``
(it only looks at the alias sooner).
"""

import asyncio
import logging
import warnings
from http import HTTPStatus
from typing import Any

import fastapi
import kserve
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from grpc import StatusCode, aio
from kserve.constants.constants import FASTAPI_APP_IMPORT_STRING, MAX_GRPC_MESSAGE_LENGTH
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import RESTServer

from models.serving.events import ServedLog
from models.serving.predictor import NotReady, OneRecModel

GRACE_S = 20
STATUS = {InvalidInput: HTTPStatus.BAD_REQUEST, ModelNotFound: HTTPStatus.NOT_FOUND}
GRPC_STATUS = {
    InvalidInput: StatusCode.INVALID_ARGUMENT,
    ModelNotFound: StatusCode.NOT_FOUND,
    NotReady: StatusCode.UNAVAILABLE,
}


class Repository(kserve.ModelRepository):
    """Models by name; ``load`` looks at the model's alias at once, also retrying a bundle refused before."""

    def get_one(self, name: str) -> OneRecModel:
        """The model called ``name``; raises ModelNotFound."""
        model = self.get_model(name)
        if not isinstance(model, OneRecModel):
            raise ModelNotFound(name)
        return model

    async def load(self, name: str) -> bool:  # type: ignore[override]
        """Follows the alias now; raises with the reason when what it names was refused."""
        follower = self.get_one(name).follower
        await asyncio.to_thread(follower.check, True)
        if follower.reason:
            raise RuntimeError(follower.reason)
        return True

    def unload(self, name: str) -> None:
        """Refused: which bundle is served follows from the alias alone."""
        raise InvalidInput(f"model {name} follows an alias and cannot be unloaded; move the alias instead")


class Plane(DataPlane):
    """Bodies that do not decode are the client's mistake."""

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """As KServe, with InvalidInput for whatever the body made its parser raise."""
        try:
            return super().decode(*args, **kwargs)
        except InvalidInput:
            raise
        except Exception as error:
            raise InvalidInput(f"the body cannot be decoded ({type(error).__name__}: {error})") from error


class Rest(RESTServer):
    """KServe's REST server with our status page and error answers."""

    def __init__(self, models: list[OneRecModel], served: ServedLog, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._models = models
        self._served = served

    def _register_endpoints(self, app: fastapi.FastAPI) -> None:
        super()._register_endpoints(app)
        app.add_api_route("/onerec/status", self.status, methods=["GET"])

    def _add_middlewares(self, app: fastapi.FastAPI) -> None:
        """None: KServe's log every request's timing, which the histograms already hold."""

    def _add_exception_handlers(self, app: fastapi.FastAPI) -> None:
        super()._add_exception_handlers(app)
        app.add_exception_handler(RequestValidationError, _malformed)
        for error in (InvalidInput, ModelNotFound, ModelNotReady):
            app.add_exception_handler(error, self._expected)

    async def _expected(self, _: fastapi.Request, error: Exception) -> JSONResponse:
        text = str(error)
        if isinstance(error, ModelNotReady):
            reasons = {model.name: model.follower.reason for model in self._models}
            reason = reasons.get(error.model_name, "")
            text += f" {reason}" if reason not in text else ""
        return JSONResponse({"error": text}, status_code=STATUS.get(type(error), HTTPStatus.SERVICE_UNAVAILABLE))

    async def status(self) -> dict[str, Any]:
        """Each model's version and readiness, and how many served events the collector has not acknowledged."""
        return {
            "models": {
                model.name: {
                    "alias": model.follower.alias,
                    "version": model.follower.version,
                    "ready": model.follower.recommender is not None,
                    "reason": model.follower.reason,
                    "requests": model.requests,
                    **model.follower.catalogue(),
                }
                for model in self._models
            },
            "served_queue": self._served.queued,
            "served_spooled": self._served.spooled,
        }


async def _malformed(_: fastapi.Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The body is tried as bytes too; the path without that branch is what the client wrote.
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "InferenceRequest", "bytes"))
    text = f"the body is not a v2 inference request: {place or 'body'}: {first['msg']}"
    return JSONResponse({"error": text}, status_code=HTTPStatus.BAD_REQUEST)


class Statuses(ExceptionToStatusInterceptor):
    """KServe's mapping of errors to gRPC statuses, without a traceback in the log for a client's mistake."""

    async def handle_exception(self, ex: Exception, request_or_iterator: Any, context: Any, method_name: str) -> None:
        """Ends the call with the error's status and message."""
        code = GRPC_STATUS.get(type(ex))
        if code is not None:
            await context.abort(code, str(ex))
        await super().handle_exception(ex, request_or_iterator, context, method_name)


class Grpc(GRPCServer):
    """KServe's gRPC server on one host, without a log line per call."""

    def __init__(self, host: str, port: int, plane: DataPlane, extension: Any) -> None:
        super().__init__(port, plane, extension, kwargs={}, grace_period=GRACE_S)
        self._host = host

    async def start(self, max_workers: int) -> None:
        """Serves until stopped; raises RuntimeError when the port is taken."""
        limits = [(f"grpc.max_{way}_message_length", MAX_GRPC_MESSAGE_LENGTH) for way in ("send", "receive")]
        self._server = aio.server(interceptors=(Statuses(),), options=limits)
        servicer = InferenceServicer(self._data_plane, self._model_repository_extension)
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        self._server.add_insecure_port(f"{self._host}:{self._port}")
        await self._server.start()
        await self._server.wait_for_termination()


class Server(kserve.ModelServer):
    """Serves the models on ``host`` until SIGTERM or SIGINT, then drains."""

    def __init__(self, host: str, http_port: int, grpc_port: int, served: ServedLog) -> None:
        self._quieten()
        super().__init__(http_port=http_port, grpc_port=grpc_port, registered_models=Repository(), grace_period=GRACE_S)
        self.dataplane = Plane(model_registry=self.registered_models)
        self._host = host
        self._served = served

    def start(self, models: list[OneRecModel]) -> None:  # type: ignore[override]
        """Blocks until the server has stopped; models may become ready later."""
        for model in models:
            self.register_model(model)
        rest = Rest(
            models,
            self._served,
            FASTAPI_APP_IMPORT_STRING,
            self.dataplane,
            self.model_repository_extension,
            self.http_port,
            grace_period=GRACE_S,
        )
        rest.config.host = self._host
        self._rest_server = rest
        self._grpc_server = Grpc(self._host, self.grpc_port, self.dataplane, self.model_repository_extension)
        self.servers = [rest.start(), self._grpc_server.start(self.max_threads)]
        self.register_signal_handler()
        asyncio.run(self._serve())

    def stop(self, sig: int) -> None:
        """Uvicorn handles the signal first and raises it again when it has drained; the gRPC server drains next."""
        self._rest_server._server.should_exit = True  # the signal came before Uvicorn listened to it
        asyncio.get_running_loop().create_task(self._grpc_server.stop(sig))

    @staticmethod
    def _quieten() -> None:
        kserve.logging.configure_logging()
        for name in ("kserve", "kserve.trace", "uvicorn.access", "uvicorn.error", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")  # KServe's use of it, every request
