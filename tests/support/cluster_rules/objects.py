"""Kubernetes objects as dictionaries, and the pods inside them: what every rule of this folder reads.

Pods of built-in workloads, of KServe's InferenceService (its components are pod specs with extra fields) and of
KubeRay's RayJob and RayCluster. Left out: pods that other operators make from fields of their own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

SERVING = {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "InferenceService"}
"""Kinds whose containers run until told to stop, so that they need probes."""


class Loader(yaml.CSafeLoader):
    """Safe YAML as Kubernetes reads it: a bare ``=`` (in a CRD's enum of operators) is a string, a time stays text."""


Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)
Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One pod template: whose it is, the labels its pods will carry, and its spec."""

    owner: Object
    part: str
    labels: dict[str, str]
    spec: Object = field(repr=False)

    @property
    def where(self) -> str:
        """``Kind/name`` of the owner, and which of its pods."""
        return f"{name_of(self.owner)}{f' ({self.part})' if self.part else ''}"

    @property
    def namespace(self) -> str:
        """The owner's namespace; empty when the release or the overlay gives it."""
        return self.owner["metadata"].get("namespace", "")

    @property
    def serves(self) -> bool:
        """Whether the pods run until told to stop."""
        return self.owner["kind"] in SERVING


def parse(text: str) -> list[Object]:
    """The objects of a YAML stream; empty documents are left out and Lists are opened."""
    found: list[Object] = []
    for document in yaml.load_all(text, Loader):
        found += document["items"] if document and document.get("kind") == "List" else [document] if document else []
    return found


def read(*paths: Path) -> list[Object]:
    """The objects of several files."""
    return [each for path in paths for each in parse(path.read_text(encoding="utf-8"))]


def name_of(item: Object) -> str:
    """``Kind/name``."""
    return f"{item.get('kind', '?')}/{item.get('metadata', {}).get('name', '?')}"


def identities(objects: Iterable[Object]) -> set[tuple[str, str]]:
    """(kind, name) of every object: what the chart and the manifests may not share."""
    return {(each["kind"], each["metadata"]["name"]) for each in objects}


def containers(pod: Object) -> list[Object]:
    """Every container of a pod spec: init and ephemeral ones, and the ``model`` of a KServe predictor, too."""
    listed = [each for key in ("initContainers", "containers", "ephemeralContainers") for each in pod.get(key) or []]
    return listed + ([{"name": "kserve-container", **pod["model"]}] if "model" in pod else [])


def workloads(objects: Iterable[Object]) -> list[Workload]:
    """The pod templates inside ``objects``."""
    return [each for item in objects for each in _templates(item)]


def _templates(item: Object) -> Iterator[Workload]:
    kind, spec = item["kind"], item.get("spec") or {}
    if kind == "Pod":
        yield Workload(owner=item, part="", labels=item["metadata"].get("labels") or {}, spec=spec)
    elif kind in SERVING - {"InferenceService"} or kind == "Job":
        yield _from_template(item, "", spec["template"])
    elif kind == "CronJob":
        yield _from_template(item, "", spec["jobTemplate"]["spec"]["template"])
    elif kind == "ScaledJob":
        yield _from_template(item, "", spec["jobTargetRef"]["template"])
    elif kind == "InferenceService":
        yield from _inference(item, spec)
    elif kind in ("RayJob", "RayCluster"):
        yield from _ray(item, spec if kind == "RayCluster" else spec.get("rayClusterSpec") or {})
        if "submitterPodTemplate" in spec:
            yield _from_template(item, "submitter", spec["submitterPodTemplate"])


def _from_template(item: Object, part: str, template: Object, **labels: str) -> Workload:
    carried = {**(template.get("metadata", {}).get("labels") or {}), **labels}
    return Workload(owner=item, part=part, labels=carried, spec=template["spec"])


def _inference(item: Object, spec: Object) -> Iterator[Workload]:
    components = {part: spec[part] for part in ("transformer", "predictor", "explainer") if part in spec}
    components |= {f"canary {number}": each["predictor"] for number, each in enumerate(spec.get("canary") or [])}
    name, own = item["metadata"]["name"], item["metadata"].get("labels") or {}
    for part, component in components.items():
        role = "predictor" if part.startswith("canary") else part
        labels = {**own, **(component.get("labels") or {})}
        labels |= {"serving.kserve.io/inferenceservice": name, "component": role}
        yield Workload(owner=item, part=part, labels=labels, spec=component)


def _ray(item: Object, cluster: Object) -> Iterator[Workload]:
    if "headGroupSpec" in cluster:
        yield _from_template(item, "head", cluster["headGroupSpec"]["template"], **{"ray.io/node-type": "head"})
    for group in cluster.get("workerGroupSpecs") or []:
        labels = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
        yield _from_template(item, f"workers {group['groupName']}", group["template"], **labels)
