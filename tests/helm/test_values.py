"""No value is dead: each changes what some example renders. And those that place pods arrive where they should."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import helm_python
import pytest
import yaml
from chart.readme import documented, leaves
from chart.render import CHART, EXAMPLES, objects, texts

from cluster_rules.objects import workloads
from cluster_rules.schemas import invalid_custom

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
LEAVES = leaves(VALUES, documented((CHART / "values.yaml").read_text()))
BASES = [yaml.safe_load(path.read_text()) for path in EXAMPLES]
STRINGS = (
    "other",
    "https://other.example.com",
    "other.example.com:1234",
    "7Gi",
    "7s",
    "7",
    "1 2 3 4 5",
    "20270101T000000-01234567",
    "3,4,5",
    "sha256:" + "1" * 64,
    "1.2.3",
    "other/image:1.2.3",
    "ReadWriteOnce",
    "Always",
    "Knative",
    "hpa",
    "cpu",
)
LISTS: tuple[list[Any], ...] = (
    [{"name": "other"}],
    ["other"],
    ["--other=1"],
    [{"podSelector": {"matchLabels": {"a": "b"}}}],
    [{"key": "other", "operator": "Exists"}],
    [{"maxSkew": 2}],
    [{"name": "other", "pipeline": "training", "cron": "0 0 0 * * *"}],
)
MAPS: tuple[dict[str, Any], ...] = ({"other": "1"}, {"requests": {"cpu": "7", "memory": "7Gi"}})


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    result = deepcopy(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def others(value: Any) -> Iterator[Any]:
    """Values of the same type, one of which the schema may take."""
    if isinstance(value, bool) or value == "auto":
        yield from (True, False)
    elif isinstance(value, int | float):
        yield from (value + 1, value - 1)
    elif isinstance(value, str):
        yield from STRINGS
    else:
        yield from LISTS if isinstance(value, list) else MAPS


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@pytest.fixture(scope="module")
def bases() -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Values of each example, and of one that no example has, beside what they render."""
    production = next(base for base, path in zip(BASES, EXAMPLES, strict=True) if "production" in path.name)
    scaled = merged(production, {"serving": {"autoscaling": {"class": "hpa"}}, "rollout": {"keda": {"enabled": False}}})
    return [(base, texts(base)) for base in (*BASES[::-1], scaled)]


@pytest.mark.long
@pytest.mark.parametrize("path", LEAVES)
def test_the_value_changes_something(path: str, bases: list[tuple[dict[str, Any], dict[str, str]]]) -> None:
    assert any(changes(base, before, path) for base, before in bases), "no example renders differently"


def changes(base: dict[str, Any], before: dict[str, str], path: str) -> bool:
    """A template's refusal counts, since the switch was read; the schema's does not."""
    for value in others(LEAVES[path]):
        try:
            if texts(merged(base, nested(path, value))) != before:
                return True
        except helm_python.HelmValuesError:
            continue
        except helm_python.HelmRenderError:
            return True
    return False


@pytest.mark.parametrize("part", ["collector", "serving.transformer", "serving.predictor", "rollout"])
def test_pods_go_where_the_values_say(part: str) -> None:
    place = {
        "nodeSelector": {"pool": "mine"},
        "tolerations": [{"key": "mine", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [{"maxSkew": 3, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
        "priorityClassName": "mine",
    }
    production = next(base for base, path in zip(BASES, EXAMPLES, strict=True) if "production" in path.name)
    release = objects(merged(production, nested(part, place)))
    name = part.rpartition(".")[2]
    (found,) = [each for each in workloads(release) if each.labels.get("app.kubernetes.io/component") == name]
    assert {key: found.spec[key] for key in place} == place


def test_kserve_scales_by_processor_when_asked() -> None:
    production = next(base for base, path in zip(BASES, EXAMPLES, strict=True) if "production" in path.name)
    release = objects(merged(production, {"serving": {"autoscaling": {"class": "hpa"}}}))
    (service,) = [each for each in release if each["kind"] == "InferenceService"]
    assert invalid_custom([service]) == []
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "hpa"
    for part in ("predictor", "transformer"):
        wanted = {"minReplicas": 2, "maxReplicas": 8, "scaleMetric": "cpu", "scaleTarget": 70}
        assert {key: service["spec"][part][key] for key in wanted} == wanted
    assert "onerec-predictor" not in [each["metadata"]["name"] for each in release if each["kind"] == "ScaledObject"]
