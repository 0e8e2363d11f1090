"""Launches a RayJob and stays with it to the end: its logs, its two statuses, its owner, and its removal.

KubeRay's RayJob (ray.io/v1): ``jobDeploymentStatus`` says how the cluster and the submission fare, ``jobStatus`` how
the program did; "Complete" holds for a program that was stopped as well, so both are read. The object is polled, not
watched: of one object a watch tells nothing more, and it expires. Left out: several jobs at once.
"""

import hashlib
import json
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import FrameType
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException

from models.cluster.api import CONFLICT, custom, explain, patiently
from models.cluster.logs import Logs

QUEUE = "kueue.x-k8s.io/queue-name"
RUN, STAGE = "onerec.dev/run", "onerec.dev/stage"
KEPT_SECONDS = 600
"""How long a finished RayJob stays, so that a retried step finds it."""
ENDED_BADLY = ("Failed", "ValidationFailed")


class BadTemplate(ValueError):
    """The template cannot become a RayJob; the message says what to change."""


class RayJobFailed(RuntimeError):
    """The RayJob did not succeed; the message carries both statuses and what KubeRay said."""


class RayJobCancelled(RuntimeError):
    """This process was told to end; the RayJob was deleted."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The pod that launches; Kubernetes deletes the RayJob when it deletes the pod."""

    name: str
    uid: str

    def reference(self) -> dict[str, Any]:
        """As ``metadata.ownerReferences`` wants it."""
        return {"apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One stage of one run; the same work has the same name, by which a retry finds it."""

    stage: str
    arguments: dict[str, str]

    @property
    def name(self) -> str:
        """At most 47 characters, as KubeRay wants: it appends to the name."""
        text = json.dumps([self.stage, self.arguments], sort_keys=True)
        run = re.sub(r"[^a-z0-9]+", "-", self.arguments["run_id"].lower())[:22].strip("-")
        return f"{self.stage}-{run}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def entrypoint(self) -> str:
        """What the head runs; KubeRay hands it to a shell."""
        return shlex.join(["python", "-m", "models.stages", self.stage, json.dumps(self.arguments, sort_keys=True)])


def manifest(template: dict[str, Any], work: Work, owner: Owner | None) -> dict[str, Any]:
    """``template`` as the RayJob of ``work``; raises BadTemplate."""
    job = deepcopy(template)
    if job.get("kind") != "RayJob" or job.get("apiVersion") != "ray.io/v1":
        raise BadTemplate(f"the template is {job.get('apiVersion')} {job.get('kind')}; expected ray.io/v1 RayJob")
    spec, metadata = job.setdefault("spec", {}), job.setdefault("metadata", {})
    if spec.get("clusterSelector"):
        raise BadTemplate("the template selects a running cluster (clusterSelector); give rayClusterSpec instead")
    if "rayClusterSpec" not in spec:
        raise BadTemplate("the template has no spec.rayClusterSpec: nothing says what to start")
    metadata.pop("namespace", None)
    metadata["name"] = work.name
    run = re.sub(r"[^A-Za-z0-9._-]+", "-", work.arguments["run_id"])[:63].strip("-._")
    metadata["labels"] = {**metadata.get("labels", {}), RUN: run, STAGE: work.stage}
    if owner is not None:
        metadata["ownerReferences"] = [owner.reference()]
    spec |= {"entrypoint": work.entrypoint, "shutdownAfterJobFinishes": True}
    spec.setdefault("ttlSecondsAfterFinished", KEPT_SECONDS)
    return job


def verdict(job: dict[str, Any]) -> tuple[bool | None, str]:
    """(True: succeeded, False: failed, None: under way; a sentence with both statuses)."""
    status = job.get("status") or {}
    deployment, program = status.get("jobDeploymentStatus") or "New", status.get("jobStatus") or "not started"
    said = ": ".join(str(status[key]) for key in ("reason", "message") if status.get(key))
    sentence = f"cluster {deployment}, program {program}{f' ({said})' if said else ''}"
    if deployment == "Suspended" and (queue := (job["metadata"].get("labels") or {}).get(QUEUE)):
        sentence += f", waits for quota in queue {queue}"
    if deployment in ENDED_BADLY:
        return False, sentence
    if deployment == "Complete":
        return program == "SUCCEEDED", sentence
    return None, sentence


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Runs RayJobs in ``namespace``; ``patience`` is how many seconds the API may be away."""

    api: ApiClient
    namespace: str
    poll_seconds: float = 5.0
    patience: float = 600.0
    say: Callable[[str], None] = print

    def run(self, job: dict[str, Any]) -> None:
        """Creates ``job``, or adopts the one of its name, and waits; raises RayJobFailed, RayJobCancelled, NoCluster.

        On any end but success the RayJob is deleted, and with it its cluster.
        """
        name = job["metadata"]["name"]
        try:
            with _sigterm_raises():
                self._adopt_or_create(job)
                with Logs(self.api, self.namespace, name, self.say):
                    self._wait(name)
        except ApiException as error:
            self.remove(name)
            raise explain(error, f"RayJob {self.namespace}/{name}") from error
        except BaseException:
            self.remove(name)
            raise

    def _adopt_or_create(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        found = self._get(name)
        if found is not None and (found["metadata"].get("deletionTimestamp") or verdict(found)[0] is False):
            self.say(f"RayJob {name} of an earlier try: {verdict(found)[1]}; it is replaced")
            self.remove(name)
            self._until_gone(name)
            found = None
        if found is None:
            try:
                patiently(lambda: self._objects.create(job), patience=self.patience)
                self.say(f"RayJob {self.namespace}/{name} created")
                return
            except ApiException as error:
                if error.status != CONFLICT:  # an answer that was lost, or another launcher
                    raise
        owners = {"metadata": {"ownerReferences": job["metadata"].get("ownerReferences", [])}}
        patiently(lambda: self._objects.patch(name, owners), patience=self.patience)
        self.say(f"RayJob {self.namespace}/{name} adopted")

    def _wait(self, name: str) -> None:
        told = ""
        while True:
            job = self._get(name)
            if job is None:
                raise RayJobFailed(f"RayJob {name} was deleted by somebody else")
            succeeded, sentence = verdict(job)
            if sentence != told:
                self.say(f"RayJob {name}: {sentence}")
                told = sentence
            if succeeded:
                return
            if succeeded is False:
                raise RayJobFailed(f"RayJob {name} failed: {sentence}")
            time.sleep(self.poll_seconds)

    def _until_gone(self, name: str) -> None:
        deadline = time.monotonic() + self.patience
        while self._get(name) is not None:
            if time.monotonic() > deadline:
                raise RayJobFailed(f"RayJob {name} of an earlier try is still being deleted; look at its finalizers")
            time.sleep(self.poll_seconds)

    def remove(self, name: str) -> None:
        """Deletes; an API that refuses or is away leaves it to the owner reference."""
        try:
            patiently(lambda: self._objects.delete(name), patience=min(self.patience, 20))
        except Exception as error:  # the reason for removing it is what the caller must see
            self.say(f"RayJob {name} could not be deleted ({error}); Kubernetes deletes it with this pod")

    def _get(self, name: str) -> dict[str, Any] | None:
        return patiently(lambda: self._objects.get(name), patience=self.patience)

    @property
    def _objects(self) -> Any:
        return custom(self.api, "ray.io", "v1", "rayjobs", self.namespace)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within, SIGTERM raises RayJobCancelled: that is how Kubernetes ends a pod."""

    def cancel(number: int, frame: FrameType | None) -> None:
        raise RayJobCancelled(f"told to end ({signal.Signals(number).name})")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
