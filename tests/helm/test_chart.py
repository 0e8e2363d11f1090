"""The chart under every values file of ci/: lints, renders, fits the real schemas, keeps the rules of the cluster."""

import json
import tarfile
from pathlib import Path

import helm_python
import pytest
import yaml
from chart.render import CHART, EXAMPLES, NAMESPACE, objects, render, texts, values_of

from cluster_rules.objects import Object, Workload, containers, identities, workloads
from cluster_rules.policies import check, selects
from cluster_rules.schemas import OLDEST, invalid, invalid_custom, newest

ROOT = CHART.parents[1]
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem.removesuffix("-values"))


@every_example
def test_it_lints_strictly(example: Path) -> None:
    report = helm_python.lint(CHART, yaml.safe_load(example.read_text()), strict=True, namespace=NAMESPACE)
    assert [each for each in report["messages"] if each["severity"] >= 2] == []
    assert report["errors"] == []


def everything() -> list[Object]:
    """The different objects of all examples: many are the same, and schemas are slow to read."""
    found = {json.dumps(each, sort_keys=True): each for example in EXAMPLES for each in render(example)}
    assert len(found) > 60
    return list(found.values())


@pytest.mark.parametrize("version", [OLDEST, newest()])
def test_every_object_fits_its_schema(version: str) -> None:
    assert invalid(everything(), version) == []


def test_every_custom_resource_fits_its_definition() -> None:
    assert invalid_custom(everything()) == []


@every_example
def test_it_keeps_the_rules_of_the_cluster(example: Path) -> None:
    """Pod Security, pinned images, probes, resources, secrets, roles, network policies, one owner of replicas."""
    assert check(render(example)) == []


@every_example
def test_names_are_unique(example: Path) -> None:
    names = [(e["kind"], e["metadata"].get("namespace", ""), e["metadata"]["name"]) for e in render(example)]
    assert len(set(names)) == len(names)


@every_example
def test_what_pods_refer_to_is_in_the_release(example: Path) -> None:
    """ConfigMaps, claims and accounts; Secrets and what values call existing come from outside."""
    values, release = yaml.safe_load(example.read_text()), render(example)
    made = {(each["kind"], each["metadata"]["name"]) for each in release}
    if not values.get("serviceAccounts", {}).get("create", True):
        made.add(("ServiceAccount", values["serviceAccounts"]["name"]))
    for each in workloads(release):
        wanted = {("ServiceAccount", each.spec["serviceAccountName"])}
        for container in containers(each.spec):
            wanted |= {
                ("ConfigMap", f["configMapRef"]["name"]) for f in container.get("envFrom", []) if "configMapRef" in f
            }
        for volume in each.spec.get("volumes", []):
            wanted |= {("ConfigMap", volume["configMap"]["name"])} if "configMap" in volume else set()
            claim = volume.get("persistentVolumeClaim")
            wanted |= {("PersistentVolumeClaim", claim["claimName"])} if claim else set()
        assert wanted <= made, each.where


@every_example
def test_services_budgets_and_monitors_select_something(example: Path) -> None:
    release = render(example)
    pods = workloads(release)
    for each in release:
        if each["kind"] == "Service":
            found = [pod for pod in pods if each["spec"]["selector"].items() <= _labels(pod).items()]
            ports = {port["targetPort"] for port in each["spec"]["ports"]}
            assert found, each["metadata"]["name"]
            assert all(ports <= _ports(pod.spec) for pod in found), each["metadata"]["name"]
        elif each["kind"] == "PodDisruptionBudget":
            assert [pod for pod in pods if selects(each["spec"]["selector"], pod.labels)], each["metadata"]["name"]
        elif each["kind"] == "ServiceMonitor":
            _check_monitor(each, [other for other in release if other["kind"] == "Service"])


def _labels(pod: Workload) -> dict[str, str]:
    """With the one that KServe gives the pods of a component's own Deployment."""
    name = pod.owner["metadata"]["name"]
    return pod.labels | ({"app": f"isvc.{name}-{pod.part}"} if pod.owner["kind"] == "InferenceService" else {})


def _ports(pod: Object) -> set[str | int]:
    listed = [port for container in pod["containers"] for port in container.get("ports", [])]
    return {port["containerPort"] for port in listed} | {port["name"] for port in listed}


def _check_monitor(monitor: Object, services: list[Object]) -> None:
    found = [each for each in services if selects(monitor["spec"]["selector"], each["metadata"]["labels"])]
    assert found, monitor["metadata"]["name"]
    for each in found:
        names = {port["name"] for port in each["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= names


@pytest.mark.parametrize("name", ["prod", "a-release-with-a-name-as-long-as-helm-allows-it-to-be"])
def test_another_release_keeps_the_rules_and_shares_no_name(name: str) -> None:
    first = objects(values_of("production"))
    release = objects(values_of("production"), name, "tenant")
    assert check(release) == []
    assert not identities(each for each in release if each["kind"] != "RayJob") & identities(first)
    # A Job's pods carry its name in a label, a CronJob appends 11 characters to it.
    longest = {"CronJob": 52, "StatefulSet": 52}
    for each in release:
        assert len(each["metadata"]["name"]) <= longest.get(each["kind"], 63), each["metadata"]["name"]


def test_production_has_every_kind_that_is_promised() -> None:
    kinds = {each["kind"] for each in render(CHART / "ci" / "production-values.yaml")}
    promised = "StatefulSet Deployment InferenceService ScaledObject RayJob ConfigMap CronJob Job Ingress NetworkPolicy"
    promised += " PodDisruptionBudget Role RoleBinding Service ServiceAccount ServiceMonitor PrometheusRule Pod"
    assert set(promised.split()) <= kinds


def test_alerts_and_dashboards_are_those_of_monitoring(tmp_path: Path) -> None:
    """Helm packs nothing from outside the chart, so files/ holds links; what is packed must be what they point at."""
    with helm_python.Chart.load(CHART) as chart:
        archive = chart.save(tmp_path)
    packed = {each["name"]: each for each in _packed(Path(archive))}
    sources = [ROOT / "monitoring" / "alerts.yaml", *sorted((ROOT / "monitoring" / "dashboards").glob("*.json"))]
    assert len(sources) >= 5
    for source in sources:
        name = source.relative_to(ROOT / "monitoring").as_posix()
        assert packed[f"files/{name}"]["data"] == source.read_bytes()
    release = {
        e["metadata"]["name"]: e
        for e in objects(values_of("production"))
        if e["kind"] in ("ConfigMap", "PrometheusRule")
    }
    assert release["onerec"]["spec"] == yaml.safe_load(sources[0].read_text())
    for source in sources[1:]:
        config = release[f"onerec-dashboard-{source.stem}"]
        assert config["data"][f"onerec-{source.stem}.json"].strip() == source.read_text().strip()


def _packed(archive: Path) -> list[dict[str, object]]:
    with tarfile.open(archive) as packed:
        files = [each for each in packed.getmembers() if each.isfile()]
        return [
            {"name": each.name.partition("/")[2], "data": file.read()}
            for each in files
            if (file := packed.extractfile(each))
        ]


def test_notes_tell_how_to_go_on() -> None:
    notes = texts(values_of("trial"))["onerec/templates/NOTES.txt"]
    assert "helm test onerec -n onerec" in notes
    assert "/v2/models/onerec/infer" in notes
    assert "For a trial only: SeaweedFS Valkey" in notes
    assert "https://events.example.com/v1/events" in texts(values_of("production"))["onerec/templates/NOTES.txt"]
