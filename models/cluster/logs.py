"""The log of a RayJob's program, followed while it runs: that of the pod that submits it.

A stream that breaks is taken up again where it was; a retried job's new pod follows the old one's. Left out: logs of
the workers, which Ray keeps.
"""

import threading
from collections.abc import Callable
from typing import Any

import urllib3
from kubernetes.client import ApiClient, CoreV1Api
from kubernetes.client.exceptions import ApiException

PAUSE_SECONDS = 2.0
LAST_WORDS_SECONDS = 5.0


class Logs:
    """While the block lasts, says each line that the submitting pod of RayJob ``name`` prints."""

    def __init__(self, api: ApiClient, namespace: str, name: str, say: Callable[[str], None]) -> None:
        self._core, self._namespace, self._name, self._say = CoreV1Api(api), namespace, name, say
        self._stop = threading.Event()
        self._seen: dict[str, str] = {}
        self._thread = threading.Thread(target=self._follow, name=f"logs of {name}", daemon=True)

    def __enter__(self) -> "Logs":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(LAST_WORDS_SECONDS)

    def _follow(self) -> None:
        while True:
            ending = self._stop.is_set()
            try:
                for pod in self._pods():
                    self._stream(pod, follow=not ending)
            except (ApiException, urllib3.exceptions.HTTPError, OSError):
                pass  # not started yet, gone, or the API is away: the statuses tell, and this tries again
            if ending:
                return
            self._stop.wait(PAUSE_SECONDS)

    def _pods(self) -> list[Any]:
        found = self._core.list_namespaced_pod(self._namespace, label_selector=f"job-name={self._name}").items
        started = [pod for pod in found if pod.status and pod.status.phase != "Pending"]
        return sorted(started, key=lambda pod: str(pod.metadata.creation_timestamp))

    def _stream(self, pod: Any, *, follow: bool) -> None:
        name = pod.metadata.name
        response = self._core.read_namespaced_pod_log(
            name,
            self._namespace,
            container=pod.spec.containers[0].name,
            follow=follow,
            timestamps=True,
            _preload_content=False,
        )
        try:
            for line in response:
                time, _, text = line.decode(errors="replace").rstrip("\n").partition(" ")
                if time > self._seen.get(name, ""):
                    self._seen[name] = time
                    self._say(text)
        finally:
            response.release_conn()
