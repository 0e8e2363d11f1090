"""``onerec canary`` from a published version to its end, on the recorded Kubernetes API and a real object store."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded.kubernetes_api import KubernetesApi, serving
from typer.testing import CliRunner, Result

from features.settings import Settings
from features.storage import Storage
from models.bundle import read_alias
from models.cluster import inference
from pipelines.__main__ import app

V1, V2 = "20260101T000000-aaaaaaaa", "20260102T000000-bbbbbbbb"
KEY = ("onerec", "inferenceservices", "onerec")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """An InferenceService of the chart's, Standard mode."""
    with serving(tmp_path / "kubeconfig") as api:
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        container = {"name": "kserve-container", "args": [inference.STABLE_MODEL]}
        metadata = {"name": "onerec", "annotations": {inference.MODE: "Standard"}}
        api.create(
            "onerec", "inferenceservices", {"metadata": metadata, "spec": {"predictor": {"containers": [container]}}}
        )
        yield api


@pytest.fixture
def published(s3: Storage, environment: Settings, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """V1 in production, V2 beside it; that promotion verifies a bundle is tested with ``onerec promote``."""
    for version in (V1, V2):
        s3.put_json(f"models/onerec/{version}/manifest.json", {"version": version, "files": {}, "parents": []})
    monkeypatch.setattr(
        "models.bundle.read_manifest",
        lambda storage, version: storage.get_json(f"models/onerec/{version}/manifest.json"),
    )
    monkeypatch.setattr("pipelines.cli_models.promote_version", lambda version: set_production(s3, version))
    set_production(s3, V1)
    return s3


def set_production(storage: Storage, version: str) -> None:
    storage.put_json("models/onerec/aliases/production.json", {"version": version})


def onerec(*words: str) -> Result:
    return CliRunner().invoke(app, ["canary", *words])


def audit(storage: Storage) -> list[tuple[str, int | None, str]]:
    found = [storage.get_json(key) for key in storage.keys("canary/onerec/")]
    return [(each["action"], each["after"], each["production"]) for each in found]


def test_a_candidate_becomes_production(cluster: KubernetesApi, published: Storage) -> None:
    assert onerec("start", V2, "--percent", "5").exit_code == 0
    assert read_alias(published, "candidate") == V2
    assert json.loads(onerec("status", "--json").stdout)["percent"] == 5
    assert onerec("advance", "--percent", "25").exit_code == 0
    promoted = onerec("promote")
    assert promoted.exit_code == 0, promoted.stderr
    assert read_alias(published, "production") == V2
    assert "canary" not in cluster.get(KEY)["spec"]
    assert audit(published) == [("start", 5, V1), ("advance", 25, V1), ("promote", None, V2)]


def test_a_candidate_goes_without_a_trace_in_production(cluster: KubernetesApi, published: Storage) -> None:
    before = cluster.get(KEY)["spec"]
    onerec("start", V2)
    assert onerec("rollback").exit_code == 0
    assert cluster.get(KEY)["spec"] == before
    assert read_alias(published, "production") == V1


def test_what_was_not_on_trial_is_not_promoted(cluster: KubernetesApi, published: Storage) -> None:
    onerec("start", V2)
    published.put_json("models/onerec/aliases/candidate.json", {"version": V1})
    refused = onerec("promote")
    assert refused.exit_code == 1
    assert f"the canary was started for {V2}, `candidate` is now {V1}" in refused.stderr
    assert read_alias(published, "production") == V1


def test_a_refused_start_moves_no_alias(cluster: KubernetesApi, published: Storage) -> None:
    cluster.patch(KEY, {"spec": {"predictor": {"minReplicas": 1, "maxReplicas": 9}}}, None)
    refused = onerec("start", V2)
    assert refused.exit_code == 1
    assert "scales from 1 to 9 replicas" in refused.stderr
    assert read_alias(published, "candidate") is None
    assert audit(published) == []


def test_nothing_to_promote(cluster: KubernetesApi, published: Storage) -> None:
    assert "start one first" in onerec("promote").stderr
