"""Renders the chart as `helm template` would, through Helm's own library; no helm binary and no cluster.

What a launcher makes of the RayJob template is part of a release as well, so it is opened and returned with the rest.
"""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

from cluster_rules.objects import Object, parse
from models.cluster.rayjob import Owner, Work, manifest

CHART = Path(__file__).resolve().parents[3] / "helm" / "onerec"
EXAMPLES = sorted((CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "onerec", "onerec"


def values_of(name: str) -> dict[str, Any]:
    """The values of one file of ``ci/``."""
    return yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text(encoding="utf-8"))


def render(values_file: Path) -> list[Object]:
    """The objects of a release with the values of one file; the caller may change them."""
    return deepcopy(_rendered(values_file))


@cache
def _rendered(values_file: Path) -> list[Object]:
    return objects(yaml.safe_load(values_file.read_text(encoding="utf-8")))


def objects(values: dict[str, Any], name: str = RELEASE, namespace: str = NAMESPACE) -> list[Object]:
    """The objects of a release with ``values``; raises HelmError with what the schema or a template refused."""
    printed = texts(values, name, namespace)
    found = [each for name, text in printed.items() if name.endswith(".yaml") for each in parse(text)]
    return found + [_launched(each) for each in found if "rayjob.yaml" in (each.get("data") or {})]


def texts(values: dict[str, Any], name: str = RELEASE, namespace: str = NAMESPACE) -> dict[str, str]:
    """What every template prints, by its path."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        return chart.render(values, name=name, namespace=namespace)


def _launched(config: Object) -> Object:
    """The RayJob that the launcher makes of the template, in the namespace of the pod that launches."""
    (template,) = parse(config["data"]["rayjob.yaml"])
    job = manifest(template, Work(stage="pretrain", arguments={"run_id": "run-1"}), Owner(name="pod", uid="1"))
    job["metadata"]["namespace"] = config["metadata"]["namespace"]
    return job
