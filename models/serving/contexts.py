"""What the transformer hands to the predictor: who the users are, as far as the model is concerned.

Windows travel with item ids and not with catalogue rows, so the transformer needs no bundle, and the predictor may swap
its version at any time. Between two processes they are v2 tensors: each pathway of B users is ``<pathway>_items`` BYTES
[B] (a user's item ids, joined), ``<pathway>_counts`` INT64 [B] and ``<pathway>_events`` INT64 [all events, 4] (time,
play time, duration, labels), beside ``static`` INT64 [B, F], ``time_ms`` INT64 [B] and ``exclude`` BYTES [B] (joined);
options and the remaining time are parameters. The answer has the item_ids, scores, sids and log_probs of
``models.serving.forms``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from kserve import InferInput, InferRequest, InferResponse
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import to_http_parameters

from features.histories.context import STATIC_BUCKETS, STATIC_FIELDS, Context, from_windows
from features.histories.windows import Limits, Window, empty_window
from features.online import UserFeatures
from models.serving import tensors
from models.serving.forms import padded, parameters_of, response_of
from models.serving.protocol import MAX_EXCLUDED, MAX_USERS, Options, Prediction, check_times, checked_parameters
from models.serving.recommender import Recommendation
from models.tokenizer.vocabulary import Catalogue

PATHWAYS = ("short", "positive", "lifelong")
MAX_EVENTS = 300_000
"""Events of one call and pathway, all users."""
_JOIN = "\x1f"
_EVENT = ("times", "play_ms", "duration_ms", "labels")

INPUTS: list[dict[str, Any]] = [
    {"name": "static", "datatype": "INT64", "shape": [-1, STATIC_FIELDS]},
    {"name": "time_ms", "datatype": "INT64", "shape": [-1]},
    {"name": "exclude", "datatype": "BYTES", "shape": [-1]},
    *(
        {"name": f"{pathway}_{part}", "datatype": datatype, "shape": shape}
        for pathway in PATHWAYS
        for part, datatype, shape in (
            ("items", "BYTES", [-1]),
            ("counts", "INT64", [-1]),
            ("events", "INT64", [-1, len(_EVENT)]),
        )
    ),
]
"""v2 metadata of the predictor; -1 is any size."""


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """B users as the model will see them, and what is asked for them."""

    static: np.ndarray
    """int64 [B, F]."""
    windows: Mapping[str, list[Window]]
    """By pathway, one for each user."""
    times_ms: np.ndarray
    """int64 [B]."""
    exclude: list[frozenset[str]]
    options: Options

    def __len__(self) -> int:
        return len(self.static)

    @classmethod
    def of(
        cls, users: Sequence[UserFeatures | None], times_ms: np.ndarray, exclude: list[frozenset[str]], options: Options
    ) -> "Contexts":
        """From the feature store's answer; None is a user of whom nothing is known."""
        none, absent = empty_window(), np.zeros(STATIC_FIELDS, np.int64)
        static = np.array([absent if user is None or user.static is None else user.static for user in users], np.int64)
        return cls(
            static=static.reshape(len(users), STATIC_FIELDS),
            windows={name: [getattr(user, name, None) or none for user in users] for name in PATHWAYS},
            times_ms=times_ms,
            exclude=exclude,
            options=options,
        )

    @property
    def values(self) -> int:
        """How many numbers and names the windows hold."""
        windows = (window for each in self.windows.values() for window in each)
        return (1 + len(_EVENT)) * sum(map(len, windows))

    def longest(self, limits: Limits) -> int:
        """Behaviours of the user who has most, at most what ``limits`` keep."""
        kept = [[min(len(window), getattr(limits, name)) for window in self.windows[name]] for name in PATHWAYS]
        return max(map(sum, zip(*kept, strict=True)), default=0)

    @classmethod
    def joined(cls, parts: Sequence["Contexts"], catalogue: Catalogue, limits: Limits) -> Context:
        """What the model reads, of all ``parts`` in order."""
        short, positive, lifelong = ([window for part in parts for window in part.windows[name]] for name in PATHWAYS)
        return from_windows(
            np.concatenate([part.static for part in parts]),
            short,
            positive,
            lifelong,
            times_ms=np.concatenate([part.times_ms for part in parts]),
            item_index=catalogue.index,
            limits=limits,
        )


def to_request(contexts: Contexts, model_name: str, request_id: str, timeout_ms: int) -> InferRequest:
    """The contexts as a v2 request; ``from_request`` is its inverse."""
    arrays: dict[str, np.ndarray] = {
        "static": contexts.static,
        "time_ms": contexts.times_ms,
        "exclude": _bytes(_JOIN.join(sorted(items)) for items in contexts.exclude),
    }
    for name in PATHWAYS:
        windows = contexts.windows[name]
        arrays[f"{name}_items"] = _bytes(_JOIN.join(window.item_ids) for window in windows)
        arrays[f"{name}_counts"] = np.array([len(window) for window in windows], np.int64)
        columns = [[getattr(window, column) for window in windows] for column in _EVENT]
        arrays[f"{name}_events"] = np.stack([np.concatenate(column).astype(np.int64) for column in columns], -1)
    inputs = []
    for declared in INPUTS:
        data = arrays[declared["name"]]
        each = InferInput(declared["name"], list(data.shape), declared["datatype"])
        each.set_data_from_numpy(data)
        each.parameters = None
        inputs.append(each)
    chosen = {name: value for name, value in asdict(contexts.options).items() if value != getattr(Options, name)}
    if "temperature" in chosen:
        chosen["temperature"] = repr(chosen["temperature"])  # gRPC parameters have no floats
    return InferRequest(model_name, inputs, request_id=request_id, parameters={**chosen, "timeout_ms": timeout_ms})


