"""The KServe model: a checked request, features from Valkey, one micro-batched run of the model, served events logged.

The event loop only parses and formats; features and model run in one thread each. A request keeps the recommender
it began with, so every response names exactly one version. Without features the answer comes from the cold context and
says so in ``flags`` ("cold_user", "degraded", "features_unavailable"): a recommendation page is never empty
because Valkey is. Left out: the split into transformer and predictor processes.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from kserve import InferRequest, InferResponse, Model
from kserve.errors import InvalidInput, ModelNotReady
from prometheus_client import Counter, Gauge, Histogram

from features.histories.context import Context, cold_context
from features.online import FeaturesUnavailable, OnlineFeatures
from features.schema import exposure_id
from models.serving.batching import MicroBatcher, Overloaded
from models.serving.events import ServedLog
from models.serving.protocol import Answer, Query, parse, response_v1, response_v2
from models.serving.recommender import Recommendation, Recommender
from models.serving.reload import Follower

FEATURES_PAUSE_S = 1.0
"""How long to answer without features after Valkey did not: waiting for a dead server is slower than a cold answer."""

REQUESTS = Counter("onerec_requests_total", "Recommendation requests answered", ["model"])
USERS = Counter("onerec_recommended_users_total", "Users recommended to, by flag", ["model", "flag"])
WAITING = Gauge("onerec_waiting_rows", "Users waiting for a batch", ["model"])
BATCH_ROWS = Histogram(
    "onerec_batch_rows", "Users per run of the model", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
STAGE_SECONDS = Histogram("onerec_stage_seconds", "Time of a batch by stage", ["model", "stage"])

FLAGS = {"cold": "cold_user", "degraded": "degraded", "": ""}

log = logging.getLogger(__name__)


class NotReady(ModelNotReady):
    """HTTP 503, gRPC UNAVAILABLE, with the reason."""


@dataclass(frozen=True)
class _Row:
    """The recommendation for one user and why it may be poor."""

    recommendation: Recommendation
    flag: str


class FeatureSource:
    """Contexts from the on-line store, or cold ones while it does not answer; use from one thread."""

    def __init__(self, connect: Callable[[], OnlineFeatures]) -> None:
        self._connect = connect
        self._features: OnlineFeatures | None = None
        self._retry_at = 0.0

    def context(self, user_ids: list[str], times_ms: np.ndarray, recommender: Recommender) -> tuple[Context, list[str]]:
        """The context of B users and a response flag for each ("" when all is well)."""
        bundle = recommender.bundle
        if time.monotonic() >= self._retry_at:
            try:
                self._features = self._features or self._connect()
                context, flags = self._features.context(user_ids, times_ms, bundle.catalogue.index, bundle.limits)
            except (FeaturesUnavailable, OSError) as error:
                log.warning("answering from the cold context: %s", error)
                self._retry_at = time.monotonic() + FEATURES_PAUSE_S
            else:
                return context, [FLAGS[flag] for flag in flags]
        return cold_context(len(user_ids), bundle.limits), ["features_unavailable"] * len(user_ids)


class OneRecModel(Model):
    """One served name; which bundle it serves is its follower's business."""

    def __init__(self, follower: Follower, features: FeatureSource, served: ServedLog, threads: "Threads") -> None:
        super().__init__(follower.name)
        self.follower = follower
        self.requests = 0
        self._features = features
        self._served = served
        self._threads = threads
        self._batcher: MicroBatcher[Query, list[_Row]] | None = None

    async def healthy(self) -> bool:
        """Whether a bundle is in service; behind ``/v2/models/{name}/ready``."""
        return self.follower.recommender is not None

    def load(self) -> bool:
        """KServe calls this, on its event loop, for a request to a model that is not ready: there is nothing to do."""
        return self.follower.recommender is not None

    def start(self) -> None:
        """Readiness comes from the follower, not from having been started."""

    def get_input_types(self) -> list[dict[str, Any]]:
        """v2 metadata; -1 is any size."""
        return [
            {"name": "user_id", "datatype": "BYTES", "shape": [-1]},
            {"name": "time_ms", "datatype": "INT64", "shape": [-1]},
            {"name": "request_id", "datatype": "BYTES", "shape": [-1]},
            {"name": "exclude", "datatype": "BYTES", "shape": [-1, -1]},
        ]

    def get_output_types(self) -> list[dict[str, Any]]:
        """v2 metadata; -1 is any size."""
        return [
            {"name": "item_ids", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "sids", "datatype": "INT32", "shape": [-1, -1, -1]},
            {"name": "log_probs", "datatype": "FP32", "shape": [-1, -1, -1]},
            {"name": "exposure_ids", "datatype": "BYTES", "shape": [-1, -1]},
        ]

    async def predict(
        self, payload: InferRequest | dict[str, Any], headers: dict[str, str] | None = None
    ) -> InferResponse | dict[str, Any]:
        """Recommends for the request's users; raises InvalidInput (400) or NotReady (503)."""
        query = parse(payload)
        answer = await self._answer(query)
        return response_v2(answer, payload, self.name) if isinstance(payload, InferRequest) else response_v1(answer)

    async def _answer(self, query: Query) -> Answer:
        recommender = self.follower.recommender
        if recommender is None:
            raise NotReady(self.name, self.follower.reason)
        try:
            recommender.check_mode(query.options.mode)
        except ValueError as error:
            raise InvalidInput(str(error)) from error
        if self._batcher is None:
            self._batcher = MicroBatcher(self._run)
        WAITING.labels(self.name).set(self._batcher.waiting)
        try:
            rows = await self._batcher.submit((recommender, query.options), query, len(query.user_ids))
        except Overloaded as error:
            raise NotReady(self.name, str(error)) from error
        answer = _assemble(query, rows, recommender.bundle.version)
        self._served.add(served_events(query, answer))
        self.requests += 1
        REQUESTS.labels(self.name).inc()
        for row in rows:
            USERS.labels(self.name, row.flag or "none").inc()
        return answer

    async def _run(self, key: Hashable, queries: list[Query]) -> list[list[_Row]]:
        """One batch of queries with the same recommender and options."""
        assert isinstance(key, tuple)
        recommender, options = key
        loop = asyncio.get_running_loop()
        users = [user for query in queries for user in query.user_ids]
        times = np.concatenate([query.times_ms for query in queries])
        exclude = [items for query in queries for items in query.exclude]
        BATCH_ROWS.labels(self.name).observe(len(users))
        with STAGE_SECONDS.labels(self.name, "features").time():
            context, flags = await loop.run_in_executor(
                self._threads.features, self._features.context, users, times, recommender
            )

        def recommend() -> list[Recommendation]:
            found: list[Recommendation] = recommender.recommend(
                context,
                num_items=options.num_items,
                beam_width=options.beams,
                mode=options.mode,
                temperature=options.temperature,
                exclude=exclude,
                exclude_seen=options.exclude_seen,
                seed=options.seed,
            )
            return found

        with STAGE_SECONDS.labels(self.name, "model").time():
            found = await loop.run_in_executor(self._threads.model, recommend)
        rows = iter(_Row(each, flag) for each, flag in zip(found, flags, strict=True))
        return [[next(rows) for _ in query.user_ids] for query in queries]


