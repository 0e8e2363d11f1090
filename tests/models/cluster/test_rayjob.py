"""The launcher stays with its RayJob to the end: one that succeeds, fails, is cancelled, adopted, or loses the API."""

import json
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded.cluster import Cluster, eventually
from recorded.kubernetes_api import KubernetesApi, Refused

from models.cluster.api import NoCluster
from models.cluster.rayjob import (
    BadTemplate,
    Launcher,
    Owner,
    RayJobCancelled,
    RayJobFailed,
    Work,
    manifest,
    verdict,
)

pytestmark = pytest.mark.cluster

TEMPLATE: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "onerec-training"}},
    "spec": {
        "managedBy": "kueue.x-k8s.io/multikueue",  # a running operator leaves it alone: the tests play it
        "rayClusterSpec": {
            "headGroupSpec": {
                "rayStartParams": {},
                "template": {"spec": {"containers": [{"name": "ray-head", "image": "onerec-train:0.1.0"}]}},
            }
        },
    },
}
WORK = Work(stage="pretrain", arguments={"run_id": "Retrain-2026", "tokens": "ab'c", "base": ""})
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


@contextmanager
def launched(cluster: Cluster, said: list[str], job: dict[str, Any], **options: float) -> Iterator[Future[None]]:
    """The launcher in a thread, the RayJob there."""
    chosen = {"poll_seconds": 0.02, "patience": 5.0, **options}
    launcher = Launcher(api=cluster.api, namespace=cluster.namespace, say=said.append, **chosen)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(launcher.run, job)
        try:
            eventually(lambda: ending.done() or any("created" in line or "adopted" in line for line in said))
            yield ending
        except BaseException:  # a test that fails must not wait for the launcher for ever
            launcher.remove(job["metadata"]["name"])
            raise


def test_a_job_that_succeeds_is_kept_with_its_log_told(cluster: Cluster) -> None:
    said: list[str] = []
    owner = Owner(name="launcher", uid=cluster.pod("launcher", "", {}).metadata.uid)
    with launched(cluster, said, manifest(TEMPLATE, WORK, owner)) as ending:
        made = cluster.rayjob(WORK.name)
        assert made is not None
        cluster.status("rayjobs", WORK.name, RUNNING)
        cluster.pod("submitter", "step 1\nstep 2", {"job-name": WORK.name})
        eventually(lambda: "step 2" in said)
        cluster.status("rayjobs", WORK.name, SUCCEEDED)
        ending.result(timeout=20)
    assert cluster.rayjob(WORK.name) is not None
    assert made["spec"]["shutdownAfterJobFinishes"] is True
    assert made["metadata"]["ownerReferences"][0]["uid"] == owner.uid
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "onerec-training"
    assert [line for line in said if line.startswith("step")] == ["step 1", "step 2"]


@pytest.mark.parametrize(
    "status",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded", "message": "too long"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "FAILED", "message": "loss is nan"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
    ],
)
def test_a_job_that_fails_is_told_and_deleted(cluster: Cluster, status: dict[str, str]) -> None:
    said: list[str] = []
    with launched(cluster, said, manifest(TEMPLATE, WORK, None)) as ending:
        cluster.status("rayjobs", WORK.name, status)
        with pytest.raises(RayJobFailed) as failure:
            ending.result(timeout=20)
    for words in status.values():
        assert words in str(failure.value)
    eventually(lambda: cluster.rayjob(WORK.name) is None)


def test_the_same_work_adopts_the_job_under_way(cluster: Cluster) -> None:
    """A step that is retried after its pod died: no second job, and the new pod owns it."""
    first = Owner(name="first", uid="11111111-1111-1111-1111-111111111111")
    cluster.custom().create_namespaced_custom_object(
        "ray.io", "v1", cluster.namespace, "rayjobs", manifest(TEMPLATE, WORK, first)
    )
    before = cluster.rayjob(WORK.name)
    assert before is not None
    said: list[str] = []
    second = Owner(name="second", uid=cluster.pod("second", "", {}).metadata.uid)
    with launched(cluster, said, manifest(TEMPLATE, WORK, second)) as ending:
        after = cluster.rayjob(WORK.name)
        cluster.status("rayjobs", WORK.name, SUCCEEDED)
        ending.result(timeout=20)
    assert after is not None
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert [owner["name"] for owner in after["metadata"]["ownerReferences"]] == ["second"]


def test_a_failed_job_of_an_earlier_try_is_replaced(cluster: Cluster) -> None:
    cluster.custom().create_namespaced_custom_object(
        "ray.io", "v1", cluster.namespace, "rayjobs", manifest(TEMPLATE, WORK, None)
    )
    old = cluster.rayjob(WORK.name)
    assert old is not None
    cluster.status("rayjobs", WORK.name, {"jobDeploymentStatus": "Failed"})
    said: list[str] = []
    with launched(cluster, said, manifest(TEMPLATE, WORK, None)) as ending:
        new = cluster.rayjob(WORK.name)
        assert new is not None
        assert new["metadata"]["uid"] != old["metadata"]["uid"]
        cluster.status("rayjobs", WORK.name, SUCCEEDED)
        ending.result(timeout=20)


