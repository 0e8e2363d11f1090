"""The API of Kubeflow Pipelines (v2beta1) over HTTP on loopback, for runs and recurring runs; client and CLI are real.

A submitted specification must parse as KFP's own message, and its arguments must be declared, given where required and
of the declared type, as the backend checks them. Runs go through the states that ``states`` lists, one a look. Left
out: pages of runs, archives, everything the platform does not call.
"""

import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from recorded.server import JsonHandler, listening

Object = dict[str, Any]
TYPES = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}
PAGE = 2


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class KfpApi:
    """The state behind the server; ``url`` is where it listens."""

    def __init__(self) -> None:
        self.experiments: dict[str, Object] = {}
        self.runs: dict[str, Object] = {}
        self.recurring: dict[str, Object] = {}
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.looks: dict[str, int] = {}
        self.headers: list[dict[str, str]] = []
        self.faults: list[int] = []
        self.lock = threading.RLock()
        self.clock = datetime(2026, 1, 1, tzinfo=UTC)
        self.url = ""

    def handle(self, verb: str, path: str, query: dict[str, list[str]], body: Object) -> Object:
        """One request; every path the platform and the CLI use."""
        if path == "/healthz":
            return {"multi_user": False}
        kind, _, rest = path.strip("/").partition("/")
        name, _, action = rest.partition(":")
        if kind == "experiments":
            return self._experiments(verb, name, query, body)
        if kind == "runs":
            return self._run(body) if verb == "POST" else self._look(name)
        if kind == "recurringruns":
            return self._recurring(verb, name, action, query, body)
        raise Refused(404, f"no such path {path}")

    def _experiments(self, verb: str, name: str, query: dict[str, list[str]], body: Object) -> Object:
        if verb == "POST":
            made = {**body, "experiment_id": str(uuid.uuid4()), "created_at": self._now()}
            self.experiments[made["experiment_id"]] = made
            return made
        if name:
            return self._of(self.experiments, name)
        wanted = json.loads(query["filter"][0])["predicates"][0]["stringValue"]
        return {"experiments": [each for each in self.experiments.values() if each["display_name"] == wanted]}

    def _run(self, body: Object) -> Object:
        check(body)
        self._of(self.experiments, body["experiment_id"])
        made = {**body, "run_id": str(uuid.uuid4()), "created_at": self._now(), "state": "PENDING"}
        self.runs[made["run_id"]] = made
        return made

    def _look(self, name: str) -> Object:
        run, look = self._of(self.runs, name), self.looks.get(name, 0)
        self.looks[name] = look + 1
        run["state"] = self.states[min(look, len(self.states) - 1)]
        if run["state"] == "FAILED":
            failed = {"display_name": "pretrain", "state": "FAILED", "error": {"message": "loss is nan"}}
            run["run_details"] = {"task_details": [failed, {"display_name": "tokenize", "state": "SUCCEEDED"}]}
        return run

    def _recurring(self, verb: str, name: str, action: str, query: dict[str, list[str]], body: Object) -> Object:
        if verb == "POST" and not name:
            check(body)
            if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
                raise Refused(400, "InvalidInputError: expected exactly 6 fields")
            status = "ENABLED" if body["mode"] == "ENABLE" else "DISABLED"
            made = {**body, "recurring_run_id": str(uuid.uuid4()), "status": status, "created_at": self._now()}
            self.recurring[made["recurring_run_id"]] = made
            return made
        if not name:
            mine = [each for each in self.recurring.values() if each["experiment_id"] == query["experiment_id"][0]]
            first = int(query.get("page_token", ["0"])[0] or 0)
            token = {"next_page_token": str(first + PAGE)} if len(mine) > first + PAGE else {}
            return {"recurringRuns": mine[first : first + PAGE], **token}
        found = self._of(self.recurring, name)
        if action:
            found["status"] = {"enable": "ENABLED", "disable": "DISABLED"}[action]
        if verb == "DELETE":
            del self.recurring[name]
        return {} if action or verb == "DELETE" else found

    def _of(self, found: dict[str, Object], name: str) -> Object:
        if name not in found:
            raise Refused(404, f"ResourceNotFoundError: {name} not found")
        return found[name]

    def _now(self) -> str:
        self.clock += timedelta(seconds=1)
        return self.clock.strftime("%Y-%m-%dT%H:%M:%SZ")


def check(body: Object) -> None:
    """Refuses what the backend would: a specification that is none, and arguments that do not fit it."""
    document = body.get("pipeline_spec") or {}
    document = document.get("pipeline_spec", document)
    try:
        spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    except json_format.ParseError as error:
        raise Refused(400, f"InvalidInputError: {error}") from error
    declared = dict(spec.root.input_definitions.parameters)
    given = (body.get("runtime_config") or {}).get("parameters") or {}
    for name, value in given.items():
        if name not in declared:
            raise Refused(400, f"InvalidInputError: parameter {name} is not declared")
        wanted = pipeline_spec_pb2.ParameterType.ParameterTypeEnum.Name(declared[name].parameter_type)
        if not isinstance(value, TYPES[wanted]):  # type: ignore[arg-type]
            raise Refused(400, f"InvalidInputError: parameter {name} must be {wanted}, {value!r} was given")
    missing = [name for name, each in declared.items() if not each.is_optional and name not in given]
    if missing:
        raise Refused(400, f"InvalidInputError: parameters {missing} are required")


class _Handler(JsonHandler):
    api: KfpApi

    def _answer(self) -> None:
        parts, body = urlsplit(self.path), self.body() or {}
        with self.api.lock:
            self.api.headers.append(dict(self.headers))
            code, answer = 200, {}
            try:
                if self.api.faults:
                    raise Refused(self.api.faults.pop(0), "planted")
                path = re.sub(r"^/apis/v2beta1", "", parts.path)
                answer = self.api.handle(self.command, path, parse_qs(parts.query), body)
            except Refused as error:
                code, answer = error.code, {"error": str(error), "code": 3, "message": str(error)}
            answer = deepcopy(answer)  # sent after the lock is given back
        self.answer(code, answer)

    do_GET = do_POST = do_DELETE = _answer


@contextmanager
def serving() -> Iterator[KfpApi]:
    """Serves a fresh API until the block ends."""
    api = KfpApi()
    with listening(_Handler, api=api) as api.url:
        yield api
