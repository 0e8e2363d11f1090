"""kserve.ModelServer made fit for this platform: one host, quiet logs, an orderly end, no false readiness.

What KServe 0.21 does otherwise (found by reading and running it): it listens on every interface, refuses to start
while no model is ready, and unloads all models before it has drained. On SIGTERM this server says "not ready" first and
serves on for ``drain_s``, with answers that close their connections, so that callers look elsewhere; then it answers
what it has accepted, and ends.
Left out: several workers (each would hold its own model; run more replicas instead).
"""

import asyncio
import gc
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import kserve
from kserve.errors import InvalidInput, ModelNotFound
from kserve.protocol.dataplane import DataPlane

from models.serving.admin import Administrator, source_of
from models.serving.errors import NotReady
from models.serving.events import ServedLog
from models.serving.grpc_server import Grpc
from models.serving.rest import Rest, ServedModel

GRACE_S = 20


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where and for how long."""

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 8081
    drain_s: float = 0.0
    """Seconds between "not ready" and closing the door."""


class Repository(kserve.ModelRepository):
    """Models by name; ``load`` looks at the model's alias at once, also retrying a bundle refused before."""

    async def load(self, name: str) -> bool:  # type: ignore[override]
        """Follows the alias now; raises with the reason when what it names was refused."""
        model = self.get_model(name)
        if model is None:
            raise ModelNotFound(name)
        source = source_of(model)
        if source is None:
            raise InvalidInput(f"model {name} is another process's; ask the predictor to load")
        await asyncio.to_thread(source.check, True)
        if source.reason:
            raise NotReady(name, source.reason)
        return True

    def unload(self, name: str) -> None:
        """Refused: which bundle is served follows from the alias alone."""
        if self.get_model(name) is None:
            raise ModelNotFound(name)
        raise InvalidInput(f"model {name} follows an alias and cannot be unloaded; move the alias instead")


class Plane(DataPlane):
    """Readiness says no while the server is leaving; inference asks the model itself."""

    leaving = False

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Whether the model may be sent requests."""
        return not self.leaving and bool(await super().model_ready(model_name, disable_predictor_health_check))

    async def get_model(self, name: str) -> Any:
        """The model; whether it is ready it says itself, with the reason."""
        return self.get_model_from_registry(name)


class Server(kserve.ModelServer):
    """Serves the models until SIGTERM or SIGINT, then drains; ``served`` is None where nothing is shown to anybody."""

    def __init__(self, listening: Listening, served: ServedLog | None, token: str, weights: Path) -> None:
        self._quieten()
        super().__init__(
            http_port=listening.port,
            grpc_port=listening.grpc_port,
            registered_models=Repository(),
            grace_period=GRACE_S,
        )
        self.dataplane = Plane(model_registry=self.registered_models)
        self._listening = listening
        self._served = served
        self._administrator = Administrator(token)
        self._weights = weights
        self._models: Sequence[ServedModel] = ()

    def start(self, models: Sequence[ServedModel]) -> None:  # type: ignore[override]
        """Blocks until the server has stopped; models may become ready later."""
        self._models = models
        for model in models:
            self.register_model(model)
        plane, extension, host = self.dataplane, self.model_repository_extension, self._listening.host
        rest = Rest(
            *(models, self._administrator, self._weights, self.status),
            *(plane, extension, self.http_port),
            grace_period=GRACE_S,
        )
        rest.config.host = host
        self._rest_server = rest
        self._uvicorn_exit = rest._server.handle_exit
        rest._server.handle_exit = self._leave  # type: ignore[method-assign]
        address = f"{host}:{self.grpc_port}"
        self._grpc_server = Grpc(address, plane, extension, self._administrator, GRACE_S)
        self.servers = [rest.start(), self._grpc_server.start(self.max_threads)]
        self.register_signal_handler()
        # Half a million objects of libraries, a quarter of a second to look through: for ever, not while asked.
        gc.collect()
        gc.freeze()
        asyncio.run(self._serve())

    async def status(self) -> dict[str, Any]:
        """Each model's version and readiness, and how many served events the collector has not acknowledged."""
        models = {}
        for model in self._models:
            models[model.name] = {**await model.predictor.about(), "requests": model.requests}
        queue = {"served_queue": self._served.queued, "served_spooled": self._served.spooled} if self._served else {}
        return {"models": models, "leaving": self.dataplane.leaving, **queue}

    def _leave(self, sig: int, frame: FrameType | None) -> None:
        """Uvicorn's signal handler: the first signal only says "not ready", for a while."""
        first, self.dataplane.leaving = not self.dataplane.leaving, True
        # From the next second on: a request on a kept connection that is closed just then would be lost.
        self._rest_server.config.encoded_headers.append((b"connection", b"close"))
        if first and self._listening.drain_s > 0:
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, self._listening.drain_s, self._uvicorn_exit, sig, frame)
        else:
            self._uvicorn_exit(sig, frame)

    def stop(self, sig: int) -> None:
        """Uvicorn handles the signal first and raises it again when it has drained; the gRPC server drains next."""
        self._rest_server._server.should_exit = True  # the signal came before Uvicorn listened to it
        asyncio.get_running_loop().create_task(self._grpc_server.stop(sig))

    @staticmethod
    def _quieten() -> None:
        for name in ("kserve", "uvicorn.access", "uvicorn.error", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("kserve.trace").setLevel(logging.CRITICAL)  # a traceback for every refusal
        warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")  # KServe's use of it, every request
