"""A predictor in another process, asked over gRPC v2; what it refuses is refused here in the same words.

Where the name stands for several addresses (a headless service), calls take turns between them. Left out: TLS between
the two (the mesh's business in a cluster).
"""

import time
from typing import Any

import grpc
from grpc import StatusCode
from kserve import InferenceGRPCClient, InferRequest
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import to_http_parameters

from models.serving.contexts import Contexts, from_response, to_request
from models.serving.errors import DeadlinePassed, NotReady, Overloaded
from models.serving.offload import beside
from models.serving.protocol import Prediction

MAX_MESSAGE = 64 * 2**20
"""Bytes: 128 users with the longest histories fit."""

IN_TURNS = '{"loadBalancingConfig": [{"round_robin": {}}]}'


class RemotePredictor:
    """The predictor at ``host:port`` for the model called ``name``."""

    def __init__(self, name: str, address: str) -> None:
        self._name = name
        self._address = address
        self._opened: InferenceGRPCClient | None = None

    @property
    def _client(self) -> InferenceGRPCClient:
        if self._opened is None:  # opened on the event loop that uses it
            limits = [(f"grpc.max_{way}_message_length", MAX_MESSAGE) for way in ("send", "receive")]
            options = [*limits, ("grpc.enable_retries", 0), ("grpc.service_config", IN_TURNS)]
            self._opened = InferenceGRPCClient(f"dns:///{self._address}", channel_args=options)
        return self._opened

    @property
    def reason(self) -> str:
        """Why it is not ready, when it is not."""
        return f"the predictor at {self._address} is not ready; see its own status page"

    async def ready(self) -> bool:
        """Whether the predictor answers and a version is in service there."""
        try:
            return bool(await self._client.is_model_ready(self._name, timeout=1.0))
        except grpc.RpcError:
            return False

    async def about(self) -> dict[str, Any]:
        """For the status page: what the predictor says of itself."""
        unknown = {"alias": "", "version": None, "ready": False, "reason": self.reason}
        try:
            response = await self._client.infer(InferRequest(self._name, [], request_id="about"), timeout=1.0)
        except grpc.RpcError:
            return {**unknown, "predictor": self._address}
        return {**unknown, **to_http_parameters(response.parameters), "predictor": self._address}

    def glance(self, users: int) -> None:
        """Nothing: how much waits is known to the predictor alone."""

    async def predict(self, asked: Contexts, request_id: str, deadline: float) -> Prediction:
        """Recommends to the users of ``asked``; raises NotReady, Overloaded, DeadlinePassed, InvalidInput."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlinePassed("the deadline passed before the predictor was asked; it was not run")
        left_ms = max(1, int(1000 * left))
        request = await beside(asked.values, lambda: to_request(asked, self._name, request_id, left_ms))
        try:
            response = await self._client.infer(request, timeout=left + 0.5, headers=(("x-request-id", request_id),))
        except grpc.RpcError as error:
            raise self._told(error) from error
        return from_response(response)

    def _told(self, error: grpc.RpcError) -> Exception:
        code, said = error.code(), error.details() or ""
        if code == StatusCode.INVALID_ARGUMENT:
            return InvalidInput(said)
        if code == StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(said)
        if code == StatusCode.DEADLINE_EXCEEDED:
            return DeadlinePassed(said)
        if code in (StatusCode.UNAVAILABLE, StatusCode.NOT_FOUND, StatusCode.CANCELLED):  # cancelled: it stops
            return NotReady(self._name, f"the predictor at {self._address} says: {said}")
        return RuntimeError(f"the predictor at {self._address} failed ({code.name}: {said})")
