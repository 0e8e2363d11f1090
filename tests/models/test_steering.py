"""One decision, two ways to carry it out: aliases alone, and an InferenceService as well; each step may be repeated."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from recorded.kubernetes_api import KubernetesApi, serving

from features.settings import Settings
from features.storage import Storage
from models.bundle import read_alias
from models.cluster import inference
from models.steering import Aliases, steer_of
from monitoring import trial
from monitoring.trial import PROMOTED, ROLLED_BACK, Superseded, Trial, TrialConfig, begin, finish

OLD, NEW = "20260101T000000-aaaaaaaa", "20260102T000000-bbbbbbbb"
STARTED = datetime(2026, 1, 2, tzinfo=UTC).isoformat()
KEY = ("onerec", "inferenceservices", "onerec")


@pytest.fixture
def published(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """OLD in production, NEW beside it."""
    for version in (OLD, NEW):
        s3.put_json(f"models/onerec/{version}/manifest.json", {"version": version})
    monkeypatch.setattr("models.bundle.read_manifest", lambda storage, version: {})
    s3.put_json("models/onerec/aliases/production.json", {"version": OLD})
    return s3


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """The recorded API with an InferenceService of the chart's, Standard mode."""
    with serving(tmp_path / "kubeconfig") as api:
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        container = {"name": "kserve-container", "args": [inference.STABLE_MODEL]}
        metadata = {"name": "onerec", "annotations": {inference.MODE: "Standard"}}
        spec = {"predictor": {"containers": [container]}}
        api.create("onerec", "inferenceservices", {"metadata": metadata, "spec": spec})
        yield api


def steering(storage: Storage, where: str) -> Aliases:
    return steer_of(storage, Settings(inference_service="onerec/onerec" if where == "kserve" else ""))


def trial_of(steer: Aliases) -> Trial:
    config = TrialConfig(share=0.07)
    return Trial(version=NEW, stable=OLD, started=STARTED, unit=steer.unit, config=config)


def aliases(storage: Storage) -> tuple[str | None, str | None]:
    return read_alias(storage, "production"), read_alias(storage, "candidate")


@pytest.mark.parametrize("where", ["aliases", "kserve"])
@pytest.mark.parametrize(("status", "production"), [(PROMOTED, NEW), (ROLLED_BACK, OLD)])
def test_from_start_to_end(
    published: Storage, cluster: KubernetesApi, where: str, status: str, production: str
) -> None:
    before, steer = cluster.get(KEY)["spec"], steering(published, where)
    assert steer.unit == {"aliases": "user", "kserve": "request"}[where]
    begun = begin(published, trial_of(steer), steer)
    assert begin(published, begun, steer) == begun
    assert aliases(published) == (OLD, NEW)
    canaries = cluster.get(KEY)["spec"].get("canary")
    if where == "kserve":
        assert [each["trafficPercent"] for each in canaries] == [7]
        assert canaries[0]["predictor"]["containers"][0]["args"] == [inference.CANARY_MODEL]
    else:
        assert canaries is None
    for _ in range(2):  # killed after the deed, before its record
        assert finish(published, begun, status, "because", steer).status == status
    assert aliases(published) == (production, None)
    assert cluster.get(KEY)["spec"] == before
    assert trial.read(published) is None


@pytest.mark.parametrize("where", ["aliases", "kserve"])
def test_what_was_not_compared_is_not_replaced(published: Storage, cluster: KubernetesApi, where: str) -> None:
    steer = steering(published, where)
    begun = begin(published, trial_of(steer), steer)
    published.put_json("models/onerec/aliases/production.json", {"version": "by-hand"})
    with pytest.raises(Superseded):
        steer.promote(begun)
    assert finish(published, begun, PROMOTED, "", steer).status == trial.SUPERSEDED
    assert aliases(published) == ("by-hand", None)
    assert "canary" not in cluster.get(KEY)["spec"]


def test_what_kserve_would_refuse_moves_no_alias_and_opens_no_canary(
    published: Storage, cluster: KubernetesApi
) -> None:
    cluster.patch(KEY, {"spec": {"predictor": {"minReplicas": 1, "maxReplicas": 9}}}, None)
    steer = steering(published, "kserve")
    with pytest.raises(inference.CanaryRefused, match="scales from 1 to 9 replicas"):
        begin(published, trial_of(steer), steer)
    assert aliases(published) == (OLD, None)
    assert trial.read(published) is None


def test_a_service_without_its_namespace_is_refused(s3: Storage) -> None:
    with pytest.raises(ValueError, match="give namespace/name"):
        steer_of(s3, Settings(inference_service="onerec"))
