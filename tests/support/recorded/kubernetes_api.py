"""A Kubernetes API over HTTP on loopback, for the few things the platform does with it; the client is the real one.

It keeps objects in memory and behaves as the API server is documented to: 409 for a name that exists and for an update
of an old resourceVersion, 422 for an update without one, merge patches, the status as a subresource that other writes
cannot touch, label selectors, finalizers, owner references followed on deletion, and a pod's log as a chunked stream. A
pod "runs" its ``echo`` command. ``fail`` makes the next requests go wrong. Left out: watches, authentication and
admission.
"""

import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from recorded.server import JsonHandler, listening

Object = dict[str, Any]
PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/(?P<version>[^/]+))/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>status|log))?"
)


NAMESPACES = re.compile(r"/api/v1/namespaces(?:/(?P<name>[^/]+))?")


class Refused(Exception):
    """An answer other than success: code, reason and message of a Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class KubernetesApi:
    """The state behind the server; ``url`` is where it listens."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.version = 0
        self.faults: list[int] = []
        self.cut_logs = 0
        self.url = ""

    def fail(self, *codes: int) -> None:
        """The next requests are answered with these codes; 0 closes the connection without an answer."""
        self.faults += codes

    def fault(self) -> int | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else None

    # Verbs: each takes the parts of the path ------------------------------------------------------------------------

    def get(self, key: tuple[str, str, str]) -> Object:
        with self.lock:
            if key not in self.objects:
                raise Refused(404, "NotFound", f'{key[1]} "{key[2]}" not found')
            return deepcopy(self.objects[key])

    def select(self, namespace: str, plural: str, selector: str) -> list[Object]:
        wanted = dict(pair.split("=", 1) for pair in selector.split(",") if pair)
        with self.lock:
            found = [deepcopy(o) for (ns, kind, _), o in self.objects.items() if (ns, kind) == (namespace, plural)]
        return [o for o in found if wanted.items() <= o["metadata"].get("labels", {}).items()]

    def create(self, namespace: str, plural: str, body: Object) -> Object:
        key = (namespace, plural, body["metadata"]["name"])
        if body["metadata"].get("namespace", namespace) != namespace:
            raise Refused(400, "BadRequest", "the namespace of the object does not match the request")
        with self.lock:
            if key in self.objects:
                raise Refused(409, "AlreadyExists", f'{plural} "{key[2]}" already exists')
            made = deepcopy(body)
            made.pop("status", None)
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            made["metadata"] |= {"namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": now}
            if plural == "pods":
                made["status"] = {"phase": "Running", "startTime": now}
            return self._store(key, made)

    def update(self, key: tuple[str, str, str], body: Object, sub: str | None) -> Object:
        with self.lock:
            before = self.get(key)
            given = body["metadata"].get("resourceVersion")
            if not given:
                raise Refused(422, "Invalid", "metadata.resourceVersion: must be specified for an update")
            if given != before["metadata"]["resourceVersion"]:
                raise Refused(409, "Conflict", "the object has been modified; please apply your changes to the latest")
            return self._write(key, before, deepcopy(body), sub)

    def patch(self, key: tuple[str, str, str], body: Object, sub: str | None) -> Object:
        with self.lock:
            before = self.get(key)
            return self._write(key, before, merge(deepcopy(before), body), sub)

    def delete(self, key: tuple[str, str, str]) -> Object:
        with self.lock:
            found = self.get(key)
            if found["metadata"].get("finalizers"):
                found["metadata"]["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                return self._store(key, found)
            self._collect(key)
            return found

    def _write(self, key: tuple[str, str, str], before: Object, after: Object, sub: str | None) -> Object:
        if sub == "status":
            after = {**before, "status": after.get("status", {})}
        else:
            after = {**after, "status": before["status"]} if "status" in before else after
        for name in ("uid", "creationTimestamp", "namespace", "name"):
            after["metadata"][name] = before["metadata"][name]
        if after["metadata"].get("deletionTimestamp") and not after["metadata"].get("finalizers"):
            self._collect(key)
            return after
        return self._store(key, after)

    def _store(self, key: tuple[str, str, str], made: Object) -> Object:
        self.version += 1
        made["metadata"]["resourceVersion"] = str(self.version)
        self.objects[key] = made
        return deepcopy(made)

    def _collect(self, key: tuple[str, str, str]) -> None:
        gone = self.objects.pop(key)["metadata"]["uid"]
        for other, found in list(self.objects.items()):
            owners = found["metadata"].get("ownerReferences", [])
            if owners and all(owner["uid"] == gone for owner in owners):
                self._collect(other)

    def namespaces(self, verb: str, name: str | None, body: Any) -> tuple[int, Object]:
        """Creation, and deletion of all that is inside."""
        if verb == "POST":
            return 201, {"apiVersion": "v1", "kind": "Namespace", "metadata": body["metadata"]}
        with self.lock:
            for key in [key for key in self.objects if key[0] == name]:
                del self.objects[key]
        return 200, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}

    def log(self, key: tuple[str, str, str], timestamps: bool) -> list[str]:
        """The lines the pod's command echoes."""
        command = self.get(key)["spec"]["containers"][0]["command"]
        assert command[0] == "echo", "the recorded API runs nothing but echo"
        stamp = "2026-01-01T00:00:{:02d}.000000000Z "
        return [(stamp.format(i) if timestamps else "") + line for i, line in enumerate(command[1].split("\n"))]


