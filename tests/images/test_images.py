"""The built images: what they hold and lack, whom they run as, and that they start and answer where a pod would.

`make test-images` builds and runs them; the quick suite leaves them out.
"""

import ast
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3
from chart.render import EXAMPLES, render

from cluster_rules.objects import containers, workloads
from pipelines.processes import free_ports

pytestmark = [pytest.mark.images, pytest.mark.timeout(3600)]

PROJECT = Path(__file__).resolve().parents[2]
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "ld", "as", "make", "cargo", "nvcc")
FORBIDDEN = {"pipelines": {"torch", "ray", "kserve"}, "serve": {"ray", "kfp", "evidently"}, "train": set()}
IMPORTS = {
    "pipelines": "kfp.dsl.executor_main pipelines.__main__ features.intake.collector monitoring.drift kfp.kubernetes",
    "serve": "torch models.serving.__main__ feast",
    "train": "kfp.dsl.executor_main models.stages models.release models.serving.__main__ features.snapshot "
    "monitoring.drift ray.train torch",
}
MEGABYTES = {"pipelines": 1_600, "serve": 2_200, "train": 3_200}
"""With the CPU build of torch. More than this is a package that crept in."""


def get(url: str, **options: Any) -> urllib3.BaseHTTPResponse:
    return urllib3.request(options.pop("method", "GET"), url, retries=False, timeout=30, **options)


def wait(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if ready():
                return
        except urllib3.exceptions.HTTPError:
            pass
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


def test_configuration(image) -> None:
    assert image.config["User"] == "10001:10001"
    labels = {key.rpartition(".")[2]: value for key, value in image.config["Labels"].items() if "opencontainers" in key}
    assert labels["title"] == f"onerec-{image.target}"
    assert labels["version"] == "0.0.0.test"
    assert labels["revision"] == "0" * 40
    assert labels["name"].startswith("docker.io/library/python:3.11.")
    assert labels.keys() >= {"source", "licenses", "description"}
    assert not [key for key in image.environment if re.search("SECRET|TOKEN|PASSWORD|PIP_|PROXY", key)]


def test_nothing_can_be_written_but_tmp_and_data(image) -> None:
    assert image.run("id", "-u") == "10001"
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('x'); print('written')"
    for folder in ("/tmp", "/data", "/dev/shm"):
        assert image.run("python", "-c", program, f"{folder}/x") == "written"
    with pytest.raises(AssertionError, match="Read-only file system"):
        image.run("python", "-c", program, "/opt/app/x")


def test_nobody_but_root_owns_the_program(image) -> None:
    """Even where the root file system is not mounted read-only, user 10001 can change nothing of it."""
    look = "find / -xdev -writable -not -type l -not -path '/proc/*' -not -path '/dev/*' 2>/dev/null; true"
    assert set(image.run("sh", "-c", look).splitlines()) <= {"/tmp", "/data"}
    suid = "find / -xdev -perm /6000 -type f -path '/opt/*' 2>/dev/null; true"
    assert image.run("sh", "-c", suid) == ""


def test_no_compiler(image) -> None:
    assert image.run("sh", "-c", f"for tool in {' '.join(COMPILERS)}; do command -v $tool; done; true") == ""


def test_packages_fit_together_and_are_the_pinned_ones(image) -> None:
    assert image.run("pip", "--python", "/opt/onerec/bin/python", "check").endswith("No broken requirements found.")
    listing = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = {_normal(key): value for key, value in json.loads(image.run("python", "-c", listing)).items()}
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE))
    for name, version in pins.items():
        assert found.get(_normal(name), version).partition("+")[0] == version
    assert "onerec-platform" in found
    assert not FORBIDDEN[image.target] & found.keys()
    assert not {"pytest", "ruff", "cyclonedx-bom"} & found.keys()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_imports(image) -> None:
    image.run("python", "-c", f"import {', '.join(IMPORTS[image.target].split())}")


