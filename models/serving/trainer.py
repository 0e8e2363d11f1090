"""What a trainer asks a roll-out server: users by id as everybody, or contexts, as a transformer asks a predictor.

With contexts both sides compute probabilities of exactly the same input: those of a training log, at the time of each
request, which a feature store no longer has.
"""

from typing import Any

from kserve import InferRequest, InferResponse

from models.serving.contexts import INPUTS
from models.serving.lookup import FeatureLookup
from models.serving.predictor import Predictor, PredictorModel
from models.serving.telemetry import Telemetry
from models.serving.transformer import OneRecModel

CONTEXT = INPUTS[0]["name"]
"""An input that only whole contexts have."""


class RolloutModel(OneRecModel):
    """``OneRecModel`` that shows nothing to anybody, so logs nothing, and takes contexts too."""

    def __init__(self, predictor: Predictor, lookup: FeatureLookup, telemetry: Telemetry, timeout_ms: int) -> None:
        super().__init__(predictor, lookup, None, telemetry, timeout_ms)
        self._contexts = PredictorModel(predictor, timeout_ms)

    async def predict(
        self, payload: InferRequest | dict[str, Any], headers: dict[str, str] | None = None
    ) -> InferResponse | dict[str, Any]:
        """As ``OneRecModel``, or as ``PredictorModel`` when the request has contexts."""
        if not isinstance(payload, InferRequest) or all(each.name != CONTEXT for each in payload.inputs):
            return await super().predict(payload, headers)
        self.requests += 1
        return await self._contexts.predict(payload, headers)
