"""What a test does to a cluster, the recorded one or a real one, always through the API."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kubernetes import client


@dataclass(frozen=True)
class Cluster:
    """A client and a namespace of the test's own."""

    api: client.ApiClient
    namespace: str

    def custom(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self.api)

    def pod(self, name: str, lines: str, labels: dict[str, str]) -> Any:
        """A pod that prints ``lines`` and ends."""
        container = {"name": "main", "image": "busybox:1.37", "command": ["echo", lines]}
        spec = {"restartPolicy": "Never", "containers": [container]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
        return client.CoreV1Api(self.api).create_namespaced_pod(self.namespace, body)

    def status(self, plural: str, name: str, status: dict[str, Any]) -> None:
        """Plays the operator: writes the status of a RayJob."""
        where = ("ray.io", "v1", self.namespace, plural, name)
        self.custom().patch_namespaced_custom_object_status(*where, {"status": status})

    def rayjob(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self.custom().get_namespaced_custom_object(
                "ray.io", "v1", self.namespace, "rayjobs", name
            )
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise
        return found


def eventually(check: Callable[[], Any], seconds: float = 10) -> Any:
    """The first true value of ``check()``."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found
