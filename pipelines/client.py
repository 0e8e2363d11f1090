"""What a client of the platform does: ask the model server for items, tell the collector what was shown and watched.

Speaks the Open Inference Protocol v2 to the server and ``POST /v1/events`` to the collector, over HTTP with a few
connections. Retries what is safe to retry: every event carries an idempotent id.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx

BATCH_USERS = 32
BATCH_EVENTS = 1000
STATUS_S = 5.0
"""The status page is answered beside all work; who takes longer is not well."""


class ServiceFailed(RuntimeError):
    """A service answered with an error or not at all; the message names it and what it said, ``hint`` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or "`onerec status` shows which service is ill, `onerec logs SERVICE` why; then `onerec up`"


@dataclass(frozen=True, kw_only=True)
class Served:
    """The answer for one user: equally long lists, best first."""

    request_id: str
    item_ids: list[str]
    scores: list[float]
    sids: list[list[int]]
    exposure_ids: list[str]
    model_version: str
    flags: list[str]


@dataclass
class Client:
    """Asks and reports on behalf of users; use as a context manager."""

    server_url: str
    collector_url: str
    token: str
    threads: int = 4

    def __post_init__(self) -> None:
        self._http = httpx.Client(timeout=30, transport=httpx.HTTPTransport(retries=2))
        self._pool = ThreadPoolExecutor(self.threads)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def recommend(
        self,
        model: str,
        user_ids: Sequence[str],
        times_ms: Sequence[int],
        request_ids: Sequence[str],
        **parameters: Any,
    ) -> list[Served]:
        """One answer per user, asked in batches over several connections; parameters as in docs/serving.md."""
        rows = list(zip(user_ids, times_ms, request_ids, strict=True))
        answers = self._pool.map(lambda batch: self._infer(model, batch, parameters), _batches(rows, BATCH_USERS))
        return [served for batch in answers for served in batch]

    def _infer(self, model: str, rows: list[tuple[str, int, str]], parameters: dict[str, Any]) -> list[Served]:
        shape = [len(rows)]
        body = {
            "parameters": parameters,
            "inputs": [
                {"name": "user_id", "datatype": "BYTES", "shape": shape, "data": [row[0] for row in rows]},
                {"name": "time_ms", "datatype": "INT64", "shape": shape, "data": [row[1] for row in rows]},
                {"name": "request_id", "datatype": "BYTES", "shape": shape, "data": [row[2] for row in rows]},
            ],
        }
        answer = self._post(f"{self.server_url}/v2/models/{model}/infer", body, {})
        outputs = {output["name"]: _rows(output) for output in answer["outputs"]}
        about = answer.get("parameters") or {}
        flags = str(about.get("flags", "")).split(",") if about.get("flags") else []
        return [
            Served(
                request_id=row[2],
                item_ids=[item for item in outputs["item_ids"][i] if item],
                scores=outputs["scores"][i],
                sids=outputs["sids"][i],
                exposure_ids=outputs["exposure_ids"][i],
                model_version=str(about.get("model_version", "")),
                flags=flags,
            )
            for i, row in enumerate(rows)
        ]

    def report(self, events: list[dict[str, Any]]) -> int:
        """Sends impression and feedback events; returns how many the collector acknowledged as durable."""
        headers = {"Authorization": f"Bearer {self.token}"}
        answers = self._pool.map(
            lambda batch: self._post(f"{self.collector_url}/v1/events", {"events": batch}, headers)["accepted"],
            _batches(events, BATCH_EVENTS),
        )
        return sum(int(accepted) for accepted in answers)

    def flush(self, timeout_s: float = 60) -> None:
        """Waits until the server has handed over what it served, and all events are stored and in the features."""
        deadline = time.monotonic() + timeout_s
        while self._undelivered():
            if time.monotonic() > deadline:
                raise ServiceFailed(
                    f"the model server at {self.server_url} still holds served events after {timeout_s:g} s; "
                    "see `onerec logs server` and `onerec logs collector`"
                )
            time.sleep(0.02)
        headers = {"Authorization": f"Bearer {self.token}"}
        self._post(f"{self.collector_url}/v1/flush?timeout={timeout_s:g}", {}, headers)

    def version(self, model: str) -> str | None:
        """The bundle version that ``model`` serves now, None when it is not ready."""
        entry = self.status().get("models", {}).get(model) or {}
        return str(entry["version"]) if entry.get("ready") else None

    def _undelivered(self) -> int:
        """Served events that the server has not given to the collector yet."""
        status = self.status()
        return int(status.get("served_queue", 0)) + int(status.get("served_spooled", 0))

    def status(self) -> dict[str, Any]:
        """The server's own report: models with version, readiness and reason; empty when it does not answer."""
        try:
            status: dict[str, Any] = self._http.get(f"{self.server_url}/onerec/status", timeout=STATUS_S).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return status

    def wait_for_version(self, model: str, version: str, timeout_s: float = 60) -> None:
        """Returns when ``model`` serves ``version``; raises ServiceFailed after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.version(model) != version:
            if time.monotonic() > deadline:
                raise ServiceFailed(
                    f"model {model!r} at {self.server_url} serves {self.version(model)}, not {version}, "
                    f"after {timeout_s:g} s; see `onerec logs server`"
                )
            time.sleep(0.2)

    def _post(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        for attempt in range(4):
            try:
                response = self._http.post(url, json=body, headers=headers)
            except httpx.TransportError as error:
                if attempt == 3:
                    raise ServiceFailed(f"{url} does not answer ({type(error).__name__})") from error
                time.sleep(0.3 * 2**attempt)
                continue
            if response.status_code in (429, 503) and attempt < 3:
                time.sleep(float(response.headers.get("Retry-After", 0.5)))
                continue
            if response.is_error:
                hint = "" if response.is_server_error else "the service is well: mend what it was asked"
                raise ServiceFailed(f"{url} answered {response.status_code}: {_said(response)}", hint)
            try:
                answer: dict[str, Any] = response.json()
            except ValueError as error:
                raise ServiceFailed(
                    f"{url} answered {response.status_code} with no JSON: {response.text[:80]!r}",
                    "another program listens there: look at the address (ONEREC_SERVER_URL, ONEREC_COLLECTOR_URL)",
                ) from error
            return answer
        raise ServiceFailed(f"{url} stayed overloaded")


def _said(response: httpx.Response) -> str:
    """What an error answer says: the ``error`` of our services' JSON, else its beginning."""
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]


def _batches(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _rows(output: dict[str, Any]) -> list[Any]:
    """A v2 tensor's flat ``data`` cut into nested lists along its ``shape``."""
    data, shape = output["data"], output["shape"]
    for size in reversed(shape[1:]):
        data = [data[i : i + size] for i in range(0, len(data), size)]
    return list(data)
