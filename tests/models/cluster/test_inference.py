"""A canary comes, grows, and ends one of three ways; what KServe's webhook would refuse never leaves this process."""

import re
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded.cluster import Cluster
from recorded.kubernetes_api import KubernetesApi

from models.cluster import inference
from models.cluster.api import NoCluster
from models.cluster.inference import Canary, CanaryRefused, advance, drop, problems, retarget, share, start

pytestmark = pytest.mark.cluster

WHERE = ("serving.kserve.io", "v1beta1")


def service(mode: str = "Standard", **predictor: Any) -> dict[str, Any]:
    """An InferenceService as the chart makes it."""
    container = {
        "name": "kserve-container",
        "image": "onerec-serve:0.1.0",
        "args": ["--role=all", inference.STABLE_MODEL],
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "onerec", "annotations": {inference.MODE: mode}},
        "spec": {"predictor": {"minReplicas": 3, "maxReplicas": 3, "containers": [container], **predictor}},
    }


def models(predictor: dict[str, Any]) -> list[str]:
    return [argument for argument in predictor["containers"][0]["args"] if argument.startswith("--model")]


@pytest.fixture(params=["Standard", "Knative"])
def canary(request: pytest.FixtureRequest, cluster: Cluster) -> Canary:
    cluster.custom().create_namespaced_custom_object(
        *WHERE, cluster.namespace, "inferenceservices", service(request.param)
    )
    return Canary(api=cluster.api, namespace=cluster.namespace, name="onerec", record=lambda change: None)


def test_start_advance_promote(canary: Canary) -> None:
    before = canary.get()
    made = canary.change("start", lambda found: start(found, 5, "v2"))
    assert share(made) == 5
    assert inference.version(canary.get()) == "v2"
    assert share(canary.change("advance", lambda found: advance(found, 50))) == 50
    after = canary.change("promote", lambda found: drop(found, hold=False))
    assert share(after) is None
    assert models(after["spec"]["predictor"]) == [inference.STABLE_MODEL]
    if inference.mode(after) == "Standard":
        assert after["spec"] == before["spec"]


def test_rollback_leaves_the_stable_predictor_as_it_was(canary: Canary) -> None:
    before = canary.get()["spec"]["predictor"]
    canary.change("start", lambda found: start(found, 5, "v2"))
    after = canary.change("rollback", lambda found: drop(found, hold=True))["spec"]
    assert "canary" not in after
    assert models(after["predictor"]) == models(before)
    # Knative: the new revision gets nothing until the next canary, all traffic is on the one before.
    assert after["predictor"].get("canaryTrafficPercent") == (None if inference.mode(canary.get()) == "Standard" else 0)
    assert share(canary.change("start", lambda found: start(found, 10, "v3"))) == 10


def test_another_canary_waits_for_the_first(canary: Canary) -> None:
    canary.change("start", lambda found: start(found, 5, "v2"))
    with pytest.raises(CanaryRefused, match="a canary is running"):
        canary.change("start", lambda found: start(found, 5, "v3"))


@pytest.mark.parametrize("edit", [lambda found: advance(found, 9), lambda found: drop(found, hold=True), retarget])
def test_without_a_canary_nothing_can_be_done_to_it(canary: Canary, edit: Any) -> None:
    with pytest.raises(CanaryRefused, match="no canary is running"):
        canary.change("edit", edit)


def test_somebody_elses_change_in_between_is_kept(cluster: Cluster, canary: Canary) -> None:
    """The first write meets 409 and is made anew on what is there now."""
    tries = []

    def edit(found: dict[str, Any]) -> dict[str, Any]:
        if not tries:
            labels = {"metadata": {"labels": {"team": "feeds"}}}
            cluster.custom().patch_namespaced_custom_object(
                *WHERE, cluster.namespace, "inferenceservices", "onerec", labels
            )
        tries.append(found)
        return start(found, 5, "v2")

    made = canary.change("start", edit)
    assert (len(tries), made["metadata"]["labels"], share(made)) == (2, {"team": "feeds"}, 5)


