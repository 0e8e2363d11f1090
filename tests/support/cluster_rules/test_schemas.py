"""The validators refuse what an API server refuses, and accept what it accepts."""

from pathlib import Path

import pytest

from cluster_rules import schemas
from cluster_rules.objects import Object, parse

WIDGETS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.org}
spec:
  group: example.org
  names:
    kind: Widget
  versions:
    - name: v1
      served: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            metadata: {type: object}
            spec:
              type: object
              required: [size]
              properties:
                size: {type: integer, minimum: 1}
                port: {x-kubernetes-int-or-string: true}
                note: {type: string, nullable: true}
                free: {type: object, x-kubernetes-preserve-unknown-fields: true}
                named: {type: object, additionalProperties: {type: object, properties: {a: {type: string}}}}
                list: {type: array, items: {type: object, properties: {a: {type: string}}}}
    - name: v0
      served: false
      schema:
        openAPIV3Schema: {type: object}
"""


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "widgets.yaml").write_text(WIDGETS)
    monkeypatch.setattr(schemas, "CRDS", tmp_path)
    schemas.schema.cache_clear()


def widget(version: str = "v1", **spec: object) -> Object:
    return {"apiVersion": f"example.org/{version}", "kind": "Widget", "metadata": {"name": "w"}, "spec": spec}


@pytest.mark.parametrize(
    "spec",
    [
        {"size": 1, "port": 80},
        {"size": 1, "port": "http"},
        {"size": 1, "note": None},
        {"size": 1, "free": {"anything": [1]}},
        {"size": 1, "named": {"x": {"a": "b"}}, "list": [{"a": "b"}]},
    ],
)
@pytest.mark.usefixtures("definitions")
def test_a_custom_resource_that_fits(spec: Object) -> None:
    assert schemas.invalid_custom([widget(**spec)]) == []


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({}, "'size' is a required property"),
        ({"size": 0}, "less than the minimum"),
        ({"size": 1, "siez": 2}, "'siez' was unexpected"),
        ({"size": 1, "port": 1.5}, "not of type"),
        ({"size": 1, "named": {"x": {"b": "c"}}}, "'b' was unexpected"),
        ({"size": 1, "list": [{"b": "c"}]}, "'b' was unexpected"),
    ],
)
@pytest.mark.usefixtures("definitions")
def test_a_custom_resource_that_does_not(spec: Object, sentence: str) -> None:
    (problem,) = schemas.invalid_custom([widget(**spec)])
    assert problem.startswith("Widget/w: ")
    assert sentence in problem


@pytest.mark.parametrize("version", ["v0", "v2"])
@pytest.mark.usefixtures("definitions")
def test_a_version_that_nobody_serves(version: str) -> None:
    (problem,) = schemas.invalid_custom([widget(version)])
    assert "no definition of example.org/" in problem


@pytest.mark.parametrize("version", [schemas.OLDEST, schemas.newest()])
def test_built_in_kinds_are_strict(version: str) -> None:
    good = parse("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: {b: c}}")
    assert schemas.invalid(good, version) == []
    (problem,) = schemas.invalid([{**good[0], "dta": {}}], version)
    assert "ConfigMap/a" in problem
    assert "dta" in problem
    (problem,) = schemas.invalid([{**good[0], "apiVersion": "v9"}], version)
    assert "ConfigMap/a" in problem


def test_custom_and_built_in_are_told_apart() -> None:
    assert schemas.built_in({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"})
    assert not schemas.built_in({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute"})
    assert not schemas.built_in({"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue"})
