"""What may be asked and what is answered, whatever the wire (``models.serving.forms``) and the process.

A request for B users has parameters num_items, beam_width, mode (beam | sample | session), select (model | reward |
stay), temperature, seed, exclude_seen, num_samples, constrained, timeout_ms; everything is checked here or in
``tensors``, with an error that says what was given and what is expected.
"""

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from kserve.errors import InvalidInput

from models.serving.recommender import MODES, Recommendation
from models.serving.selection import SELECTIONS, check_select

MAX_USERS = 128
MAX_ITEMS = 100
MAX_BEAMS = 512
MAX_EXCLUDED = 10_000
MAX_ID = 128
MAX_TIMEOUT_MS = 600_000
EARLIEST_MS, LATEST_MS = 946_684_800_000, 4_102_444_800_000  # the years 2000 to 2099
TRANSPORT_PARAMETERS = {"binary_data_output"}
TIMEOUT_HEADER = "x-request-timeout-ms"

PARAMETERS: dict[str, tuple[str, str]] = {
    "num_items": ("integer", f"items a user, 1 to {MAX_ITEMS}; default 10"),
    "beam_width": ("integer", f"beams, 1 to {MAX_BEAMS}; default twice num_items, at least 32; mode sample: draws"),
    "mode": ("string", f"one of {', '.join(MODES)}; default {MODES[0]}"),
    "select": (
        "string",
        f"one of {', '.join(SELECTIONS)}: among what the beam found, the likeliest items, those of highest P-Score or "
        f"those predicted to be watched longest; default {SELECTIONS[0]}",
    ),
    "temperature": ("number", "of mode sample, 0.01 to 100; default 1; a string in gRPC"),
    "seed": ("integer", "of mode sample, from 0"),
    "exclude_seen": ("boolean", "leave out the items of the user's context; default true"),
    "num_samples": ("integer", f"mode sample: this many independent draws a user, repeats kept, 1 to {MAX_BEAMS}"),
    "constrained": ("boolean", "false, on roll-out servers only: samples may be SIDs that name no item; default true"),
    "timeout_ms": ("integer", f"answer within this time or not at all, 1 to {MAX_TIMEOUT_MS}"),
}
"""Type and meaning of every request parameter: the OpenAPI page and the checks below agree on the names."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a request may choose; equal options can share a batch."""

    num_items: int = 10
    beam_width: int = 0
    mode: str = "beam"
    select: str = "model"
    temperature: float = 1.0
    exclude_seen: bool = True
    seed: int | None = None
    num_samples: int = 0
    constrained: bool = True

    @property
    def beams(self) -> int:
        """The beam width, or a sensible one for ``num_items`` when none was asked for."""
        return self.num_samples or self.beam_width or min(max(2 * self.num_items, 32), MAX_BEAMS)

    @property
    def kind(self) -> tuple[str, str, int]:
        """What the cost of a row depends on."""
        return self.mode, self.select, self.beams


@dataclass(frozen=True, kw_only=True)
class Query:
    """A checked request for B users."""

    user_ids: list[str]
    times_ms: np.ndarray
    request_ids: list[str]
    exclude: list[frozenset[str]]
    options: Options
    timeout_ms: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model recommends to B users, all from one version."""

    model_version: str
    recommendations: list[Recommendation]
    flags: list[str] = field(default_factory=list)
    push: int | None = None
    """How many times weights were pushed to a roll-out server; None elsewhere."""
    queue_s: float = 0.0
    model_s: float = 0.0
    batch_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is sent back; ``flags`` are distinct and sorted, ``exposure_ids`` match the recommended items."""

    prediction: Prediction
    exposure_ids: list[list[str]]
    flags: list[str]

    @property
    def recommendations(self) -> list[Recommendation]:
        """One for each user."""
        return self.prediction.recommendations

    @property
    def items(self) -> int:
        """Recommended items of all users."""
        return sum(map(len, self.recommendations))

    @property
    def model_version(self) -> str:
        """The one version that made all of it."""
        return self.prediction.model_version

    @property
    def parameters(self) -> dict[str, Any]:
        """The response parameters; ``flags`` in one string, because gRPC has no lists."""
        push = {} if self.prediction.push is None else {"push": self.prediction.push}
        return {"model_version": self.model_version, "flags": ",".join(self.flags), **push}


