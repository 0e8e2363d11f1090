"""The gRPC side (v2): KServe's servicer on one host, with our statuses, message limit and the administrator's token.

Left out: TLS, and Retry-After, for which gRPC has no header.
"""

from http import HTTPStatus
from typing import Any

from grpc import StatusCode, aio
from kserve.errors import InvalidInput, ModelNotFound
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer

from models.serving.admin import Administrator
from models.serving.errors import DeadlinePassed, Forbidden, NotReady, Overloaded, told
from models.serving.remote import MAX_MESSAGE

CONNECTION_AGE_MS = 300_000
"""Then callers connect anew, and find the servers that have come since."""
STATUS: dict[type[Exception], StatusCode] = {
    InvalidInput: StatusCode.INVALID_ARGUMENT,
    ModelNotFound: StatusCode.NOT_FOUND,
    NotReady: StatusCode.UNAVAILABLE,
    Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    DeadlinePassed: StatusCode.DEADLINE_EXCEEDED,
}


class Statuses(ExceptionToStatusInterceptor):
    """KServe's mapping of errors to gRPC statuses, without a traceback in the log for what is expected."""

    async def handle_exception(self, ex: Exception, request_or_iterator: Any, context: Any, method_name: str) -> None:
        """Ends the call with the error's status and message."""
        code = STATUS.get(type(ex))
        if isinstance(ex, Forbidden):
            missing = ex.status == HTTPStatus.UNAUTHORIZED
            code = StatusCode.UNAUTHENTICATED if missing else StatusCode.PERMISSION_DENIED
        if code is not None:
            await context.abort(code, told(ex))
        await super().handle_exception(ex, request_or_iterator, context, method_name)


class Servicer(InferenceServicer):
    """KServe's, but ``RepositoryModelLoad`` is for the administrator."""

    def __init__(self, plane: DataPlane, extension: Any, administrator: Administrator) -> None:
        super().__init__(plane, extension)
        self._administrator = administrator

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Looks at the model's alias at once."""
        metadata = dict(context.invocation_metadata() or ())
        self._administrator.check(str(metadata.get("authorization", "")))
        await self._data_plane.model_registry.load(request.model_name)
        return grpc_predict_v2_pb2_grpc.grpc__predict__v2__pb2.RepositoryModelLoadResponse(
            model_name=request.model_name, isLoaded=True
        )


class Grpc(GRPCServer):
    """KServe's gRPC server on one host, without a log line per call."""

    def __init__(
        self, address: str, plane: DataPlane, extension: Any, administrator: Administrator, grace: int
    ) -> None:
        super().__init__(0, plane, extension, kwargs={}, grace_period=grace)
        self._address = address
        self._administrator = administrator

    async def start(self, max_workers: int) -> None:
        """Serves until stopped; raises RuntimeError when the port is taken."""
        limits = [(f"grpc.max_{way}_message_length", MAX_MESSAGE) for way in ("send", "receive")]
        ages = [
            ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
            ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_MS),
        ]
        self._server = aio.server(interceptors=(Statuses(),), options=[*limits, *ages])
        servicer = Servicer(self._data_plane, self._model_repository_extension, self._administrator)
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        self._server.add_insecure_port(self._address)
        await self._server.start()
        await self._server.wait_for_termination()
