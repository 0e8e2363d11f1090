"""Bad values: unknown keys and wrong types by the schema, what cannot work by a sentence that says what to change."""

from copy import deepcopy
from typing import Any

import helm_python
import jsonschema
import pytest
from chart.readme import documented, leaves
from chart.render import CHART, objects, values_of

from features.histories.windows import LENGTHS


def changed(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The values of an example with some paths set anew."""
    values = deepcopy(values_of(name))
    for path, value in changes.items():
        at = values
        *way, last = path.split(".")
        for part in way:
            at = at.setdefault(part, {})
        at[last] = value
    return values


@pytest.mark.parametrize(
    ("example", "changes", "sentence"),
    [
        (
            "production",
            {"objectStore.existingSecret": ""},
            "objectStore.existingSecret is empty: make a Secret with the keys",
        ),
        ("production", {"redis.existingSecret": ""}, "redis.existingSecret is empty: make a Secret with the key"),
        ("production", {"tokens.existingSecret": ""}, "tokens.existingSecret is empty: make a Secret with the keys"),
        (
            "production",
            {"pipelines.existingSecret": ""},
            "pipelines.existingSecret is empty: make a Secret in namespace kubeflow",
        ),
        ("production", {"tokens.clientKey": "a", "tokens.serverKey": "a"}, "clients would hold the server's token"),
        ("production", {"objectStore.endpoint": ""}, "objectStore.endpoint is empty: give the URL of an S3 endpoint"),
        (
            "production",
            {"objectStore.endpoint": "http://s3.example.com"},
            "give an https:// endpoint, or set objectStore.requireTls=false",
        ),
        ("production", {"objectStore.endpoint": "s3.example.com:443"}, "give scheme, host and port alone"),
        ("production", {"objectStore.endpoint": "https://u:p@s3.example.com"}, "give scheme, host and port alone"),
        ("production", {"objectStore.endpoint": "https://s3.example.com/bucket"}, "give scheme, host and port alone"),
        ("production", {"seaweedfs.enabled": True}, "empty the endpoint, or set seaweedfs.enabled=false"),
        ("production", {"valkey.enabled": True}, "empty the address, or set valkey.enabled=false"),
        ("production", {"redis.address": ""}, "redis.address is empty: give host:port"),
        ("production", {"serving.predictor.gpu.count": 0}, "serving.predictor.gpu.count is 0: give 1 or more"),
        ("production", {"serving.predictor.gpu.count": -1}, "serving.predictor.gpu.count is -1: give 1 or more"),
        ("production", {"rollout.version": ""}, "rollout.version is empty: give the version"),
        ("production", {"tokens.adminKey": ""}, "rollout servers take weights from administrators alone"),
        ("production", {"rollout.gpu.count": 0}, "rollout.gpu.count is 0: give 1 or more"),
        ("production", {"training.workers.gpu.count": 0}, "training.workers.gpu.count is 0: give 1 or more"),
        (
            "production",
            {"serving.autoscaling.keda.prometheusUrl": ""},
            "serving.autoscaling.keda.prometheusUrl is empty",
        ),
        ("production", {"rollout.keda.prometheusUrl": ""}, "rollout.keda.prometheusUrl is empty"),
        ("production", {"serving.autoscaling.predictor.minReplicas": 9}, "minReplicas (9) is above maxReplicas (8)"),
        ("production", {"serving.canary.enabled": True}, "set serving.autoscaling.class=none while it runs"),
        ("canary", {"serving.autoscaling.class": "hpa"}, "set serving.autoscaling.class=none while it runs"),
        ("canary", {"serving.transformer.enabled": True}, "needs serving.transformer.enabled=false"),
        ("canary", {"serving.canary.alias": "production"}, "give the alias of the candidate"),
        (
            "knative",
            {"serving.transformer.enabled": True},
            "serving.mode=Knative needs serving.transformer.enabled=false",
        ),
        ("knative", {"serving.autoscaling.class": "hpa"}, "Knative scales itself"),
        ("production", {"collector.ingress.host": ""}, "collector.ingress.host is empty"),
        ("production", {"collector.ingress.tlsSecret": ""}, "collector.ingress.tlsSecret is empty"),
        ("collector-only", {"serviceAccounts.name": ""}, "give the name of an existing ServiceAccount"),
        (
            "production",
            {"schedules.items": [{"name": "hourly", "pipeline": "retraining", "cron": "0 * * * *"}]},
            'the cron of hourly is "0 * * * *": Kubeflow Pipelines wants six fields',
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(example: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        objects(changed(example, changes))
    assert sentence in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        objects({})
    for missing in (
        "objectStore.existingSecret",
        "redis.existingSecret",
        "tokens.existingSecret",
        "redis.address is empty",
    ):
        assert missing in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"colector": {}}, "colector"),
        ({"serving.predictor.gpus": 2}, "gpus"),
        ({"objectStore.secretKey": "hunter2"}, "secretKey"),
        ({"serving.mode": "Serverless"}, "serving/mode"),
        ({"serving.canary.trafficPercent": 100}, "trafficPercent"),
        ({"collector.replicas": 0}, "collector/replicas"),
        ({"collector.replicas": "3"}, "collector/replicas"),
        ({"image.serve.tag": "latest"}, "image/serve/tag"),
        ({"image.serve.digest": "sha256:abc"}, "image/serve/digest"),
        ({"valkey.image": "valkey/valkey"}, "valkey/image"),
        ({"networkPolicy.redisPeers": [{"cidr": "10.0.0.0/8"}]}, "cidr"),
        ({"redis.address": "redis"}, "redis/address"),
        ({"fullnameOverride": "Upper"}, "fullnameOverride"),
        ({"settings.pathways": "huge"}, "settings/pathways"),
        ({"training.storage.accessMode": "ReadOnlyMany"}, "accessMode"),
    ],
)
def test_the_schema_names_what_is_wrong(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(helm_python.HelmValuesError) as caught:
        objects(changed("production", changes))
    assert told in str(caught.value)


@pytest.mark.parametrize("lengths", [*LENGTHS, "20,256,500"])
def test_every_known_length_of_the_pathways_is_taken(lengths: str) -> None:
    assert objects(changed("production", {"settings.pathways": lengths}))


def test_the_schema_is_closed_and_knows_every_value() -> None:
    with helm_python.Chart.load(CHART) as chart:
        schema, values = chart.schema, chart.values
    assert schema is not None
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(schema)
    documents = documented((CHART / "values.yaml").read_text())
    for path in leaves(values, documents):
        at = schema
        for part in path.split("."):
            assert at["additionalProperties"] is False, path
            at = at["properties"][part]
    unused = _paths(schema["properties"], "properties") - _paths(values) - {"global"}
    assert [path for path in unused if ".resources." not in path] == [], "the schema knows values that are not there"


def _paths(tree: dict[str, Any], below: str = "", prefix: str = "") -> set[str]:
    """The path of every key of nested maps; in a schema nested ones lie below the key ``properties``."""
    found = set()
    for key, value in tree.items():
        inner = value.get(below, {}) if below and isinstance(value, dict) else value
        found |= {f"{prefix}{key}"} | (_paths(inner, below, f"{prefix}{key}.") if isinstance(inner, dict) else set())
    return found
