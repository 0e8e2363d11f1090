"""The model's side of serving: contexts in, recommendations out, one micro-batched run at a time.

The event loop only queues; the model runs in a thread of its own. A call keeps the recommender it began with, so every
answer names exactly one version. Calls are batched with those of equal options and of the same bucket of context
length, so that short contexts do not pay for long ones. ``PredictorModel`` puts it behind v2 tensors, for a transformer
in another process.
"""

import asyncio
import time
from collections.abc import Hashable
from concurrent.futures import Executor
from typing import Any, Protocol

from kserve import InferRequest, InferResponse, Model
from kserve.errors import InvalidInput

from models.serving import contexts as wire
from models.serving.admission import Limits
from models.serving.batching import MicroBatcher, Wanted
from models.serving.contexts import Contexts
from models.serving.errors import NotReady
from models.serving.forms import PREDICTED
from models.serving.offload import ITEM, beside, size_of
from models.serving.protocol import Options, Prediction
from models.serving.recommender import Recommendation, Recommender
from models.serving.telemetry import Telemetry, request_id_of

BUCKETS = (128, 512)
LEGALITY_SAMPLES = 64
LOADING_PATIENCE = 4.0
"""While a bundle is read and warmed up beside it, calls may wait so many times as long: it is over in half a second, or
in two where other programs want the processor too, and a swap should refuse nobody."""


class Source(Protocol):
    """Where a predictor finds its recommender: a follower of an alias, or pinned weights."""

    @property
    def name(self) -> str:
        """The served name."""

    @property
    def telemetry(self) -> Telemetry:
        """The served name's metrics."""

    @property
    def recommender(self) -> Recommender | None:
        """What serves now; None before the first bundle."""

    @property
    def reason(self) -> str:
        """Why nothing serves, or why an older version does; empty when all is well."""

    @property
    def loading(self) -> bool:
        """Whether another version is being read and warmed up beside the one in service."""

    def about(self) -> dict[str, Any]:
        """For the status page: alias, version, ready, reason, what the catalogue holds."""

    def check(self, retry_refused: bool = False) -> None:
        """Looks for a newer version at once."""


class Predictor:
    """Answers contexts from ``source``; ``threads`` are the process's for models, ``limits.at_once`` of them."""

    def __init__(
        self, source: Source, threads: Executor, *, limits: Limits | None = None, buckets: tuple[int, ...] = BUCKETS
    ) -> None:
        self.source = source
        self._threads = threads
        self._buckets = buckets
        self._batcher: MicroBatcher[Contexts, Prediction] = MicroBatcher(
            self._run, limits, lambda: LOADING_PATIENCE if source.loading else 1.0
        )
        source.telemetry.watch_queue(lambda: self.waiting)

    @property
    def waiting(self) -> int:
        """Users waiting for the model."""
        return self._batcher.waiting

    @property
    def reason(self) -> str:
        """Why it is not ready, or why an older version serves."""
        return self.source.reason

    async def ready(self) -> bool:
        """Whether a version is in service."""
        return self.source.recommender is not None

    async def about(self) -> dict[str, Any]:
        """For the status page."""
        return self.source.about()

    def glance(self, users: int) -> None:
        """Raises Overloaded when a request for so many users need not even be looked up."""
        self._batcher.glance(users)

    async def predict(self, asked: Contexts, request_id: str, deadline: float) -> Prediction:
        """Recommends to the users of ``asked``; raises NotReady, Overloaded, DeadlinePassed, InvalidInput."""
        recommender = self.source.recommender
        if recommender is None:
            raise NotReady(self.source.name, self.source.reason)
        options = asked.options
        try:
            recommender.check_mode(options.mode)
        except ValueError as error:
            raise InvalidInput(str(error)) from error
        if not options.constrained and recommender.push is None:
            raise InvalidInput("constrained is false, but only roll-out servers sample without constraint")
        length = asked.longest(recommender.bundle.limits)
        bucket = sum(length > bound for bound in self._buckets)
        # A seed promises the same draws again, so what else is in the batch must not matter: it has none.
        alone = object() if options.seed is not None else None
        key = recommender, options, bucket, alone
        kind = *options.kind, bucket
        batched = await self._batcher.submit(key, asked, len(asked), kind=kind, deadline=deadline)
        prediction = batched.result
        return Prediction(
            model_version=prediction.model_version,
            recommendations=prediction.recommendations,
            flags=prediction.flags,
            push=prediction.push,
            queue_s=batched.waited_s,
            model_s=prediction.model_s,
            batch_rows=batched.rows,
        )

    async def _run(self, key: Hashable, asked: list[Contexts], wanted: Wanted) -> list[Prediction]:
        """One batch of calls with the same recommender and options, given up when nobody waits for it any more."""
        assert isinstance(key, tuple)
        recommender, options, *_ = key
        self.source.telemetry.batch(sum(map(len, asked)))
        loop = asyncio.get_running_loop()
        predictions = await loop.run_in_executor(self._threads, self._recommend, recommender, options, asked, wanted)
        if self.source.telemetry.legality_due():
            self._threads.submit(self._sample_legality, recommender, asked[0])
        return predictions

    def _recommend(
        self, recommender: Recommender, options: Options, asked: list[Contexts], wanted: Wanted
    ) -> list[Prediction]:
        began = time.monotonic()
        bundle = recommender.bundle
        found = recommender.recommend(
            Contexts.joined(asked, bundle.catalogue, bundle.limits),
            num_items=options.num_items,
            beam_width=options.beams,
            mode=options.mode,
            temperature=options.temperature,
            exclude=[items for part in asked for items in part.exclude],
            exclude_seen=options.exclude_seen,
            seed=options.seed,
            num_samples=options.num_samples,
            constrained=options.constrained,
            select=options.select,
            wanted=wanted,
        )
        rows, spent = iter(found), time.monotonic() - began
        flags = recommender.flags(options.select)
        return [self._prediction(recommender, [next(rows) for _ in range(len(part))], flags, spent) for part in asked]

    @staticmethod
    def _prediction(
        recommender: Recommender, found: list[Recommendation], flags: list[str], seconds: float
    ) -> Prediction:
        version, push = recommender.bundle.version, recommender.push
        return Prediction(model_version=version, recommendations=found, flags=flags, push=push, model_s=seconds)

    def _sample_legality(self, recommender: Recommender, asked: Contexts) -> None:
        bundle = recommender.bundle
        context = Contexts.joined([asked], bundle.catalogue, bundle.limits).take(slice(0, 1))
        self.source.telemetry.illegal(1 - recommender.legality(context, LEGALITY_SAMPLES))


