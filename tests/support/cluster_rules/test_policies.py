"""Every rule accepts a good release and names a violation planted in it; each plant breaks one rule only."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cluster_rules.objects import Object, containers, identities, parse, workloads
from cluster_rules.policies import check, images, pinned, pod_security, selects

GOOD = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: collector, namespace: onerec}
spec:
  replicas: 2
  template:
    metadata: {labels: {part: collector}}
    spec:
      securityContext: {runAsNonRoot: true, runAsUser: 10001, seccompProfile: {type: RuntimeDefault}}
      volumes: [{name: tmp, emptyDir: {}}]
      containers:
        - name: collector
          image: ghcr.io/onerec-platform/onerec-pipelines:0.1.0
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          resources: {requests: {cpu: 100m, memory: 256Mi}, limits: {memory: 512Mi}}
          readinessProbe: {httpGet: {path: /readyz, port: 8000}}
          livenessProbe: {httpGet: {path: /healthz, port: 8000}}
          env:
            - {name: ONEREC_BUCKET, value: onerec}
            - {name: ONEREC_S3_SECRET_KEY, valueFrom: {secretKeyRef: {name: s3, key: secret}}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: collector, namespace: onerec}
spec:
  podSelector: {matchLabels: {part: collector}}
  policyTypes: [Ingress, Egress]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: onerec}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: collector, namespace: onerec}
rules:
  - {apiGroups: [""], resources: [secrets], resourceNames: [s3], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: collector, namespace: onerec}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: collector}
subjects: [{kind: ServiceAccount, name: collector, namespace: onerec}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: onerec}
data: {max_tokens: "3", s3_secret_name: s3}
"""


EVERYBODY = {"kind": "Group", "name": "system:authenticated"}
PASSWORD = {"name": "ONEREC_REDIS_PASSWORD", "value": "hunter2"}


def template(objects: list[Object]) -> Object:
    return objects[0]["spec"]["template"]


def pod(objects: list[Object]) -> Object:
    return template(objects)["spec"]


def container(objects: list[Object]) -> Object:
    return pod(objects)["containers"][0]


def only(objects: list[Object], kind: str) -> Object:
    return next(each for each in objects if each["kind"] == kind)


def role(objects: list[Object]) -> Object:
    return only(objects, "Role")["rules"][0]


def put(where: Callable[[list[Object]], Any], *path: Any) -> Callable[[list[Object]], None]:
    """A plant: sets the last of ``path`` at the keys before it."""
    *keys, last, value = path

    def plant(objects: list[Object]) -> None:
        node = where(objects)
        for key in keys:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
        if value is None:
            node.pop(last)
        elif isinstance(node, list):
            node.append(value)
        else:
            node[last] = value

    return plant


def kind(name: str) -> Callable[[list[Object]], Object]:
    return lambda objects: only(objects, name)