def checked_query(
    users: list[str],
    times: list[int] | None,
    requests: list[str] | None,
    exclude: list[list[str]],
    parameters: Mapping[str, Any],
) -> Query:
    """The query, or InvalidInput saying which part of it is wrong."""
    check_users(len(users))
    for name, ids in (("user_id", users), ("request_id", requests or [])):
        if not all(1 <= len(each) <= MAX_ID and _clean(each) for each in ids):
            raise InvalidInput(f"a {name} is empty, longer than {MAX_ID} characters or holds control characters")
    if requests and len(set(requests)) < len(requests):
        raise InvalidInput("two users have the same request_id; give each its own, because exposure ids are made of it")
    check_times(times or [])
    if any(len(row) > MAX_EXCLUDED for row in exclude):
        raise InvalidInput(f"more than {MAX_EXCLUDED} items are excluded for one user")
    options, timeout_ms = checked_parameters(parameters)
    return Query(
        user_ids=users,
        times_ms=np.array(times if times is not None else [now_ms()] * len(users), np.int64),
        request_ids=requests or [uuid.uuid4().hex for _ in users],
        exclude=[frozenset(row) for row in exclude],
        options=options,
        timeout_ms=timeout_ms,
    )


def check_users(users: int) -> None:
    """Raises InvalidInput for nobody, or for more than may be asked for at once."""
    if not 1 <= users <= MAX_USERS:
        raise InvalidInput(f"the request names {users} users; expected 1 to {MAX_USERS}")


def check_times(times_ms: list[int]) -> None:
    """Raises InvalidInput for a clock outside the years 2000 to 2099."""
    for row, each in enumerate(times_ms):
        if not EARLIEST_MS <= each < LATEST_MS:
            raise InvalidInput(f"time_ms {each} of row {row} is not in 2000 to 2099; give UTC milliseconds")


def _clean(name: str) -> bool:
    """Whether the collector will take the id: valid Unicode without control characters."""
    return not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in name)


def now_ms() -> int:
    """The clock of a request that brings none."""
    return time.time_ns() // 1_000_000


def checked_parameters(parameters: Mapping[str, Any]) -> tuple[Options, int | None]:
    """The options and the time limit that the parameters of a request choose."""
    unknown = sorted(set(parameters) - set(PARAMETERS) - TRANSPORT_PARAMETERS)
    if unknown:
        raise InvalidInput(f"unknown parameters {unknown}; expected some of {sorted(PARAMETERS)}")
    chosen: dict[str, Any] = {}
    ranges = {"num_items": (1, MAX_ITEMS), "beam_width": (1, MAX_BEAMS), "num_samples": (1, MAX_BEAMS)}
    ranges |= {"seed": (0, 2**63 - 1), "timeout_ms": (1, MAX_TIMEOUT_MS)}
    for name, (low, high) in ranges.items():
        if name in parameters:
            chosen[name] = _integer(name, parameters[name], low, high)
    for name in ("exclude_seen", "constrained"):
        if not isinstance(parameters.get(name, True), bool):
            raise InvalidInput(f"parameter {name} is {parameters[name]!r}; expected true or false")
    if "temperature" in parameters:
        chosen["temperature"] = _temperature(parameters["temperature"])
    mode = parameters.get("mode", MODES[0])
    if mode not in MODES:
        raise InvalidInput(f"parameter mode is {mode!r}; expected one of {', '.join(MODES)}")
    try:
        check_select(parameters.get("select", SELECTIONS[0]), mode)
    except ValueError as error:
        raise InvalidInput(f"parameter {error}") from error
    timeout_ms = chosen.pop("timeout_ms", None)
    kept = {field.name: parameters[field.name] for field in fields(Options) if field.name in parameters}
    options = Options(**{**kept, **chosen})
    if mode != "sample" and (options.num_samples or not options.constrained):
        raise InvalidInput(f"num_samples and constrained belong to mode 'sample'; the mode is {mode!r}")
    if not options.constrained and not options.num_samples:
        raise InvalidInput("constrained is false without num_samples; say how many samples to draw")
    return options, timeout_ms


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise InvalidInput(f"parameter {name} is {value!r}; expected an integer from {low} to {high}")
    return value


def _temperature(value: Any) -> float:
    """gRPC parameters have no floats, so a string with a number is accepted too."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0.01 <= number <= 100:
        raise InvalidInput(f"parameter temperature is {value!r}; expected a number from 0.01 to 100")
    return number


def timeout_of(query: Query, headers: Mapping[str, str] | None) -> int | None:
    """Milliseconds that the caller gives: the parameter, else the header; None when it says nothing."""
    given = (headers or {}).get(TIMEOUT_HEADER)
    if query.timeout_ms is not None or given is None:
        return query.timeout_ms
    if not given.isascii() or not given.isdigit() or len(given) > 9:
        raise InvalidInput(f"header {TIMEOUT_HEADER} is {given[:40]!r}; expected milliseconds, a whole number")
    return _integer(TIMEOUT_HEADER, int(given), 1, MAX_TIMEOUT_MS)
