"""What a pipeline compiles to, against files that a person has read: a change of the specification shows as a diff.

Normalised: without the SDK's version, the components' source and what ``test_policies`` checks. After a wanted change
write them anew: ``GOLDEN=write python -m pytest tests/pipelines/test_golden.py``.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.base import REGISTRY, TAG
from pipelines.compilation import PIPELINES
from pipelines.profiles import PROFILES

GOLDEN = Path(__file__).parent / "golden"
Object = dict[str, Any]


def normalised(documents: list[Object]) -> Object:
    """Pipeline, arguments, and for each DAG its tasks: image, inputs, order, condition, GPUs."""
    spec = documents[0]
    return {
        "pipeline": spec["pipelineInfo"],
        "arguments": {
            name: each.get("defaultValue") for name, each in spec["root"]["inputDefinitions"]["parameters"].items()
        },
        "dags": {
            name: {task: _task(spec, each) for task, each in component["dag"]["tasks"].items()}
            for name, component in {"root": spec["root"], **spec["components"]}.items()
            if "dag" in component
        },
    }


def _task(spec: Object, task: Object) -> Object:
    component = spec["components"][task["componentRef"]["name"]]
    made: Object = {"inputs": {k: _source(v) for k, v in task.get("inputs", {}).get("parameters", {}).items()}}
    made["after"] = task.get("dependentTasks", [])
    if "triggerPolicy" in task:
        policy = task["triggerPolicy"]
        made["when"] = policy.get("condition", policy.get("strategy"))
    if "executorLabel" in component:
        container = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        made["image"] = container["image"].replace(REGISTRY, "REGISTRY").replace(TAG, "TAG")
        made["gpus"] = int(container["resources"].get("accelerator", {}).get("resourceCount", 0))
    return {key: value for key, value in made.items() if value}


def _source(source: Object) -> str:
    if "runtimeValue" in source:
        return repr(source["runtimeValue"]["constant"])
    if "taskFinalStatus" in source:
        return f"end of {source['taskFinalStatus']['producerTask']}"
    output = source.get("taskOutputParameter")
    return f"{output['producerTask']}.{output['outputParameterKey']}" if output else source["componentInputParameter"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", PIPELINES)
def test_the_specification_is_the_one_that_was_read(
    compiled: Callable[[str, str], Path], name: str, profile: str
) -> None:
    made = normalised(list(yaml.load_all(compiled(name, profile).read_text(), yaml.CSafeLoader)))
    golden = GOLDEN / f"{name}-{profile}.yaml"
    if os.environ.get("GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(yaml.safe_dump(made, width=120))
    assert made == yaml.safe_load(golden.read_text())
