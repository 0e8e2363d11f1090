"""A Kubernetes API for every test here: the recorded one, or with `make test-cluster` the one KUBECONFIG names.

Tests that take ``cluster`` run against both; those that take ``recorded`` as well plant faults and stay here.
On a real cluster the CRDs of KubeRay and KServe must be installed; their operators may run or not.
"""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client
from recorded.cluster import Cluster
from recorded.kubernetes_api import KubernetesApi, serving

from models.cluster.api import connect


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with serving(tmp_path / "kubeconfig") as api:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield api


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if "cluster" not in request.config.getoption("markexpr"):
        request.getfixturevalue("recorded")
        yield Cluster(connect(), "onerec-test")
        return
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    if "recorded" in request.fixturenames:
        pytest.skip("plants faults, which a real API does not take")
    api, name = connect(), f"onerec-test-{secrets.token_hex(4)}"
    core = client.CoreV1Api(api)
    core.create_namespace({"metadata": {"name": name}})
    try:
        yield Cluster(api, name)
    finally:
        core.delete_namespace(name)