def from_request(request: InferRequest) -> tuple[Contexts, int | None]:
    """The contexts and the time left in ms; raises InvalidInput saying what is wrong with the request."""
    inputs = tensors.named(request, [each["name"] for each in INPUTS])
    options, timeout_ms = checked_parameters(parameters_of(request))
    static, times = tensors.integers(inputs["static"], 2), tensors.integers(inputs["time_ms"], 1)
    rows = len(times)
    if not 1 <= rows <= MAX_USERS or static.shape != (rows, STATIC_FIELDS):
        raise InvalidInput(
            f"static has shape {static.shape}, time_ms {rows} rows; expected 1 to {MAX_USERS} rows of {STATIC_FIELDS}"
        )
    if static.min() < 0 or static.max() >= STATIC_BUCKETS:
        raise InvalidInput(f"static holds {static.min()} to {static.max()}; expected buckets 0 to {STATIC_BUCKETS - 1}")
    check_times(times.tolist())
    exclude = [frozenset(text.split(_JOIN)) - {""} for text in _texts(inputs["exclude"], rows)]
    if any(len(items) > MAX_EXCLUDED for items in exclude):
        raise InvalidInput(f"more than {MAX_EXCLUDED} items are excluded for one user")
    windows = {name: _windows(name, inputs, rows) for name in PATHWAYS}
    return Contexts(static=static, windows=windows, times_ms=times, exclude=exclude, options=options), timeout_ms


def _bytes(texts: Any) -> np.ndarray:
    encoded = [text.encode() for text in texts]
    found = np.empty(len(encoded), object)
    found[:] = encoded
    return found


def _texts(tensor: InferInput, rows: int) -> list[str]:
    texts: list[str] = tensors.strings(tensor, 1).tolist()
    if len(texts) != rows:
        raise InvalidInput(f"input {tensor.name} has {len(texts)} rows; time_ms has {rows}")
    return texts


def _windows(name: str, inputs: Mapping[str, InferInput], rows: int) -> list[Window]:
    """The windows of one pathway, one for each of ``rows`` users."""
    counts, events = tensors.integers(inputs[f"{name}_counts"], 1), tensors.integers(inputs[f"{name}_events"], 2)
    texts = _texts(inputs[f"{name}_items"], rows)
    items = [text.split(_JOIN) if text else [] for text in texts]
    lengths = [len(each) for each in items]
    if counts.tolist() != lengths or events.shape != (sum(lengths), len(_EVENT)) or len(events) > MAX_EVENTS:
        raise InvalidInput(
            f"{name}_counts add up to {counts.sum()}, {name}_items to {sum(lengths)}, {name}_events has shape "
            f"{events.shape}; expected as many of each, at most {MAX_EVENTS}, and {len(_EVENT)} columns"
        )
    windows, start = [], 0
    for each in items:
        part = events[start : start + len(each)]
        columns = dict(zip(_EVENT, part.T, strict=True))
        windows.append(Window(ids=np.arange(len(each)), item_ids=np.array(each, object), **columns))
        start += len(each)
    return windows


def to_response(prediction: Prediction, request: InferRequest, model_name: str) -> InferResponse:
    """The prediction as v2 tensors; ``from_response`` is its inverse."""
    timing = {"queue_ms": repr(1000 * prediction.queue_s), "model_ms": repr(1000 * prediction.model_s)}
    push = {} if prediction.push is None else {"push": prediction.push}
    parameters = {
        "model_version": prediction.model_version,
        "flags": ",".join(prediction.flags),
        "batch_rows": prediction.batch_rows,
        **timing,
        **push,
    }
    arrays = padded(prediction.recommendations)
    counts = np.array([len(each) for each in prediction.recommendations])
    parameters["counts"] = ",".join(map(str, counts))
    return response_of(arrays, request, model_name, parameters)


def from_response(response: InferResponse) -> Prediction:
    """The prediction; raises ValueError for what no predictor of ours sends."""
    about = to_http_parameters(response.parameters or {})
    arrays = {each.name: each.as_numpy() for each in response.outputs}
    counts = [int(count) for count in about["counts"].split(",")]
    items = arrays["item_ids"].tolist()
    return Prediction(
        model_version=about["model_version"],
        flags=[flag for flag in about["flags"].split(",") if flag],
        push=about.get("push"),
        queue_s=float(about["queue_ms"]) / 1000,
        model_s=float(about["model_ms"]) / 1000,
        batch_rows=about["batch_rows"],
        recommendations=[
            Recommendation(
                item_ids=[item.decode() for item in items[row][:n]],
                scores=arrays["scores"][row, :n],
                sids=arrays["sids"][row, :n],
                log_probs=arrays["log_probs"][row, :n],
            )
            for row, n in enumerate(counts)
        ],
    )
