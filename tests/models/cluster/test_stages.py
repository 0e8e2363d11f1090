"""A training stage as a RayJob: launched from the mounted template, its outcome taken from object storage."""

import threading
from pathlib import Path

import pytest
import yaml
from recorded.cluster import Cluster, eventually

from features.runs import Run
from features.settings import Settings, settings
from features.storage import Storage
from models import stages
from models.cluster.rayjob import BadTemplate, RayJobFailed, Work
from models.cluster.stages import run_stage

ARGUMENTS = {"run_id": "r1", "pretrained": "abc", "preset": "tiny", "overrides": "{}"}
TEMPLATE = {"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": {"rayClusterSpec": {"headGroupSpec": {}}}}


@pytest.fixture
def template(environment: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> Path:
    """The settings of a launching pod."""
    path = tmp_path / "rayjob.yaml"
    path.write_text(yaml.safe_dump(TEMPLATE))
    monkeypatch.setenv("ONEREC_RAYJOB_TEMPLATE", str(path))
    monkeypatch.setenv("ONEREC_POD_NAMESPACE", cluster.namespace)
    settings.cache_clear()
    return path


def play_operator(cluster: Cluster, work: Work, finish: bool, s3: Storage) -> threading.Thread:
    """Does what KubeRay and the job would: the stage's outcome into the bucket, then the status."""

    def operate() -> None:
        eventually(lambda: cluster.rayjob(work.name))
        if finish:
            Run(s3, "r1").stage("align", {}, lambda folder: {"steps": (folder / "model").write_text("weights")})
        cluster.status("rayjobs", work.name, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})

    thread = threading.Thread(target=operate)
    thread.start()
    return thread


def test_the_digest_comes_from_the_bucket(template: Path, cluster: Cluster, s3: Storage) -> None:
    work = Work(stage="align", arguments=ARGUMENTS)
    operator = play_operator(cluster, work, True, s3)
    digest = run_stage("align", ARGUMENTS)
    operator.join()
    done = Run(s3, "r1").done("align")
    assert done is not None
    assert digest == done["digest"]
    made = cluster.rayjob(work.name)
    assert made is not None
    assert made["spec"]["entrypoint"] == work.entrypoint


def test_a_job_whose_outcome_is_elsewhere_is_a_failure(template: Path, cluster: Cluster, s3: Storage) -> None:
    operator = play_operator(cluster, Work(stage="align", arguments=ARGUMENTS), False, s3)
    with pytest.raises(RayJobFailed, match="the same ONEREC_S3_ENDPOINT and ONEREC_BUCKET"):
        run_stage("align", ARGUMENTS)
    operator.join()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is its ConfigMap mounted"), ("a: [", "is no YAML"), ("[]", "holds list; expected one RayJob")],
)
def test_a_template_that_cannot_be_read(template: Path, content: str | None, words: str) -> None:
    template.unlink() if content is None else template.write_text(content)
    with pytest.raises(BadTemplate, match=words):
        run_stage("align", ARGUMENTS)


def test_without_a_template_the_stage_runs_here(environment: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "align_run", lambda **arguments: f"digest of {arguments['run_id']}")
    assert run_stage("align", ARGUMENTS) == "digest of r1"
    with pytest.raises(ValueError, match="stage 'bless' is unknown; give one of pretrain, align"):
        stages.run("bless", ARGUMENTS)