class PredictorModel(Model):
    """A predictor behind v2 tensors (``models.serving.contexts``): role ``predictor``."""

    def __init__(self, predictor: Predictor, timeout_ms: int) -> None:
        super().__init__(predictor.source.name)
        self.predictor = predictor
        self.requests = 0
        self._timeout_ms = timeout_ms

    @property
    def telemetry(self) -> Telemetry:
        """The served name's metrics."""
        return self.predictor.source.telemetry

    async def healthy(self) -> bool:
        """Behind ``/v2/models/{name}/ready``."""
        return await self.predictor.ready()

    def load(self) -> bool:
        """KServe calls this, on its event loop, for a request to a model that is not ready: there is nothing to do."""
        return self.predictor.source.recommender is not None

    def start(self) -> None:
        """Readiness comes from the source, not from having been started."""

    def get_input_types(self) -> list[dict[str, Any]]:
        """v2 metadata."""
        return wire.INPUTS

    def get_output_types(self) -> list[dict[str, Any]]:
        """v2 metadata."""
        return PREDICTED

    async def predict(
        self, payload: InferRequest | dict[str, Any], headers: dict[str, str] | None = None
    ) -> InferResponse:
        """Recommends to the contexts of the request; one without inputs is told what is served."""
        if not isinstance(payload, InferRequest):
            raise InvalidInput("a predictor takes v2 requests with contexts; ask the transformer with user ids")
        if not payload.inputs:
            return await self._about(payload)
        arrived = time.monotonic()
        with self.telemetry.request(request_id_of(payload, headers)) as trace:
            with trace.stage("parse"):
                asked, timeout_ms = await beside(size_of(payload, headers), lambda: wire.from_request(payload))
            trace.users, trace.beams, trace.mode = len(asked), asked.options.beams, asked.options.mode
            deadline = arrived + (timeout_ms or self._timeout_ms) / 1000
            prediction = await self.predictor.predict(asked, trace.request_id, deadline)
            trace.version, trace.batch_rows = prediction.model_version, prediction.batch_rows
            trace.took("queue", prediction.queue_s)
            trace.took("model", prediction.model_s)
            self.requests += 1
            with trace.stage("respond"):
                items = ITEM * sum(map(len, prediction.recommendations))
                return await beside(items, lambda: wire.to_response(prediction, payload, self.name))

    async def _about(self, payload: InferRequest) -> InferResponse:
        known = {name: value for name, value in (await self.predictor.about()).items() if value is not None}
        return InferResponse(payload.id or "", self.name, [], known.get("version"), parameters=known)