def test_sigterm_deletes_the_job(cluster: Cluster) -> None:
    """How Kubernetes ends the pod of a run that is terminated."""
    said: list[str] = []
    launcher = Launcher(api=cluster.api, namespace=cluster.namespace, poll_seconds=0.02, say=said.append)
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        eventually(lambda: any("cluster New" in line for line in said))
        os.kill(os.getpid(), signal.SIGTERM)

    other = threading.Thread(target=terminate)
    other.start()
    with pytest.raises(RayJobCancelled, match="SIGTERM"):
        launcher.run(manifest(TEMPLATE, WORK, None))
    other.join()
    eventually(lambda: cluster.rayjob(WORK.name) is None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_deleted_by_somebody_else_is_a_failure(cluster: Cluster) -> None:
    said: list[str] = []
    with launched(cluster, said, manifest(TEMPLATE, WORK, None)) as ending:
        cluster.custom().delete_namespaced_custom_object("ray.io", "v1", cluster.namespace, "rayjobs", WORK.name)
        with pytest.raises(RayJobFailed, match="deleted by somebody else"):
            ending.result(timeout=20)


def test_an_api_that_is_away_for_a_while_is_waited_for(
    cluster: Cluster, recorded: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.cluster.api.PAUSE_SECONDS", 0.02)
    said: list[str] = []
    with launched(cluster, said, manifest(TEMPLATE, WORK, None), patience=30) as ending:
        recorded.fail(500, 503, 429, 0, 0, 0, 0, 0, 0)
        eventually(lambda: not recorded.faults)
        cluster.status("rayjobs", WORK.name, SUCCEEDED)
        ending.result(timeout=20)


def test_an_answer_that_was_lost_is_no_second_job(
    cluster: Cluster, recorded: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The POST arrives, its answer does not: the retry meets the job it made itself."""
    monkeypatch.setattr("models.cluster.api.PAUSE_SECONDS", 0.02)
    said: list[str] = []
    create = recorded.create

    def lossy(namespace: str, plural: str, body: dict[str, Any]) -> dict[str, Any]:
        made = create(namespace, plural, body)
        recorded.create = create  # type: ignore[method-assign]
        recorded.objects[namespace, plural, body["metadata"]["name"]] = made
        raise Refused(504, "Timeout", "planted")

    recorded.create = lossy  # type: ignore[method-assign]
    with launched(cluster, said, manifest(TEMPLATE, WORK, None)) as ending:
        cluster.status("rayjobs", WORK.name, SUCCEEDED)
        ending.result(timeout=20)
    assert [verb for verb, path in recorded.requests if path.endswith("/rayjobs")] == ["POST", "POST"]


def test_a_missing_right_is_named(cluster: Cluster, recorded: KubernetesApi) -> None:
    recorded.fail(403)
    launcher = Launcher(api=cluster.api, namespace=cluster.namespace, say=lambda line: None)
    with pytest.raises(NoCluster, match=r"answered 403: planted; grant it to the service account"):
        launcher.run(manifest(TEMPLATE, WORK, None))


def test_a_log_that_breaks_off_goes_on_without_repeating(
    cluster: Cluster, recorded: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.cluster.logs.PAUSE_SECONDS", 0.02)
    recorded.cut_logs = 2
    said: list[str] = []
    with launched(cluster, said, manifest(TEMPLATE, WORK, None)) as ending:
        cluster.pod("submitter", "a\nb\nc\nd", {"job-name": WORK.name})
        eventually(lambda: "d" in said)
        cluster.status("rayjobs", WORK.name, SUCCEEDED)
        ending.result(timeout=20)
    assert [line for line in said if line in "abcd"] == ["a", "b", "c", "d"]


def test_names_fit_kuberay_and_follow_the_work() -> None:
    long = Work(stage="pretrain", arguments={"run_id": "x" * 200})
    assert len(long.name) <= 47
    other = Work(stage="pretrain", arguments={**WORK.arguments, "tokens": "other"})
    assert len({WORK.name, other.name, Work(stage="align", arguments=WORK.arguments).name}) == 3
    assert Work(stage="pretrain", arguments=dict(reversed(WORK.arguments.items()))).name == WORK.name


@given(st.dictionaries(st.sampled_from(["tokens", "overrides", "base"]), st.text()), st.text(min_size=1))
def test_the_entrypoint_survives_the_shell(arguments: dict[str, str], run_id: str) -> None:
    work = Work(stage="align", arguments={**arguments, "run_id": run_id})
    words = shlex.split(work.entrypoint)
    assert words[:4] == ["python", "-m", "models.stages", "align"]
    assert json.loads(words[4]) == work.arguments


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "RayCluster"}, "expected ray.io/v1 RayJob"),
        ({"spec": {"clusterSelector": {"a": "b"}, "rayClusterSpec": {}}}, "clusterSelector"),
        ({"spec": {}}, "no spec.rayClusterSpec"),
    ],
)
def test_templates_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadTemplate, match=words):
        manifest({**TEMPLATE, **change}, WORK, None)


def test_a_suspended_job_waits_for_its_queue() -> None:
    job = {**TEMPLATE, "status": {"jobDeploymentStatus": "Suspended"}}
    assert verdict(job) == (None, "cluster Suspended, program not started, waits for quota in queue onerec-training")
