"""The chart and the manifests never define the same object: two owners would fight over it."""

from pathlib import Path

import pytest
from chart.render import EXAMPLES, render

from cluster_rules.objects import Object, identities, read

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_chart_and_manifests_share_no_object(values: Path, production: list[Object]) -> None:
    chart = identities(render(values))
    assert chart
    assert not chart & identities(production)


def test_a_shared_object_would_be_seen(production: list[Object]) -> None:
    planted = {"kind": "LocalQueue", "metadata": {"name": "onerec", "namespace": "elsewhere"}}
    assert identities([planted]) & identities(production)


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_what_the_chart_refers_to_is_defined_here(values: Path, production: list[Object]) -> None:
    """Priority classes, runtime classes and queues of ours that the chart names, the manifests make."""
    made = {each["metadata"]["name"] for each in production}
    assert made >= {name for name in _named(render(values)) if name.startswith("onerec-") or name == "onerec"}


def _named(node: object) -> set[str]:
    keys = ("priorityClassName", "runtimeClassName", "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class")
    if isinstance(node, dict):
        own = {node[key] for key in keys if isinstance(node.get(key), str) and node[key]}
        return own.union(*(_named(each) for each in node.values()))
    if isinstance(node, list):
        return set().union(*(_named(each) for each in node))
    return set()


def test_every_manifest_file_is_read() -> None:
    files = [path for path in MANIFESTS.rglob("*.yaml") if path.name != "kustomization.yaml"]
    assert [path for path in files if not read(path)] == []
    assert files
