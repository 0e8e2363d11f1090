"""The connection to Kubernetes: from inside a pod, or by KUBECONFIG, and what its errors mean."""

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

GONE, CONFLICT, FORBIDDEN, TOO_MANY = 404, 409, 403, 429
PAUSE_SECONDS = 1.0

T = TypeVar("T")


class NoCluster(RuntimeError):
    """No Kubernetes API can be used; the message says why and what to do."""

    hint = "`kubectl get pods` with the same configuration shows whether the cluster answers"


def connect() -> client.ApiClient:
    """A client for the cluster this pod runs in, else for the one KUBECONFIG names; raises NoCluster."""
    try:
        config.load_incluster_config()
    except ConfigException:
        try:
            config.load_kube_config()
        except ConfigException as error:
            raise NoCluster(
                f"no Kubernetes cluster is configured ({error}); set KUBECONFIG, or run in a pod"
            ) from error
    return client.ApiClient()


def explain(error: ApiException, doing: str) -> NoCluster:
    """The API's refusal as a sentence: what was tried, what it said, and for a missing right where to grant it."""
    try:
        said = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        said = error.reason
    hint = "; grant it to the service account of the runs (docs/kubeflow.md)" if error.status == FORBIDDEN else ""
    return NoCluster(f"{doing}: the Kubernetes API answered {error.status}: {said}{hint}")


def patiently(call: Callable[[], T], *, patience: float) -> T:
    """``call()`` through an API that is away or overloaded for at most ``patience`` seconds; raises its last error."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return call()
        except ApiException as error:
            if (error.status and error.status < 500 and error.status != TOO_MANY) or time.monotonic() > deadline:
                raise
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if time.monotonic() > deadline:
                raise NoCluster(f"the Kubernetes API has not answered for {patience:.0f} s: {error}") from error
        time.sleep(PAUSE_SECONDS)


def custom(api: client.ApiClient, group: str, version: str, plural: str, namespace: str) -> "Objects":
    """Objects of one custom resource in one namespace."""
    return Objects(client.CustomObjectsApi(api), (group, version, namespace, plural))


class Objects:
    """get, create, replace, patch and delete of one kind; errors are the client's own."""

    def __init__(self, api: client.CustomObjectsApi, where: tuple[str, str, str, str]) -> None:
        self._api, self._where = api, where

    def get(self, name: str) -> dict[str, Any] | None:
        """The object, or None."""
        try:
            found: dict[str, Any] = self._api.get_namespaced_custom_object(*self._where, name)
        except ApiException as error:
            if error.status == GONE:
                return None
            raise
        return found

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """The object as the API made it."""
        made: dict[str, Any] = self._api.create_namespaced_custom_object(*self._where, body)
        return made

    def replace(self, body: dict[str, Any]) -> dict[str, Any]:
        """The object as it is now; 409 when somebody changed it since ``body`` was read."""
        made: dict[str, Any] = self._api.replace_namespaced_custom_object(*self._where, body["metadata"]["name"], body)
        return made

    def patch(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """A merge patch: what ``body`` names is replaced, None removes."""
        made: dict[str, Any] = self._api.patch_namespaced_custom_object(*self._where, name, body)
        return made

    def delete(self, name: str) -> None:
        """Deletes with everything it owns; no error when it is gone."""
        try:
            self._api.delete_namespaced_custom_object(*self._where, name, propagation_policy="Foreground")
        except ApiException as error:
            if error.status != GONE:
                raise