def test_every_change_is_recorded_once(cluster: Cluster) -> None:
    cluster.custom().create_namespaced_custom_object(*WHERE, cluster.namespace, "inferenceservices", service())
    told: list[dict[str, Any]] = []
    canary = Canary(api=cluster.api, namespace=cluster.namespace, name="onerec", record=told.append)
    canary.change("start", lambda found: start(found, 5, "v2"))
    with pytest.raises(CanaryRefused):
        canary.change("advance", lambda found: advance(found, 101))
    assert told == [{"action": "start", "before": None, "after": 5, "service": "onerec"}]
    assert share(canary.get()) == 5


def test_a_missing_service_and_a_missing_right_are_named(cluster: Cluster, recorded: KubernetesApi) -> None:
    canary = Canary(api=cluster.api, namespace=cluster.namespace, name="other", record=lambda change: None)
    with pytest.raises(CanaryRefused, match="no InferenceService onerec-test/other"):
        canary.get()
    recorded.fail(403)
    with pytest.raises(NoCluster, match="answered 403"):
        canary.get()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"autoScaling": {"metrics": []}}, "sets autoScaling; a canary wants fixed replicas"),
        ({"scaleTarget": 80}, "sets scaleTarget"),
        ({"maxReplicas": 5}, "scales from 3 to 5 replicas"),
        ({"name": "candidate"}, r"names \['candidate', 'candidate'\] .* must differ"),
    ],
)
def test_predictors_that_cannot_have_a_canary(change: dict[str, Any], words: str) -> None:
    found = problems(start(service(**change), 5, "v2"))
    assert any(re.search(words, problem) for problem in found), found


@pytest.mark.parametrize("scaler", ["keda", "hpa"])
def test_autoscalers_exclude_a_canary(scaler: str) -> None:
    found = start(service(), 5, "v2")
    found["metadata"]["annotations"][inference.AUTOSCALER] = scaler
    assert problems(found) == [
        f"a canary cannot be combined with autoscaling by {scaler}; set the annotation {inference.AUTOSCALER}: none"
    ]


def test_a_transformer_goes_past_the_weights() -> None:
    found = start(service(), 5, "v2")
    found["spec"]["transformer"] = {"containers": []}
    assert "calls the stable predictor past it" in problems(found)[0]


def test_the_mode_must_be_said() -> None:
    silent = service()
    del silent["metadata"]["annotations"]
    with pytest.raises(CanaryRefused, match=r"deploymentMode is ''; set it to Standard or Knative"):
        start(silent, 5, "v2")


def test_each_mode_refuses_the_others_field() -> None:
    assert "ignored in Standard" in problems(service(canaryTrafficPercent=5))[0]
    knative = service("Knative")
    knative["spec"]["canary"] = start(service(), 5, "v2")["spec"]["canary"]
    assert "Standard mode only" in problems(knative)[0]


def test_a_predictor_that_names_no_alias_is_refused() -> None:
    other = service()
    other["spec"]["predictor"]["containers"][0]["args"] = []
    with pytest.raises(CanaryRefused, match="its model would stay the same"):
        start(other, 5, "v2")


@given(st.lists(st.integers(-20, 120), min_size=1, max_size=4))
def test_shares_are_accepted_just_when_they_add_up(shares: list[int]) -> None:
    found = service()
    found["spec"]["canary"] = [
        {"predictor": {"name": f"c{number}"}, "trafficPercent": each} for number, each in enumerate(shares)
    ]
    assert (problems(found) == []) == (all(0 <= each <= 100 for each in shares) and sum(shares) <= 100)


def test_retarget_keeps_the_canarys_pods_and_the_replicas() -> None:
    """KServe restarts nothing when the predictor takes the canary's name and pods."""
    running = start(service(), 5, "v2")
    before = deepcopy(running)
    after = retarget(running)
    assert running == before, "changes are made to a copy"
    assert "canary" not in after["spec"]
    predictor = after["spec"]["predictor"]
    assert (predictor["name"], predictor["minReplicas"]) == ("candidate", 3)
    assert models(predictor) == [inference.CANARY_MODEL]
