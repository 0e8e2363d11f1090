"""The caller's side of serving: a checked request, the users' features, the predictor's answer, served events logged.

The predictor is in this process (role ``all``) or in another one (role ``transformer``): the answers are the same. The
event loop parses and formats; features have a thread. Where an answer may be poor it says so in ``flags``.
"""

import time
from typing import Any, Protocol

from kserve import InferRequest, InferResponse, Model

from models.serving.contexts import Contexts
from models.serving.events import ServedLog
from models.serving.exposures import answer_of, served_events
from models.serving.forms import INPUTS, OUTPUTS, parse, response_v1, response_v2
from models.serving.lookup import CACHED, UNAVAILABLE, FeatureLookup, Found
from models.serving.offload import ITEM, beside, size_of
from models.serving.protocol import Answer, Prediction, Query, timeout_of
from models.serving.telemetry import Telemetry, Trace, request_id_of


class Asked(Protocol):
    """A predictor, here (``predictor.Predictor``) or elsewhere (``remote.RemotePredictor``)."""

    @property
    def reason(self) -> str:
        """Why it is not ready, when it is not."""

    async def ready(self) -> bool:
        """Whether a version is in service."""

    async def about(self) -> dict[str, Any]:
        """For the status page."""

    def glance(self, users: int) -> None:
        """Raises Overloaded when a request for so many users need not even be looked up, if that is known here."""

    async def predict(self, asked: Contexts, request_id: str, deadline: float) -> Prediction:
        """Recommends to the users of ``asked``; raises NotReady, Overloaded, DeadlinePassed, InvalidInput."""


class OneRecModel(Model):
    """One served name; ``served`` None logs nothing (roll-outs are not shown to anybody)."""

    def __init__(
        self, predictor: Asked, lookup: FeatureLookup, served: ServedLog | None, telemetry: Telemetry, timeout_ms: int
    ) -> None:
        super().__init__(telemetry.model)
        self.predictor = predictor
        self.requests = 0
        self._lookup = lookup
        self._served = served
        self.telemetry = telemetry
        self._timeout_ms = timeout_ms

    async def healthy(self) -> bool:
        """Behind ``/v2/models/{name}/ready``."""
        return await self.predictor.ready()

    def load(self) -> bool:
        """KServe calls this, on its event loop, for a request to a model that is not ready: there is nothing to do."""
        return True

    def start(self) -> None:
        """Readiness comes from the predictor, not from having been started."""

    def get_input_types(self) -> list[dict[str, Any]]:
        """v2 metadata."""
        return INPUTS

    def get_output_types(self) -> list[dict[str, Any]]:
        """v2 metadata."""
        return OUTPUTS

    async def predict(
        self, payload: InferRequest | dict[str, Any], headers: dict[str, str] | None = None
    ) -> InferResponse | dict[str, Any]:
        """Recommends for the request's users; raises InvalidInput, NotReady, Overloaded or DeadlinePassed."""
        arrived = time.monotonic()
        with self.telemetry.request(request_id_of(payload, headers)) as trace:
            with trace.stage("parse"):
                query = await beside(size_of(payload, headers), lambda: parse(payload))
                deadline = arrived + (timeout_of(query, headers) or self._timeout_ms) / 1000
            trace.users, trace.beams, trace.mode = len(query.user_ids), query.options.beams, query.options.mode
            answer = await self._answer(query, deadline, trace)
            with trace.stage("respond"):
                self.requests += 1
                return await beside(ITEM * answer.items, lambda: self._respond(query, answer, payload))

    def _respond(
        self, query: Query, answer: Answer, payload: InferRequest | dict[str, Any]
    ) -> InferResponse | dict[str, Any]:
        if self._served is not None:
            self._served.add(served_events(query, answer))
        v2 = isinstance(payload, InferRequest)
        return response_v2(answer, payload, self.name) if v2 else response_v1(answer)

    async def _answer(self, query: Query, deadline: float, trace: Trace) -> Answer:
        self.predictor.glance(len(query.user_ids))
        with trace.stage("features"):
            found = await self._lookup.users(query.user_ids, query.times_ms, deadline)
        asked = Contexts.of(found.users, query.times_ms, query.exclude, query.options)
        prediction = await self.predictor.predict(asked, trace.request_id, deadline)
        items = ITEM * sum(map(len, prediction.recommendations))
        answer = await beside(items, lambda: answer_of(query, prediction, found.told))
        trace.version, trace.flags, trace.batch_rows = answer.model_version, answer.flags, prediction.batch_rows
        trace.took("queue", prediction.queue_s)
        trace.took("model", prediction.model_s)
        self._count(found)
        return answer

    def _count(self, found: Found) -> None:
        self.telemetry.users(found.flags)
        for outcome, flag in (("hit", CACHED), ("miss", UNAVAILABLE)):
            if count := found.flags.count(flag):
                self.telemetry.cache(outcome, count)