class Threads:
    """One thread for features and one for the model, shared by the process's models."""

    def __init__(self) -> None:
        self.features = ThreadPoolExecutor(1, "features")
        self.model = ThreadPoolExecutor(1, "model")


def _assemble(query: Query, rows: list[_Row], version: str) -> Answer:
    recommendations = [row.recommendation for row in rows]
    return Answer(
        model_version=version,
        recommendations=recommendations,
        exposure_ids=[
            [exposure_id(request, version, slot) for slot in range(len(each))]
            for request, each in zip(query.request_ids, recommendations, strict=True)
        ],
        flags=sorted({row.flag for row in rows} - {""}),
    )


def served_events(query: Query, answer: Answer) -> list[dict[str, Any]]:
    """One served event (features.schema.SERVED) for every recommended item, at the request's own clock."""
    return [
        {
            "kind": "served",
            "exposure_id": answer.exposure_ids[row][slot],
            "request_id": query.request_ids[row],
            "user_id": query.user_ids[row],
            "item_id": item,
            "sid": each.sids[slot].tolist(),
            "position": slot,
            "model_version": answer.model_version,
            "log_probs": each.log_probs[slot].tolist(),
            "event_time": int(query.times_ms[row]),
        }
        for row, each in enumerate(answer.recommendations)
        for slot, item in enumerate(each.item_ids)
    ]