def bodies(decorator: str) -> list[str]:
    """What the bodies of components under ``decorator`` import: lines that nothing but their image can run."""
    found = []
    for path in sorted((PROJECT / "components").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and decorator in {
                getattr(each, "id", "") for each in node.decorator_list
            }:
                found += [ast.unparse(each) for each in node.body if isinstance(each, ast.Import | ast.ImportFrom)]
    return found


@pytest.mark.parametrize(("target", "decorator"), [("pipelines", "light"), ("train", "component")])
def test_components_find_their_code(request: pytest.FixtureRequest, target: str, decorator: str) -> None:
    lines = bodies(decorator)
    assert lines
    request.getfixturevalue(target).run("python", "-c", "\n".join(lines))


def started(target: str) -> set[str]:
    """The module, or the program, of each container that some example of the chart runs in the image of ``target``."""
    pods = [each.spec for example in EXAMPLES for each in workloads(render(example))]
    ours = [each for pod in pods for each in containers(pod) if f"/onerec-{target}:" in each["image"]]
    commands = [[*each.get("command", []), *each.get("args", [])] for each in ours if each.get("command")]
    return {command[2] if command[:2] == ["python", "-m"] else f"/{command[0]}" for command in commands}


def test_what_the_chart_starts_is_there(image) -> None:
    found = started(image.target)
    modules = sorted(each for each in found if not each.startswith("/"))
    image.run("python", "-c", "".join(f"import {each}\n" for each in modules))
    for program in found - set(modules):
        image.run("sh", "-c", f"command -v {program.lstrip('/')}")


def test_only_named_files_were_copied(image) -> None:
    names = {path.name for path in (image.root / "opt/app").iterdir()}
    packages = {"features", "monitoring", "models", "components", "pipelines", "benchmarks"}
    assert packages <= names
    assert {name for name in names - packages if not name.endswith(".dist-info")} <= {"bin"}
    assert not (image.root / "source").exists()


def test_bill_of_materials_lists_what_is_installed(image) -> None:
    bill = json.loads((image.root / "opt/sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "onerec-platform"
    listed = {(_normal(each["name"]), each["version"]) for each in bill["components"]}
    listing = (
        "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    )
    installed = {(_normal(name), version) for name, version in json.loads(image.run("python", "-c", listing))}
    assert listed == {each for each in installed if each[0] != "onerec-platform"}


def test_size(image) -> None:
    size = int(subprocess.check_output(["du", "-sxm", "--apparent-size", str(image.root)], text=True).split()[0])
    print(f"onerec-{image.target}: {size} MB", file=sys.stderr)
    assert size < MEGABYTES[image.target]


def test_the_collector_answers(pipelines, environment, valkey, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = ["python", "-m", "features.intake.collector", "--port", str(port), "--wal", "/data/wal"]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    with log.open("wb") as output, pipelines.started(command, env=variables(environment), log=output) as process:
        wait(process, log, lambda: get(f"{url}/readyz").status == 200)
        event = {"kind": "impression", "exposure_id": "e1", "request_id": "r1", "user_id": "u1", "item_id": "i1"}
        event |= {"position": 0, "event_time": int(time.time() * 1000), "source": "organic", "duration_ms": 9_000}
        headers = {"authorization": "Bearer client-token", "content-type": "application/json"}
        answer = get(f"{url}/v1/events", method="POST", headers=headers, body=json.dumps({"events": [event]}))
        assert answer.status == 202, answer.data
    # uvicorn ends by the signal that stopped it; process 1 of a container ignores that and returns 0.
    assert process.returncode in (0, -signal.SIGTERM), log.read_text()[-4000:]
    assert "Application shutdown complete" in log.read_text()


def test_the_command_line_answers(pipelines) -> None:
    assert "recommend" in pipelines.run("onerec", "--help")
    assert "recommend" in pipelines.run(*pipelines.config["Entrypoint"], "--help")


def test_the_model_server_recommends(serve, environment, tmp_path: Path) -> None:
    http, grpc = free_ports(2)
    values = variables(environment)
    version = serve.run("python", "-c", (PROJECT / "tests/images/bundle.py").read_text(), env=values)
    command = [*serve.config["Entrypoint"], "--port", str(http), "--grpc_port", str(grpc), "--device", "cpu"]
    url, log = f"http://127.0.0.1:{http}", tmp_path / "log"
    with log.open("wb") as output, serve.started(command, env=values, log=output) as process:
        wait(process, log, lambda: get(f"{url}/v2/models/onerec/ready").status == 200)
        users = {"name": "user_id", "datatype": "BYTES", "shape": [2], "data": ["u1", "nobody"]}
        body = json.dumps({"inputs": [users], "parameters": {"num_items": 3}})
        headers = {"content-type": "application/json"}
        answer = get(f"{url}/v2/models/onerec/infer", method="POST", body=body, headers=headers)
        assert answer.status == 200, answer.data
        outputs = {each["name"]: each for each in answer.json()["outputs"]}
        assert outputs["item_ids"]["shape"] == [2, 3]
        assert version in json.dumps(answer.json())
    assert process.returncode == 0, log.read_text()[-4000:]


def test_ray_runs_without_rights(train) -> None:
    """A node of a Ray cluster: sessions under /tmp, objects in /dev/shm, everything else read-only."""
    program = "import ray; ray.init(num_cpus=1); print(ray.get(ray.remote(lambda: 6 * 7).remote()))"
    assert train.run("python", "-c", program).endswith("42")


def test_a_component_runs_as_kubeflow_starts_it(train) -> None:
    """The launcher writes a module and calls kfp's executor with it."""
    module = "from kfp import dsl\nfrom kfp.dsl import *\n\ndef add(a: int, b: int) -> int:\n    return a + b\n"
    given = {"inputs": {"parameterValues": {"a": 2, "b": 3}}, "outputs": {"outputFile": "/tmp/out.json"}}
    script = (
        f"printf '%s' '{module}' > /tmp/component.py && python3 -m kfp.dsl.executor_main --component_module_path"
        f" /tmp/component.py --executor_input '{json.dumps(given)}' --function_to_execute add && cat /tmp/out.json"
    )
    assert json.loads(train.run("sh", "-c", script).splitlines()[-1])["parameterValues"]["Output"] == 5


def variables(environment) -> dict[str, str]:
    """The ONEREC_ variables of ``environment``, with the home that an image has."""
    values = {name: getattr(environment, name) for name in type(environment).model_fields}
    plain = {
        name: value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
        for name, value in values.items()
    }
    return {f"ONEREC_{name.upper()}": value for name, value in plain.items()} | {"ONEREC_HOME": "/data"}
