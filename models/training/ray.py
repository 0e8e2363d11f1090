"""Runs a stage's train function here, or as a Ray Train (V2) TorchTrainer on a running Ray.

Ray resumes any run of the same name and storage path in silence, finished ones too. So Ray keeps no checkpoints of
ours: a run's name is its run id and stage, its outcome lies in the output folder, and there our own fingerprint decides
whether to resume. A worker that dies is replaced, ``MAX_FAILURES`` times, and all go on from the last checkpoint.
Workers read the data and write the output by path: on several machines both must be on shared storage. Left out:
elastic scaling.
"""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from features.settings import settings
from models.training.checkpoint import METRICS, finished
from models.training.device import rank
from models.training.loop import TrainingDiverged
from models.training.progress import following, reporting

STORAGE = "ray"
DIVERGED = "diverged.txt"
MAX_FAILURES = 2
"""How often Ray starts the workers anew when one dies; they go on from the checkpoint."""


class Launched(Protocol):
    """A frozen dataclass that says all there is to a run: a stage's ``Job``, or the tokenizer's."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def data(self) -> Path:
        """The run's data."""

    @property
    def output(self) -> Path:
        """Where the outcome lies."""

    @property
    def init(self) -> Path | None:
        """A folder whose weights to go on from."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the outcome; see ``checkpoint.fingerprint``."""


J = TypeVar("J", bound=Launched)


class RayUnavailable(RuntimeError):
    """No Ray answers at the address; the message says what to do."""


class TrainingFailed(RuntimeError):
    """A Ray Train worker failed; the message carries the worker's own."""


def launch(
    train: Callable[[J], dict[str, Any]], job: J, *, ray_address: str, name: str, workers: int = 1
) -> dict[str, Any]:
    """``train(job)`` in this process when ``ray_address`` is empty, else on Ray; returns the stage's metrics.

    A job that finished in ``job.output`` before is not run again. Raises RayUnavailable, TrainingDiverged,
    TrainingFailed.
    """
    # A worker's working directory is not ours.
    job = replace(
        job, data=job.data.absolute(), output=job.output.absolute(), init=job.init.absolute() if job.init else None
    )
    done = finished(job.output, job.fingerprint())
    if done is not None:
        return done
    if not ray_address:
        if workers != 1:
            raise ValueError(f"{workers} workers need Ray: give ray_address, or train with one worker in this process")
        return train(job)
    with _connected(ray_address), following(job.output):
        _run(train, job, name, workers)
    done = finished(job.output, job.fingerprint())
    if done is None:
        raise TrainingFailed(
            f"Ray finished {name!r}, but {job.output / METRICS} is not visible here; workers on other machines need "
            f"the run's folders on shared storage"
        )
    return done


def _run(train: Callable[[J], dict[str, Any]], job: J, name: str, workers: int) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    (job.output / DIVERGED).unlink(missing_ok=True)
    on_gpus = _cluster_gpus() >= 1  # the driver's own machine may have none
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"train": train, "job": job},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=on_gpus,
            resources_per_worker={"GPU": 1} if on_gpus else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str((settings().home / STORAGE).absolute()),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        with _own_interrupts():
            trainer.fit()
    except TrainingFailedError as error:
        _raise_cause(error, name)
    if (job.output / DIVERGED).exists():
        raise TrainingDiverged((job.output / DIVERGED).read_text())


def _cluster_gpus() -> float:
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Gives Ctrl-C back to whoever handled it: Ray Train leaves its own handler behind."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _worker(config: dict[str, Any]) -> None:
    from ray import train

    try:
        with reporting(train.report):
            config["train"](config["job"])
    except TrainingDiverged as error:
        # All workers raise it together, and Ray would only repeat it: the message travels by file.
        if rank() == 0:
            (config["job"].output / DIVERGED).write_text(str(error))


def _raise_cause(error: Exception, name: str) -> None:
    """TrainingFailed with the worker's message."""
    failures = getattr(error, "worker_failures", {})
    first = next(iter(failures.values()), error)
    cause = getattr(first, "cause", None) or first
    raise TrainingFailed(f"Ray Train run {name!r} failed: {type(cause).__name__}: {cause}") from error


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """A connection to the Ray at ``address`` (host:port), kept when there already was one."""
    import ray

    if ray.is_initialized():
        yield
        return
    check(address)
    # Workers' own output stays in Ray's logs, it is mostly Ray's: progress comes from metrics.jsonl.
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def check(address: str) -> None:
    """Raises RayUnavailable within seconds when nobody listens: ray.init alone would try for minutes."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        raise RayUnavailable(f"the Ray address is {address!r}; expected host:port, as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError as error:
        raise RayUnavailable(
            f"no Ray answers at {address} ({error}); start it with `onerec up`, or leave ONEREC_RAY_ADDRESS empty to "
            f"train in this process"
        ) from error
