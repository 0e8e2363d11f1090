"""The pods of every compiled pipeline keep the rules of the platform's other pods; each rule finds what is planted."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from recorded.pods import pods

from cluster_rules.policies import duplicate_env, images, pod_security, resources, secret_literals
from cluster_rules.schemas import invalid, invalid_custom
from pipelines.compilation import PIPELINES, compile_one, manifests
from pipelines.profiles import PROFILES, RAYJOB_KEY, SECRETS, TRAINING_SECRETS, USER, Choice, chosen

Object = dict[str, Any]
GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module", params=[(name, profile) for name in PIPELINES for profile in PROFILES], ids="-".join)
def documents(request: pytest.FixtureRequest, compiled: Callable[[str, str], Path]) -> list[Object]:
    """The two documents of a compiled file: what runs, and how on Kubernetes."""
    return load(compiled(*request.param))


def load(path: Path) -> list[Object]:
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))


def violations(documents: list[Object]) -> list[str]:
    """Everything wrong with the pods of a compiled pipeline."""
    rules = (pod_security, images, resources, duplicate_env)
    made = list(pods(documents[0], documents[1]))
    found = [f"{pod['metadata']['name']}: {problem}" for pod in made for rule in rules for problem in rule(pod["spec"])]
    return found + secret_literals(made)


def test_every_pod_keeps_the_rules(documents: list[Object]) -> None:
    assert violations(documents) == []
    made = list(pods(*documents))
    assert invalid(made) == []
    for pod in made:
        context = pod["spec"]["containers"][0]["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["runAsNonRoot"]) == (USER, USER, True)
        assert pod["spec"]["activeDeadlineSeconds"] > 0, "a step that hangs ends"


@pytest.fixture(scope="module")
def training(compiled: Callable[[str, str], Path]) -> list[Object]:
    return load(compiled("training", "gpu"))


def root(spec: Object, config: Object) -> None:
    config["securityContext"] = {"runAsUser": "0"}


def silent(spec: Object, config: Object) -> None:
    del config["securityContext"]


def moving(spec: Object, config: Object) -> None:
    spec["image"] = "ghcr.io/onerec-platform/onerec-train:latest"


def literal(spec: Object, config: Object) -> None:
    spec["env"].append({"name": "ONEREC_S3_SECRET_KEY", "value": "hunter2hunter2"})
    config["secretAsEnv"] = []


def twice(spec: Object, config: Object) -> None:
    spec["env"].append({"name": SECRETS[0], "value": ""})


def greedy(spec: Object, config: Object) -> None:
    del spec["resources"]["resourceMemoryLimit"]


def none_of_it(spec: Object, config: Object) -> None:
    spec["resources"]["accelerator"]["resourceCount"] = "0"


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (root, "runs as user 0"),
        (silent, "lacks runAsNonRoot"),
        (moving, "not pinned"),
        (literal, "ONEREC_S3_SECRET_KEY is written down"),
        (twice, f"sets {SECRETS[0]} twice"),
        (greedy, "lacks resources.limits.memory"),
        (none_of_it, f"limits of {GPU} above 0"),
    ],
)
def test_what_is_planted_is_found(training: list[Object], plant: Callable[[Object, Object], None], words: str) -> None:
    planted = deepcopy(training)
    spec = planted[0]["deploymentSpec"]["executors"]["exec-evaluate"]["container"]
    plant(spec, planted[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-evaluate"])
    found = violations(planted)
    assert any(words in problem for problem in found), found
    assert all(problem.startswith(("exec-evaluate:", "Pod/exec-evaluate")) for problem in found), found


def by_name(documents: list[Object]) -> dict[str, Object]:
    return {pod["metadata"]["name"].removeprefix("exec-"): pod["spec"] for pod in pods(*documents)}


def on_gpu(pod: Object) -> bool:
    return GPU in pod["containers"][0]["resources"]["limits"]


def test_models_run_on_gpus_with_shared_memory_and_gates_do_not(training: list[Object]) -> None:
    made = by_name(training)
    assert {name for name, pod in made.items() if on_gpu(pod)} == {"tokenize", "evaluate"}
    for name in ("tokenize", "evaluate"):
        assert made[name]["nodeSelector"] == dict(PROFILES["gpu"].node_selector)
        assert {"key": GPU, "operator": "Exists", "effect": "NoSchedule"} in made[name]["tolerations"]
        assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in made[name]["volumes"]
    assert not made["bless"]["nodeSelector"]


def test_training_launches_a_rayjob_or_runs_in_its_own_pod(training: list[Object], tmp_path: Path) -> None:
    launcher = by_name(training)["pretrain"]
    names = {each["name"]: each.get("value") for each in launcher["containers"][0]["env"]}
    assert names["ONEREC_RAYJOB_TEMPLATE"].endswith(RAYJOB_KEY)
    assert {"ONEREC_POD_NAME", "ONEREC_POD_UID", "ONEREC_POD_NAMESPACE"} <= set(names)
    assert {"name": "onerec-rayjob", "configMap": {}} in launcher["volumes"]
    own = by_name(load(compile_one("training", tmp_path / "p.yaml", chosen(Choice(profile="gpu", gpus=4, rayjob="")))))
    assert own["pretrain"]["containers"][0]["resources"]["limits"][GPU] == "4"
    assert "ONEREC_RAYJOB_TEMPLATE" not in {each["name"] for each in own["pretrain"]["containers"][0]["env"]}


def secrets(pod: Object) -> dict[str, Object]:
    return {
        each["name"]: each["valueFrom"]["secretKeyRef"]
        for each in pod["containers"][0]["env"]
        if "secretKeyRef" in each.get("valueFrom", {})
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_the_administrators_token_goes_to_what_trains_alone(compiled: Callable[[str, str], Path], name: str) -> None:
    made = {step: secrets(pod) for step, pod in by_name(load(compiled(name, "cpu"))).items()}
    token = {key: {"name": "onerec-pipelines", "key": key, "optional": True} for key in TRAINING_SECRETS}
    for step, found in made.items():
        assert set(found) - set(token) == set(SECRETS), step
        given = {key: found[key] for key in token if key in found}
        assert given == (token if step in ("pretrain", "align") else {}), step
    launched = by_name(load(compiled(name, "gpu")))
    assert all(set(secrets(pod)) == set(SECRETS) for pod in launched.values()), "a RayJob's own pods have it"


def test_steps_are_retried_with_growing_pauses(documents: list[Object]) -> None:
    def tasks(component: Object) -> Iterator[Object]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            inner = documents[0]["components"][task["componentRef"]["name"]]
            yield from tasks(inner) if "dag" in inner else [task]

    found = [task.get("retryPolicy") for task in tasks(documents[0]["root"])]
    assert len(found) >= 8
    wanted = {"backoffDuration": "30s", "backoffFactor": 2.0, "backoffMaxDuration": "600s", "maxRetryCount": 3}
    assert found == [wanted] * len(found)


def test_gitops_resources_are_what_the_crds_want(tmp_path: Path) -> None:
    paths = manifests(tmp_path, PROFILES["gpu"], "kubeflow")
    made = [document for path in paths for document in load(path)]
    assert [each["kind"] for each in made] == ["Pipeline", "PipelineVersion"] * len(PIPELINES)
    assert invalid_custom(made) == []
    names = [each["metadata"]["name"] for each in made]
    assert len(set(names)) == len(names)
    again = tmp_path / "again"
    assert [path.read_bytes() for path in manifests(again, PROFILES["gpu"], "kubeflow")] == [
        path.read_bytes() for path in paths
    ]
    other = [load(path)[1]["metadata"]["name"] for path in manifests(tmp_path / "cpu", PROFILES["cpu"], "kubeflow")]
    assert not set(other) & set(names), "versions are immutable: other content is another object"
