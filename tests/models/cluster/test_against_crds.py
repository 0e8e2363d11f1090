"""What the launcher and the canary send fits the real definitions of KubeRay and KServe, unknown fields refused."""

from typing import Any

from cluster_rules.schemas import invalid_custom
from models.cluster.inference import CANARY_MODEL, MODE, STABLE_MODEL, advance, drop, retarget, start
from models.cluster.rayjob import Owner, Work, manifest


def test_rayjobs() -> None:
    template: dict[str, Any] = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "spec": {"rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"containers": []}}}}},
    }
    work = Work(stage="pretrain", arguments={"run_id": "r1"})
    made = manifest(template, work, Owner(name="pod", uid="1"))
    assert invalid_custom([made]) == []
    made["spec"]["entryPoint"] = made["spec"].pop("entrypoint")
    assert invalid_custom([made]), "a planted mistake is found"


def test_canaries() -> None:
    made = []
    for mode in ("Standard", "Knative"):
        container = {"name": "kserve-container", "image": "onerec-serve:0.1.0", "args": [STABLE_MODEL]}
        stable = {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {"name": "onerec", "annotations": {MODE: mode}},
            "spec": {"predictor": {"minReplicas": 2, "maxReplicas": 2, "containers": [container]}},
        }
        canary = start(stable, 5, "20260102T000000-bbbbbbbb")
        made += [canary, advance(canary, 50), drop(canary, hold=True), drop(canary, hold=False), retarget(canary)]
    assert invalid_custom(made) == []
    made[0]["spec"]["canary"][0]["weight"] = 5
    assert invalid_custom(made[:1]), "a planted mistake is found"
    assert CANARY_MODEL in made[1]["spec"]["canary"][0]["predictor"]["containers"][0]["args"]