PLANTS = {
    "sets hostNetwork": put(pod, "hostNetwork", True),
    "sets hostPID": put(pod, "hostPID", True),
    "sets sysctl kernel.msgmax": put(pod, "securityContext", "sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
    "volume host of type hostPath": put(pod, "volumes", 0, {"name": "host", "hostPath": {"path": "/"}}),
    "host port 80": put(container, "ports", [{"containerPort": 80, "hostPort": 80}]),
    "is privileged": put(container, "securityContext", "privileged", True),
    "adds capabilities ['SYS_ADMIN']": put(container, "securityContext", "capabilities", "add", ["SYS_ADMIN"]),
    "does not drop ALL": put(container, "securityContext", "capabilities", "drop", ["NET_RAW"]),
    "leaves allowPrivilegeEscalation on": put(container, "securityContext", "allowPrivilegeEscalation", None),
    "procMount Unmasked": put(container, "securityContext", "procMount", "Unmasked"),
    "names a host in livenessProbe": put(container, "livenessProbe", "httpGet", "host", "example.org"),
    "lacks runAsNonRoot: true": put(pod, "securityContext", "runAsNonRoot", False),
    "container collector lacks runAsNonRoot": put(pod, "securityContext", "runAsNonRoot", None),
    "runs as user 0": put(container, "securityContext", "runAsUser", 0),
    "lacks seccompProfile": put(pod, "securityContext", "seccompProfile", None),
    "unconfined by AppArmor": put(container, "securityContext", "appArmorProfile", {"type": "Unconfined"}),
    "sets SELinux options": put(container, "securityContext", "seLinuxOptions", {"type": "spc_t"}),
    "lacks readOnlyRootFilesystem": put(container, "securityContext", "readOnlyRootFilesystem", False),
    "which is not pinned": put(container, "image", "ghcr.io/onerec-platform/onerec-pipelines:latest"),
    "lacks resources.requests.cpu": put(container, "resources", "requests", "cpu", None),
    "lacks resources.limits.memory": put(container, "resources", "limits", "memory", None),
    "limits of nvidia.com/gpu above 0": put(container, "resources", "limits", "nvidia.com/gpu", 0),
    "sets ONEREC_BUCKET twice": put(container, "env", 0, {"name": "ONEREC_BUCKET", "value": "other"}),
    "lacks a readinessProbe": put(container, "readinessProbe", None),
    "wildcard in verbs": put(role, "verbs", ["*"]),
    "wildcard in resources": put(role, "resources", ["pods/*"]),
    "wildcard in apiGroups": put(role, "apiGroups", ["*"]),
    "grants impersonate": put(role, "verbs", ["impersonate"]),
    "grants all secrets": put(role, "resourceNames", None),
    "binds to system:authenticated": put(kind("RoleBinding"), "subjects", 0, EVERYBODY),
    "broad role cluster-admin": put(kind("RoleBinding"), "roleRef", "name", "cluster-admin"),
    "ONEREC_REDIS_PASSWORD is written down": put(container, "env", 0, PASSWORD),
    "key s3_password belongs in a Secret": put(kind("ConfigMap"), "data", "s3_password", "hunter2"),
    "what looks like a secret (redis://": put(container, "args", ["redis://:hunter2@valkey:6379"]),
    "what looks like a secret (--password=": put(container, "args", ["--password=hunter2"]),
    "holds a secret": put(lambda objects: objects[-1], "kind", "Secret"),
    "its pods for Egress and Ingress": put(template, "metadata", "labels", {}),
    "its pods for Egress": put(kind("NetworkPolicy"), "spec", "policyTypes", ["Ingress"]),
}


def test_a_good_release_is_accepted() -> None:
    assert check(parse(GOOD)) == []


@pytest.mark.parametrize("sentence", PLANTS)
def test_a_planted_violation_is_named_and_nothing_else(sentence: str) -> None:
    objects = parse(GOOD)
    PLANTS[sentence](objects)
    problems = check(objects)
    assert problems
    assert all(sentence in each for each in problems), problems


def test_replicas_and_an_autoscaler_are_not_both_allowed() -> None:
    objects = parse(GOOD)
    target = {"scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "collector"}}
    scaler = {"kind": "HorizontalPodAutoscaler", "metadata": {"name": "scaler"}, "spec": target}
    owned = "Deployment/collector: sets replicas, which HorizontalPodAutoscaler/scaler owns"
    assert check([*objects, scaler]) == [owned]
    del objects[0]["spec"]["replicas"]
    assert check([*objects, scaler]) == []


def test_a_policy_of_another_namespace_does_not_count() -> None:
    objects = parse(GOOD)
    only(objects, "NetworkPolicy")["metadata"]["namespace"] = "kubeflow"
    assert check(objects) == ["Deployment/collector: no NetworkPolicy selects its pods for Egress and Ingress"]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("ghcr.io/a/b:1.2.3", True),
        ("localhost:5000/a", False),
        ("localhost:5000/a:1", True),
        ("a", False),
        ("a:latest", False),
        ("a:main", False),
        ("a:", False),
        ("a@sha256:" + "0" * 64, True),
        ("a@sha256:12", False),
        ("", False),
    ],
)
def test_pinned(image: str, expected: bool) -> None:
    assert pinned(image) is expected


def serving_pod() -> Object:
    return copy.deepcopy(pod(parse(GOOD)))


def test_pods_inside_custom_resources_are_found() -> None:
    mould = {"metadata": {"labels": {"a": "b"}}, "spec": serving_pod()}
    inference = {"predictor": serving_pod(), "transformer": serving_pod(), "canary": [{"predictor": serving_pod()}]}
    cluster = {"headGroupSpec": {"template": mould}, "workerGroupSpecs": [{"groupName": "gpu", "template": mould}]}
    training = {"rayClusterSpec": cluster, "submitterPodTemplate": mould}
    nightly = {"jobTemplate": {"spec": {"template": mould}}}
    objects = [
        {"kind": "InferenceService", "metadata": {"name": "onerec"}, "spec": inference},
        {"kind": "RayJob", "metadata": {"name": "train"}, "spec": training},
        {"kind": "CronJob", "metadata": {"name": "prune"}, "spec": nightly},
    ]
    found = workloads(objects)
    assert sorted(each.where for each in found) == [
        "CronJob/prune",
        "InferenceService/onerec (canary 0)",
        "InferenceService/onerec (predictor)",
        "InferenceService/onerec (transformer)",
        "RayJob/train (head)",
        "RayJob/train (submitter)",
        "RayJob/train (workers gpu)",
    ]
    assert all(pod_security(each.spec) == [] for each in found)
    for each in found:
        each.spec["hostIPC"] = True
    assert all(pod_security(each.spec) for each in found)


def test_the_model_of_a_predictor_is_a_container_too() -> None:
    predictor = {"model": {"modelFormat": {"name": "onerec"}, "image": "a:latest"}}
    assert [each["name"] for each in containers(predictor)] == ["kserve-container"]
    assert images(predictor)


def test_init_containers_are_checked() -> None:
    spec = serving_pod()
    spec["initContainers"] = [{"name": "wait", "image": "busybox"}]
    assert any("container wait" in each for each in pod_security(spec))
    assert any("busybox" in each for each in images(spec))


def test_identities_and_lists() -> None:
    objects = parse("kind: List\nitems: [{kind: A, metadata: {name: x}}, {kind: B, metadata: {name: y}}]\n---\n---\n")
    assert identities(objects) == {("A", "x"), ("B", "y")}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}]}, True),
    ],
)
def test_selectors(selector: Object, expected: bool) -> None:
    assert selects(selector, {"a": "1"}) is expected
