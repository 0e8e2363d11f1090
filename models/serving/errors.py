"""What a caller may be told instead of an answer; each error knows its HTTP status (gRPC's is in ``grpc_server``)."""

from http import HTTPStatus

from kserve.errors import InvalidInput, ModelNotReady

LONGEST = 600
"""Characters of a message: it may quote a caller who sent megabytes, and gRPC has 8 kB for it."""


def told(error: Exception) -> str:
    """What the caller is told of ``error``: the beginning and the end of a long message, as it ends with what to do."""
    text = str(error)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class NotReady(ModelNotReady):
    """HTTP 503, gRPC UNAVAILABLE: no version is in service, or the predictor does not answer; ``reason`` says why."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after = 1

    def __init__(self, model_name: str, reason: str = "") -> None:
        super().__init__(model_name, reason or None)


class Overloaded(RuntimeError):
    """HTTP 429, gRPC RESOURCE_EXHAUSTED: more waits for the model than may wait."""

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, reason: str, retry_after: int = 1) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class DeadlinePassed(RuntimeError):
    """HTTP 503, gRPC DEADLINE_EXCEEDED: the caller's time was over before the model had answered."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after = 1


class Forbidden(RuntimeError):
    """HTTP 401 or 403, gRPC UNAUTHENTICATED or PERMISSION_DENIED: not the administrator."""

    def __init__(self, reason: str, status: HTTPStatus) -> None:
        super().__init__(reason)
        self.status = status


class TooLarge(InvalidInput):
    """HTTP 413: more bytes than the thing can have."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
