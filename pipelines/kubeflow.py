"""Runs and recurring runs of Kubeflow Pipelines, through ``kfp.Client`` and its API (v2beta1).

The client's own ``wait_for_run_completion`` never ends for a canceled run, and the CLI's ``--watch`` exits 0 for a
failed one: ``wait`` tells them apart. Left out: pipelines kept in KFP's store; a run carries its specification.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from kfp_server_api.exceptions import ApiException

from features.settings import settings

TOKEN = "/var/run/secrets/kubeflow/pipelines/token"
"""Where a pod of multi-user Kubeflow finds its token; KF_PIPELINES_SA_TOKEN_PATH names another place."""
SUCCEEDED, ENDED = "SUCCEEDED", ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
PAGE = 100
POLL_SECONDS = 5.0


class KubeflowError(RuntimeError):
    """The API cannot be reached or refuses; the message says why and ``hint`` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended, and which tasks failed with what."""

    run_id: str
    state: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recurring:
    """What is asked of a recurring run."""

    name: str
    description: str
    cron: str
    package: Path
    arguments: Mapping[str, str]


class Kubeflow:
    """The API at ``endpoint``; every method raises KubeflowError."""

    def __init__(self, endpoint: str, namespace: str) -> None:
        from kfp import Client
        from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

        path = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", TOKEN)
        credentials = ServiceAccountTokenVolumeCredentials(path) if Path(path).exists() else None
        self.endpoint = endpoint
        # Experiments belong to a profile where users do; a single-user API refuses to be told a namespace.
        self._namespace = namespace if credentials else None
        with self._telling():
            self._client = Client(host=endpoint, credentials=credentials)

    @classmethod
    def connect(cls) -> "Kubeflow":
        """As the settings say."""
        if not settings().kfp_endpoint:
            raise KubeflowError(
                "no Kubeflow Pipelines API is configured",
                "set ONEREC_KFP_ENDPOINT, such as http://localhost:8888 after "
                "`kubectl -n kubeflow port-forward svc/ml-pipeline 8888`",
            )
        return cls(settings().kfp_endpoint, settings().kfp_namespace)

    def submit(self, experiment: str, name: str, package: Path, arguments: Mapping[str, str]) -> str:
        """Starts a run of the compiled pipeline ``package``; returns its id."""
        with self._telling():
            place = self._client.create_experiment(experiment, namespace=self._namespace).experiment_id
            run = self._client.run_pipeline(place, name, str(package), params=dict(arguments))
        return str(run.run_id)

    def wait(
        self,
        run_id: str,
        *,
        timeout: float,
        patience: float = 120.0,
        on_state: Callable[[str], None],
    ) -> Ended:
        """Waits for the end of a run through an API that is away for at most ``patience`` seconds."""
        deadline, heard, told = time.monotonic() + timeout, time.monotonic(), ""
        while True:
            try:
                with self._telling():
                    run = self._client.get_run(run_id)
                heard = time.monotonic()
            except KubeflowError:
                if time.monotonic() - heard > patience:
                    raise
                run = None
            state = str(run.state or "PENDING") if run else told
            if state != told:
                on_state(state)
                told = state
            if run and state in ENDED:
                return Ended(run_id=run_id, state=state, reasons=tuple(_reasons(run)))
            if time.monotonic() > deadline:
                raise KubeflowError(
                    f"run {run_id} is {told} after {timeout:.0f} s", "it goes on; wait longer with --timeout SECONDS"
                )
            time.sleep(POLL_SECONDS)

    def recurring(self, experiment: str) -> list[Any]:
        """Every recurring run of the experiment, which may not exist yet."""
        with self._telling():
            place = self._client.create_experiment(experiment, namespace=self._namespace).experiment_id
            found: list[Any] = []
            token = ""
            while True:
                page = self._client.list_recurring_runs(page_token=token, page_size=PAGE, experiment_id=place)
                found += page.recurring_runs or []
                token = page.next_page_token or ""
                if not token:
                    return found

    def repeat(self, experiment: str, wanted: Recurring) -> str:
        """Starts a recurring run: enabled, one run at a time, without catching up; returns its id."""
        with self._telling():
            place = self._client.create_experiment(experiment, namespace=self._namespace).experiment_id
            made = self._client.create_recurring_run(
                place,
                wanted.name,
                description=wanted.description,
                cron_expression=wanted.cron,
                max_concurrency=1,
                no_catchup=True,
                enabled=True,
                params=dict(wanted.arguments),
                pipeline_package_path=str(wanted.package),
            )
        return str(made.recurring_run_id)

    def disable(self, recurring_id: str) -> None:
        """Ends the repetition; past runs stay."""
        with self._telling():
            self._client.disable_recurring_run(recurring_id)

    def delete(self, recurring_id: str) -> None:
        """Removes the recurring run; past runs stay."""
        with self._telling():
            self._client.delete_recurring_run(recurring_id)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns the client's errors into ours, and what it prints into what belongs on stderr."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except ApiException as error:
            said = " ".join(str(error.body or error.reason).split())[:500]
            hint = "is the token of an account that may use this namespace?" if error.status in (401, 403) else ""
            raise KubeflowError(
                f"Kubeflow Pipelines at {self.endpoint} answered {error.status}: {said}", hint
            ) from error
        except (urllib3.exceptions.HTTPError, TimeoutError, OSError) as error:
            raise KubeflowError(
                f"Kubeflow Pipelines at {self.endpoint} does not answer ({type(error).__name__})",
                "is ONEREC_KFP_ENDPOINT right, and the port-forward open?",
            ) from error


def _reasons(run: Any) -> Iterator[str]:
    if run.error and run.error.message:
        yield str(run.error.message)
    for task in (run.run_details.task_details if run.run_details else None) or []:
        if task.state == "FAILED" and task.display_name:
            yield f"task {task.display_name}: {task.error.message if task.error and task.error.message else 'failed'}"
