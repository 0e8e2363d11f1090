"""From a prediction to what is sent back and what is logged: an exposure id for every slot, one served event each."""

from collections.abc import Iterable
from typing import Any

from features.schema import exposure_id
from models.serving.protocol import Answer, Prediction, Query


def answer_of(query: Query, prediction: Prediction, flags: Iterable[str]) -> Answer:
    """The answer to ``query``; ``flags`` are the transformer's, the prediction brings its own."""
    version = prediction.model_version
    return Answer(
        prediction=prediction,
        exposure_ids=[
            [exposure_id(request, version, slot) for slot in range(len(each))]
            for request, each in zip(query.request_ids, prediction.recommendations, strict=True)
        ],
        flags=sorted({*flags, *prediction.flags} - {""}),
    )


def served_events(query: Query, answer: Answer) -> list[dict[str, Any]]:
    """One served event (features.schema.SERVED) for every recommended item, at the request's own clock."""
    times = query.times_ms.tolist()
    events = []
    for row, each in enumerate(answer.recommendations):
        sids, log_probs = each.sids.tolist(), each.log_probs.tolist()
        events += [
            {
                "kind": "served",
                "exposure_id": answer.exposure_ids[row][slot],
                "request_id": query.request_ids[row],
                "user_id": query.user_ids[row],
                "item_id": item,
                "sid": sids[slot],
                "position": slot,
                "model_version": answer.model_version,
                "log_probs": log_probs[slot],
                "event_time": times[row],
            }
            for slot, item in enumerate(each.item_ids)
        ]
    return events
