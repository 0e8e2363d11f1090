"""The compiled pipelines, walked: what KFP's compiler accepts may still name things that do not exist."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.base import LIGHT_IMAGE, TRAIN_IMAGE
from pipelines.compilation import PIPELINES
from pipelines.profiles import PROFILES

PROFILE_NAMES = ["local", *PROFILES]
CHANNEL = re.compile(r"inputs\.parameter_values\['([^']+)'\]")
Spec = dict[str, Any]


def read(path: Path) -> Spec:
    """The specification in a compiled file, without what is said of Kubernetes."""
    spec: Spec = next(yaml.load_all(path.read_text(), yaml.CSafeLoader))
    return spec


@pytest.fixture(
    scope="module", params=[(name, profile) for name in PIPELINES for profile in PROFILE_NAMES], ids="-".join
)
def spec(request: pytest.FixtureRequest, compiled: Callable[[str, str], Path]) -> Spec:
    return read(compiled(*request.param))


def dags(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """(name, component) of the root and of every component that is a DAG."""
    yield "root", spec["root"]
    for name, component in spec["components"].items():
        if "dag" in component:
            yield name, component


def declared(component: Spec, direction: str, kind: str) -> Spec:
    definitions: Spec = component.get(f"{direction}Definitions", {}).get(kind, {})
    return definitions


def broken_references(spec: Spec) -> list[str]:
    """Every reference of every task of every DAG that leads nowhere, and every required input that nobody gives."""
    problems = []
    for place, dag in dags(spec):
        tasks = dag["dag"]["tasks"]
        for name, task in tasks.items():
            here = f"{place}/{name}"
            component = spec["components"].get(task["componentRef"]["name"])
            if component is None:
                problems.append(f"{here}: no component {task['componentRef']['name']}")
                continue
            problems += [f"{here}: depends on {n}" for n in task.get("dependentTasks", []) if n not in tasks]
            for kind in ("parameters", "artifacts"):
                given = task.get("inputs", {}).get(kind, {})
                wanted = declared(component, "input", kind)
                problems += [f"{here}: gives {n}, which is not an input" for n in given if n not in wanted]
                required = [n for n, about in wanted.items() if not about.get("isOptional")]
                problems += [f"{here}: {n} is not given" for n in required if n not in given]
                for source in given.values():
                    problems += [f"{here}: {text}" for text in broken_source(spec, dag, kind, source)]
            condition = task.get("triggerPolicy", {}).get("condition", "")
            inputs = declared(component, "input", "parameters")
            problems += [f"{here}: condition on {n}" for n in CHANNEL.findall(condition) if n not in inputs]
    return problems


def broken_source(spec: Spec, dag: Spec, kind: str, source: Spec) -> list[str]:
    """What is wrong with where one input comes from."""
    singular = "Parameter" if kind == "parameters" else "Artifact"
    if "runtimeValue" in source:
        return []
    if f"componentInput{singular}" in source:
        name = source[f"componentInput{singular}"]
        return [] if name in declared(dag, "input", kind) else [f"{name} is not an input of the DAG"]
    if "taskFinalStatus" in source:
        producer = source["taskFinalStatus"]["producerTask"]
        return [] if producer in dag["dag"]["tasks"] else [f"no task {producer} in this DAG"]
    output = source[f"taskOutput{singular}"]
    producer = dag["dag"]["tasks"].get(output["producerTask"])
    if producer is None:
        return [f"no task {output['producerTask']} in this DAG"]
    key = output[f"output{singular}Key"]
    outputs = declared(spec["components"][producer["componentRef"]["name"]], "output", kind)
    return [] if key in outputs else [f"{output['producerTask']} has no output {key}"]


def test_every_channel_is_declared(spec: Spec) -> None:
    assert broken_references(spec) == []


@pytest.mark.parametrize("breakage", ["producer", "input", "condition", "missing"])
def test_the_walk_finds_broken_channels(compiled: Callable[[str, str], Path], breakage: str) -> None:
    spec = read(compiled("retraining", "cpu"))
    outer, inner = spec["components"]["comp-exit-handler-1"], spec["components"]["comp-condition-2"]
    if breakage == "producer":
        del inner["dag"]["tasks"]["bless"]
    elif breakage == "input":
        del inner["inputDefinitions"]["parameters"]["pipelinechannel--prepare-window-data"]
    elif breakage == "condition":
        outer["dag"]["tasks"]["condition-2"]["triggerPolicy"]["condition"] = "inputs.parameter_values['x'] == 1"
    else:
        del inner["dag"]["tasks"]["tokenize"]["inputs"]["parameters"]["base"]
    assert broken_references(spec)


def test_every_task_runs_our_image_and_installs_nothing(spec: Spec) -> None:
    executors = spec["deploymentSpec"]["executors"]
    used = {component["executorLabel"] for component in spec["components"].values() if "dag" not in component}
    assert used == set(executors)
    for name, executor in executors.items():
        container = executor["container"]
        text = " ".join([*container["command"], *container["args"]])
        assert container["image"] in (TRAIN_IMAGE, LIGHT_IMAGE), name
        assert "pip" not in re.findall(r"\w+", text), name
        assert "kfp.dsl.executor_main" in text, name


def test_no_executor_reaches_another_components_code(spec: Spec) -> None:
    """A light-weight component carries its own body only: what it uses it must import inside."""
    for name, executor in spec["deploymentSpec"]["executors"].items():
        body = executor["container"]["command"][-1]
        assert body.count("\ndef ") == 1, name
        assert "    from " in body, name


def conditions(spec: Spec) -> dict[str, tuple[str, set[str]]]:
    """Name of each condition -> (expression, its tasks)."""
    return {
        task["taskInfo"]["name"]: (
            " ".join(task["triggerPolicy"]["condition"].split()),
            set(spec["components"][task["componentRef"]["name"]]["dag"]["tasks"]),
        )
        for _, dag in dags(spec)
        for task in dag["dag"]["tasks"].values()
        if "condition" in task.get("triggerPolicy", {})
    }


BLESSED = ("inputs.parameter_values['pipelinechannel--bless-Output'] == true", {"publish"})


def inside(spec: Spec) -> Spec:
    """The tasks under the exit handler."""
    tasks: Spec = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    return tasks


@pytest.mark.parametrize("pipeline", ["training", "tokenizer_refresh"])
def test_only_what_is_blessed_is_published(compiled: Callable[[str, str], Path], pipeline: str) -> None:
    spec = read(compiled(pipeline, "cpu"))
    assert conditions(spec) == {"blessed": BLESSED}
    assert "publish" not in inside(spec)


def test_retraining_trains_when_told_and_publishes_what_is_blessed(compiled: Callable[[str, str], Path]) -> None:
    spec = read(compiled("retraining", "cpu"))
    found = conditions(spec)
    assert set(found) == {"retrain", "blessed"}
    assert found["retrain"][0] == "inputs.parameter_values['pipelinechannel--should-retrain-Output'] == true"
    assert found["blessed"] == BLESSED
    within = {name.replace("condition-3", "blessed") for name in found["retrain"][1]}
    assert within == {"tokenize", "pretrain", "align", "evaluate", "bless", "blessed"}
    outside = {name for name in inside(spec) if not name.startswith("condition")}
    assert outside == {"prepare-window", "detect-drift", "should-retrain"}


def test_gates_wait_for_what_they_judge(compiled: Callable[[str, str], Path]) -> None:
    """They read what earlier steps stored, which no input of theirs says."""
    assert "evaluate" in inside(read(compiled("training", "cpu")))["bless"]["dependentTasks"]
    assert "detect-drift" in inside(read(compiled("retraining", "cpu")))["should-retrain"]["dependentTasks"]


def test_the_outcome_is_recorded_whatever_happens(spec: Spec) -> None:
    tasks = spec["root"]["dag"]["tasks"]
    assert set(tasks) == {"exit-handler-1", "record-outcome"}
    assert tasks["record-outcome"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    status = tasks["record-outcome"]["inputs"]["parameters"]["status"]
    assert status == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}


def test_every_argument_may_be_left_out(spec: Spec) -> None:
    """Recurring runs cannot compute any: KFP expands no macros in them."""
    assert all(each.get("isOptional") for each in declared(spec["root"], "input", "parameters").values())


def test_no_step_uses_the_cache_of_kfp(spec: Spec) -> None:
    """It looks at arguments alone; ours decide by content."""
    for _, dag in dags(spec):
        for name, task in dag["dag"]["tasks"].items():
            own = "dag" not in spec["components"][task["componentRef"]["name"]]
            assert not own or task.get("cachingOptions", {}) == {}, name
