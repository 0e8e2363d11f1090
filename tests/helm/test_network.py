"""Who may talk to whom: the allow-list read as Kubernetes reads it, in both directions, and everything else denied."""

from itertools import product
from pathlib import Path

import pytest
from chart.render import CHART, EXAMPLES, NAMESPACE, render

from cluster_rules.objects import Object, Workload, workloads
from cluster_rules.policies import selects

SPLIT = {
    ("transformer", "collector", 8000),
    ("tests", "collector", 8000),
    ("transformer", "predictor", 8081),
    ("tests", "transformer", 8080),
    ("toolbox", "transformer", 8080),
    ("training", "rollout", 8080),
    ("training", "rollout", 8081),
    *(("training", "training", port) for port in (6379, 8000, 8080, 8081, 8265, 8333, 9464)),
}
TRIAL = {
    ("tests", "collector", 8000),
    *((part, "seaweedfs", 8333) for part in ("collector", "exporter", "predictor", "retention", "toolbox")),
    *((part, "valkey", 6379) for part in ("collector", "toolbox", "transformer")),
    ("transformer", "predictor", 8081),
    ("transformer", "collector", 8000),
    ("tests", "transformer", 8080),
    ("toolbox", "transformer", 8080),
}
PORTS = (6379, 8000, 8080, 8081, 8265, 8333, 9464)


def peer_matches(peer: Object, policy: Object, pod: Workload) -> bool:
    """Whether a peer of a policy's rule takes ``pod``; one without namespaces means the policy's own."""
    if "namespaceSelector" not in peer:
        same = (policy["metadata"].get("namespace") or NAMESPACE) == (pod.namespace or NAMESPACE)
        return same and selects(peer["podSelector"], pod.labels)
    namespace = {"kubernetes.io/metadata.name": pod.namespace or NAMESPACE}
    return selects(peer["namespaceSelector"], namespace) and selects(peer.get("podSelector") or {}, pod.labels)


def lets(release: list[Object], pod: Workload, way: str, other: Workload, port: int) -> bool:
    """Whether some policy of ``pod`` allows the other end; a rule without peers means anybody, without ports any."""
    ends = "from" if way == "ingress" else "to"
    for policy in (each for each in release if each["kind"] == "NetworkPolicy"):
        home = policy["metadata"].get("namespace") or NAMESPACE
        if home != (pod.namespace or NAMESPACE) or not selects(policy["spec"]["podSelector"], pod.labels):
            continue
        for rule in policy["spec"].get(way) or []:
            ports = [each["port"] for each in rule.get("ports") or []]
            peers = rule.get(ends) or []
            if (not ports or port in ports) and (not peers or any(peer_matches(each, policy, other) for each in peers)):
                return True
    return False


def flows(release: list[Object]) -> set[tuple[str, str, int]]:
    """Every (client, server, port) of the release's own parts that both ends allow."""
    pods = {each.labels["app.kubernetes.io/component"]: each for each in workloads(release)}
    return {
        (client, server, port)
        for (client, a), (server, b), port in product(pods.items(), pods.items(), PORTS)
        if lets(release, a, "egress", b, port) and lets(release, b, "ingress", a, port)
    }


@pytest.mark.parametrize(("example", "allowed"), [("production", SPLIT), ("trial", TRIAL)])
def test_only_the_flows_that_are_needed_pass(example: str, allowed: set[tuple[str, str, int]]) -> None:
    assert flows(render(CHART / "ci" / f"{example}-values.yaml")) == allowed


def test_everything_of_the_release_is_denied_first() -> None:
    release = render(CHART / "ci" / "production-values.yaml")
    (deny,) = [each for each in release if each["metadata"]["name"] == "onerec-default-deny"]
    assert set(deny["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in deny["spec"]
    assert "egress" not in deny["spec"]
    own = [each for each in workloads(release) if (each.namespace or NAMESPACE) == NAMESPACE]
    assert len(own) > 8
    assert all(selects(deny["spec"]["podSelector"], each.labels) for each in own)


def unnamed(release: list[Object]) -> list[str]:
    """Workloads that no policy but the one that denies everything selects."""
    policies = [
        each for each in release if each["kind"] == "NetworkPolicy" and "default-deny" not in each["metadata"]["name"]
    ]
    return [
        each.where
        for each in workloads(release)
        if not any(selects(policy["spec"]["podSelector"], each.labels) for policy in policies)
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_workload_has_a_policy_of_its_own(example: Path) -> None:
    release = render(example)
    assert unnamed(release) == []
    planted = [each for each in release if each["metadata"]["name"] != "onerec-retention" or each["kind"] == "CronJob"]
    assert unnamed(planted) == ["CronJob/onerec-retention"]


def test_peers_narrow_the_way_out() -> None:
    release = render(CHART / "ci" / "collector-only-values.yaml")
    (policy,) = [e for e in release if e["kind"] == "NetworkPolicy" and e["metadata"]["name"] == "onerec-collector"]
    ways = {rule["ports"][0]["port"]: rule.get("to") for rule in policy["spec"]["egress"]}
    assert ways[9000] == [{"ipBlock": {"cidr": "203.0.113.0/24"}}]
    assert ways[6380] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "redis"}}}]
