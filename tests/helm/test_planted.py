"""Each rule over rendered output finds the violation planted in a release that keeps it."""

from collections.abc import Callable
from typing import Any

import pytest
from chart.render import CHART, render

from cluster_rules.objects import Object
from cluster_rules.policies import check
from cluster_rules.schemas import OLDEST, invalid, invalid_custom

PRODUCTION = CHART / "ci" / "production-values.yaml"


def one(release: list[Object], kind: str, name: str) -> Object:
    return next(each for each in release if (each["kind"], each["metadata"]["name"]) == (kind, name))


def container(release: list[Object], kind: str, name: str) -> dict[str, Any]:
    return one(release, kind, name)["spec"]["template"]["spec"]["containers"][0]


def predictor(release: list[Object]) -> dict[str, Any]:
    return one(release, "InferenceService", "onerec")["spec"]["predictor"]


def rayjob(release: list[Object]) -> Object:
    return next(each for each in release if each["kind"] == "RayJob")


def worker(release: list[Object]) -> dict[str, Any]:
    return rayjob(release)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]


def drop_policies(release: list[Object]) -> None:
    for name in ("onerec-retention", "onerec-default-deny"):
        release.remove(one(release, "NetworkPolicy", name))


PLANTED: dict[str, tuple[Callable[[list[Object]], Any], str]] = {
    "privileged": (
        lambda r: container(r, "Deployment", "onerec-rollout")["securityContext"].update(privileged=True),
        "Deployment/onerec-rollout: container kserve-container is privileged",
    ),
    "root": (
        lambda r: predictor(r)["containers"][0]["securityContext"].update(runAsNonRoot=False),
        "InferenceService/onerec (predictor): container kserve-container lacks runAsNonRoot",
    ),
    "writable root": (
        lambda r: worker(r)["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
        "(workers workers): container ray-worker lacks readOnlyRootFilesystem",
    ),
    "host path": (
        lambda r: worker(r)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "mounts volume host of type hostPath",
    ),
    "moving image": (
        lambda r: container(r, "StatefulSet", "onerec-collector").update(image="ghcr.io/onerec/collector:latest"),
        "StatefulSet/onerec-collector: container collector uses image",
    ),
    "no probe": (
        lambda r: container(r, "StatefulSet", "onerec-collector").pop("readinessProbe"),
        "container collector lacks a readinessProbe",
    ),
    "no memory limit": (
        lambda r: container(r, "Job", "onerec-schedules")["resources"].pop("limits"),
        "container apply lacks resources.limits.memory",
    ),
    "no GPU": (
        lambda r: predictor(r)["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "0"}),
        "needs limits of nvidia.com/gpu above 0",
    ),
    "two of one name": (
        lambda r: container(r, "StatefulSet", "onerec-collector")["env"].append(
            {"name": "OMP_NUM_THREADS", "value": "2"}
        ),
        "sets OMP_NUM_THREADS twice",
    ),
    "secret literal": (
        lambda r: container(r, "StatefulSet", "onerec-collector")["env"].append(
            {"name": "S3_SECRET_KEY", "value": "hunter2"}
        ),
        "S3_SECRET_KEY is written down",
    ),
    "secret in a ConfigMap": (
        lambda r: one(r, "ConfigMap", "onerec-environment")["data"].update(ONEREC_S3_SECRET_KEY="hunter2"),
        "key ONEREC_S3_SECRET_KEY belongs in a Secret",
    ),
    "wildcard": (
        lambda r: one(r, "Role", "onerec-launcher")["rules"][0].update(verbs=["*"]),
        "Role/onerec-launcher: has a wildcard in verbs",
    ),
    "unmatched workload": (drop_policies, "CronJob/onerec-retention: no NetworkPolicy selects its pods"),
    "two owners of replicas": (
        lambda r: one(r, "Deployment", "onerec-rollout")["spec"].update(replicas=2),
        "Deployment/onerec-rollout: sets replicas, which ScaledObject/onerec-rollout owns",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_rule_finds_it(name: str) -> None:
    plant, found = PLANTED[name]
    release = render(PRODUCTION)
    assert check(release) == []
    plant(release)
    assert [problem for problem in check(release) if found in problem], check(release)


def test_an_unknown_field_of_a_built_in_kind_is_found() -> None:
    release = render(PRODUCTION)
    one(release, "StatefulSet", "onerec-collector")["spec"]["serviceNaem"] = "x"
    assert "serviceNaem" in invalid(release, OLDEST)[0]


@pytest.mark.parametrize("kind", ["InferenceService", "RayJob", "ServiceMonitor", "PrometheusRule", "ScaledObject"])
def test_an_unknown_field_of_a_custom_resource_is_found(kind: str) -> None:
    release = [each for each in render(PRODUCTION) if each["kind"] == kind][:1]
    release[0]["spec"]["surprise"] = 1
    assert "surprise" in "".join(invalid_custom(release))
