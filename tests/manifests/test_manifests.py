"""manifests/ build, fit their schemas, and hold what Kueue's and Kubernetes' webhooks would check."""

from itertools import product
from pathlib import Path

import pytest
import yaml

from cluster_rules.objects import Object, identities, read
from cluster_rules.policies import rbac, secret_literals, selects
from cluster_rules.schemas import OLDEST, invalid, invalid_custom, newest

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
CLUSTER_WIDE = {
    "ClusterQueue",
    "Namespace",
    "PriorityClass",
    "ResourceFlavor",
    "RuntimeClass",
    "WorkloadPriorityClass",
}


def of(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def names(objects: list[Object]) -> set[str]:
    return {each["metadata"]["name"] for each in objects}


@pytest.mark.parametrize("version", [OLDEST, newest()])
def test_built_in_kinds_fit_the_api_server(objects: list[Object], version: str) -> None:
    assert invalid(objects, version) == []


def test_custom_resources_fit_their_definitions(objects: list[Object]) -> None:
    assert invalid_custom(objects) == []


def test_planted_mistakes_are_seen(production: list[Object]) -> None:
    (queue,) = of(production, "ClusterQueue")
    queue["spec"]["cohort"] = "shared"  # v1beta1's name of the field
    (problem,) = invalid_custom([queue])
    assert problem.startswith("ClusterQueue/onerec: spec: ")
    assert "'cohort'" in problem
    priority = of(production, "PriorityClass")[0]
    priority["preemption"] = priority.pop("preemptionPolicy")
    assert "preemption" in "".join(invalid([priority]))


def test_no_roles_and_no_secrets(objects: list[Object]) -> None:
    assert rbac(objects) == []
    assert secret_literals(objects) == []


def test_every_file_is_part_of_an_overlay(production: list[Object]) -> None:
    files = [path for path in MANIFESTS.rglob("*.yaml") if path.name != "kustomization.yaml"]
    assert identities(read(*files)) == identities(production)


def test_every_namespace_enforces_a_profile_and_reports_restricted(objects: list[Object]) -> None:
    labels = {each["metadata"]["name"]: each["metadata"]["labels"] for each in of(objects, "Namespace")}
    key = "pod-security.kubernetes.io"
    assert {name: each[f"{key}/enforce"] for name, each in labels.items()} == {
        "onerec": "restricted",
        "kubeflow": "baseline",
    }
    assert all(each[f"{key}/{mode}"] == "restricted" for each, mode in product(labels.values(), ("warn", "audit")))


def test_namespaced_objects_name_a_namespace_that_is_made(objects: list[Object]) -> None:
    placed = [each for each in objects if each["kind"] not in CLUSTER_WIDE]
    assert {each["metadata"].get("namespace") for each in placed} <= names(of(objects, "Namespace"))


def test_queues_lead_to_a_cluster_queue_that_takes_their_namespace(objects: list[Object]) -> None:
    clusters = {each["metadata"]["name"]: each["spec"] for each in of(objects, "ClusterQueue")}
    queues = of(objects, "LocalQueue")
    assert queues
    for each in queues:
        selector = clusters[each["spec"]["clusterQueue"]]["namespaceSelector"]
        assert selects(selector, {"kubernetes.io/metadata.name": each["metadata"]["namespace"]})


def test_flavors_cover_their_groups_resources_in_order_and_exist(objects: list[Object]) -> None:
    known = names(of(objects, "ResourceFlavor"))
    used = set()
    for queue in of(objects, "ClusterQueue"):
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                assert [each["name"] for each in flavor["resources"]] == group["coveredResources"]
                used.add(flavor["name"])
    assert used == known


def test_gpus_are_given_by_gpu_flavors_only(production: list[Object]) -> None:
    flavors = {each["metadata"]["name"]: each["spec"] for each in of(production, "ResourceFlavor")}
    (queue,) = of(production, "ClusterQueue")
    for flavor in queue["spec"]["resourceGroups"][0]["flavors"]:
        quota = {each["name"]: each["nominalQuota"] for each in flavor["resources"]}
        selected = "nvidia.com/gpu.present" in flavors[flavor["name"]].get("nodeLabels", {})
        assert (quota["nvidia.com/gpu"] > 0) == selected
    assert queue["spec"]["resourceGroups"][0]["flavors"][0]["name"] == "onerec-cpu"


def test_whoever_gets_a_gpu_is_placed_alike(production: list[Object]) -> None:
    """A pod that Kueue admits and one that names the runtime class land on the same kind of node."""
    (runtime,) = of(production, "RuntimeClass")
    flavor = next(each for each in of(production, "ResourceFlavor") if each["metadata"]["name"] == "onerec-gpu")
    assert runtime["scheduling"]["nodeSelector"] == flavor["spec"]["nodeLabels"]
    assert runtime["scheduling"]["tolerations"] == flavor["spec"]["tolerations"]


def test_serving_evicts_training_and_nothing_is_the_clusters_default(objects: list[Object]) -> None:
    classes = {each["metadata"]["name"]: each for each in of(objects, "PriorityClass")}
    assert classes["onerec-serving"]["value"] > classes["onerec-training"]["value"]
    assert classes["onerec-training"]["preemptionPolicy"] == "Never"
    assert not any(each.get("globalDefault") for each in classes.values())
    assert all(each["value"] < 1_000_000_000 for each in classes.values())  # above: reserved for the system


def test_a_machine_without_gpus_gets_no_gpu_objects(build) -> None:
    assert "onerec-gpu" not in names(build("local"))


def test_the_version_matrix_names_the_definitions_that_were_checked() -> None:
    """Custom resources of manifests/ have a row in the matrix, with the API version that they use."""
    page = (MANIFESTS / "README.md").read_text()
    files = [path for path in MANIFESTS.rglob("*.yaml") if path.name != "kustomization.yaml"]
    for version in {each["apiVersion"] for each in read(*files)}:
        if "x-k8s.io" in version:
            assert f"`{version}`" in page


@pytest.mark.parametrize("path", sorted(MANIFESTS.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_kustomizations_take_nothing_from_elsewhere(path: Path) -> None:
    """An administrator's apply must not fetch what nobody reviewed."""
    given = yaml.safe_load(path.read_text())
    for each in given["resources"] + given.get("components", []):
        assert (path.parent / each).resolve().is_relative_to(MANIFESTS)