def merge(target: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return change
    result = target if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


class _Handler(JsonHandler):
    api: KubernetesApi

    def _answer(self) -> None:
        parts, query, body = urlsplit(self.path), parse_qs(urlsplit(self.path).query), self.body()
        self.api.requests.append((self.command, parts.path))
        fault = self.api.fault()
        if fault == 0:
            self.close_connection = True
            return
        try:
            if fault:
                raise Refused(fault, "Fault", "planted")
            match = PATH.fullmatch(parts.path)
            if namespace := NAMESPACES.fullmatch(parts.path):
                self.answer(*self.api.namespaces(self.command, namespace["name"], body))
                return
            if match is None:
                raise Refused(404, "NotFound", f"no such path {parts.path}")
            if match["sub"] == "log":
                self._log((match["namespace"], "pods", match["name"]), query)
                return
            self.answer(*self._do(match, query, body))
        except Refused as error:
            status = {"kind": "Status", "status": "Failure", "code": error.code, "reason": error.reason}
            self.answer(error.code, {"apiVersion": "v1", **status, "message": str(error)})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _do(self, match: re.Match[str], query: dict[str, list[str]], body: Any) -> tuple[int, Object]:
        namespace, plural, name, sub = match["namespace"], match["plural"], match["name"], match["sub"]
        if name is None and self.command == "POST":
            return 201, self.api.create(namespace, plural, body)
        if name is None:
            items = self.api.select(namespace, plural, query.get("labelSelector", [""])[0])
            return 200, {"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items}
        key = (namespace, plural, name)
        if self.command == "PUT":
            return 200, self.api.update(key, body, sub)
        if self.command == "PATCH":
            if "merge-patch" not in self.headers["Content-Type"]:
                raise Refused(415, "UnsupportedMediaType", self.headers["Content-Type"])
            return 200, self.api.patch(key, body, sub)
        return 200, self.api.delete(key) if self.command == "DELETE" else self.api.get(key)

    def _log(self, key: tuple[str, str, str], query: dict[str, list[str]]) -> None:
        lines = self.api.log(key, query.get("timestamps", [""])[0].lower() == "true")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, line in enumerate(lines):
            if self.api.cut_logs and number == len(lines) // 2:
                self.api.cut_logs -= 1
                self.close_connection = True
                return
            data = f"{line}\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def serving(kubeconfig: Path) -> Iterator[KubernetesApi]:
    """Serves a fresh API until the block ends and writes a kubeconfig that names it."""
    api = KubernetesApi()
    with listening(_Handler, api=api) as api.url:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "recorded", "cluster": {"server": api.url}}],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [{"name": "recorded", "context": {"cluster": "recorded", "user": "nobody"}}],
            "current-context": "recorded",
        }
        kubeconfig.write_text(yaml.safe_dump(config))
        yield api
