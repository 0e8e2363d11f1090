"""Whether objects fit the schemas of the API server that will read them.

Built-in kinds: kubernetes-validate, strictly (an unknown field is an error), at the oldest Kubernetes we support and at
the newest that package knows. Custom resources: the schema of their CustomResourceDefinition, closed by us because the
API server drops unknown fields in silence. The definitions are not part of this project: folder ONEREC_CRDS holds them
as YAML files, from the releases that manifests/README.md names. Left out: CEL rules and webhooks.
"""

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from cluster_rules.objects import Object, name_of, parse

OLDEST = "1.30"
CRDS = Path(os.environ.get("ONEREC_CRDS") or Path(__file__).resolve().parents[4] / "shared" / "crds")
BUILT_IN = {"", "apps", "autoscaling", "batch", "policy"} | {
    f"{name}.k8s.io"
    for name in (
        "admissionregistration",
        "apiextensions",
        "coordination",
        "discovery",
        "networking",
        "node",
        "rbac.authorization",
        "scheduling",
        "storage",
    )
}
"""API groups of Kubernetes itself."""


def built_in(item: Object) -> bool:
    """Whether Kubernetes itself serves the kind of ``item``."""
    return item["apiVersion"].rpartition("/")[0] in BUILT_IN


def invalid(objects: Iterable[Object], version: str = OLDEST) -> list[str]:
    """What the built-in kinds among ``objects`` say that Kubernetes ``version`` does not know or allow."""
    found = []
    for item in filter(built_in, objects):
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{name_of(item)} at {version}: {'.'.join(map(str, error.path))}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(f"{name_of(item)} at {version}: {error.message}")
    return found


def newest() -> str:
    """The newest Kubernetes whose schemas are installed."""
    return kubernetes_validate.latest_version()


def invalid_custom(objects: Iterable[Object]) -> list[str]:
    """What the custom resources among ``objects`` say that their definitions do not know; skips without those."""
    custom = [each for each in objects if not built_in(each)]
    if custom and not CRDS.is_dir():
        pytest.skip(f"no custom resource definitions in {CRDS}; set ONEREC_CRDS to a folder of them")
    return [problem for item in custom for problem in _against_definition(item)]


def _against_definition(item: Object) -> list[str]:
    group, _, version = item["apiVersion"].partition("/")
    found = schema(group, item["kind"], version)
    if found is None:
        return [f"{name_of(item)}: no definition of {item['apiVersion']} {item['kind']} in {CRDS}"]
    errors = jsonschema.Draft7Validator(found).iter_errors(item)
    return [f"{name_of(item)}: {'.'.join(map(str, each.path))}: {each.message}" for each in errors]


@cache
def schema(group: str, kind: str, version: str) -> Object | None:
    """The closed schema of one custom resource; None when no file defines it."""
    for each in _definitions(group, kind):
        for served in each["spec"]["versions"]:
            if served["name"] == version and served["served"]:
                closed = _closed(served["schema"]["openAPIV3Schema"])
                # The API server checks metadata itself; definitions leave it empty.
                closed["properties"]["metadata"] = {"type": "object"}
                return closed
    return None


def _definitions(group: str, kind: str) -> Iterator[Object]:
    """The definitions of ``kind``; a file is megabytes, so that only the documents that name it are parsed."""
    for path in sorted(CRDS.glob("*.yaml")):
        for text in path.read_text(encoding="utf-8").split("\n---"):
            if f"\n  group: {group}\n" in text and f"\n    kind: {kind}\n" in text:
                yield from parse(text)


def _closed(node: Object) -> Object:
    """``node`` as JSON Schema that refuses unknown fields, and knows nulls and Kubernetes' integer-or-string."""
    closed = {key: value for key, value in node.items() if not key.startswith("x-kubernetes-")}
    if "properties" in node:
        closed["properties"] = {key: _closed(value) for key, value in node["properties"].items()}
        if "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = bool(node.get("x-kubernetes-embedded-resource"))
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            closed[key] = _closed(node[key])
    if node.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    if node.get("nullable") and "type" in closed:
        closed["type"] = [*([closed["type"]] if isinstance(closed["type"], str) else closed["type"]), "null"]
    return closed
