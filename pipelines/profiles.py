"""What a step asks of a cluster: images, processors, GPUs, volumes, secrets and identity, as compile-time constants.

A resource that comes from a pipeline parameter inside a condition or exit handler compiles to an input nobody declares,
so a profile is applied while the pipeline is traced. ``LOCAL`` changes nothing but the cache. What kfp-kubernetes
cannot say is left to KFP's backend, which drops all capabilities, forbids privilege escalation and sets seccomp's
RuntimeDefault itself; a read-only root file system can be had from neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kfp import dsl, kubernetes

from components.base import LIGHT_IMAGE

USER = 10001
SETTINGS = (
    "ONEREC_S3_ENDPOINT",
    "ONEREC_S3_SECURE",
    "ONEREC_BUCKET",
    "ONEREC_REDIS",
    "ONEREC_COLLECTOR_URL",
    "ONEREC_SERVER_URL",
    "ONEREC_ROLLOUT_URL",
    "ONEREC_EVIDENTLY_URL",
    "ONEREC_INFERENCE_SERVICE",
    "ONEREC_PATHWAYS",
    "ONEREC_LATE_HOURS",
    "ONEREC_RETENTION_DAYS",
)
"""Keys of the ConfigMap, each the name of the variable it sets."""
SECRETS = ("ONEREC_S3_ACCESS_KEY", "ONEREC_S3_SECRET_KEY", "ONEREC_REDIS_PASSWORD", "ONEREC_SERVER_TOKEN")
"""Keys of the Secret, likewise."""
TRAINING_SECRETS = ("ONEREC_ADMIN_TOKEN",)
"""Of the same Secret, for steps that train alone: on-policy alignment pushes weights to the roll-out servers. Optional,
since without those servers nobody needs it."""
POD = {
    "ONEREC_POD_NAME": "metadata.name",
    "ONEREC_POD_UID": "metadata.uid",
    "ONEREC_POD_NAMESPACE": "metadata.namespace",
}
RAYJOB_FOLDER = "/etc/onerec/rayjob"
RAYJOB_KEY = "rayjob.yaml"


class BadProfile(ValueError):
    """A profile asks for something that cannot be; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one pod may use; ``hours`` is when a step that hangs is ended."""

    cpu: str
    memory: str
    hours: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How the steps of a pipeline run. Names of Kubernetes objects refer to the namespace of the runs."""

    name: str
    cluster: bool = True
    accelerator: str = "nvidia.com/gpu"
    gpus: int = 0
    """Of each training and evaluating pod; 0 is the processor."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Where pods with GPUs go; their pool's taint is taken to be ``accelerator``, as GPU node pools have it."""
    rayjob: str = ""
    """The ConfigMap whose ``rayjob.yaml`` training is launched from; empty: it trains in the step's own pod."""
    config_map: str = "onerec-pipelines"
    secret: str = "onerec-pipelines"
    small: Size = Size(cpu="500m", memory="2Gi", hours=0.5)
    data: Size = Size(cpu="2", memory="8Gi", hours=6)
    train: Size = Size(cpu="4", memory="16Gi", hours=48)

    def light(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A gate, a record: seconds of work."""
        return self._step(task, self.small)

    def reading(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A step over exposures, on processors."""
        return self._step(task, self.data)

    def computing(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A step that runs a model in its own pod."""
        self._step(task, self.train)
        return self._on_gpu(task) if self.cluster and self.gpus else task

    def training(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A step that trains in its own pod, or as a RayJob that its pod launches and watches.

        The RayJob's template gives its pods the whole Secret; the launcher pushes no weights.
        """
        if not (self.cluster and self.rayjob):
            self.computing(task)
            if self.cluster:
                keys = {name: name for name in TRAINING_SECRETS}
                kubernetes.use_secret_as_env(task, self.secret, keys, optional=True)
            return task
        self._step(task, replace(self.small, hours=self.train.hours))
        task.set_container_image(LIGHT_IMAGE)
        kubernetes.use_config_map_as_volume(task, self.rayjob, mount_path=RAYJOB_FOLDER)
        task.set_env_variable("ONEREC_RAYJOB_TEMPLATE", f"{RAYJOB_FOLDER}/{RAYJOB_KEY}")
        for name, path in POD.items():
            kubernetes.use_field_path_as_env(task, env_name=name, field_path=path)
        return task

    def _step(self, task: dsl.PipelineTask, size: Size) -> dsl.PipelineTask:
        # KFP's cache looks at arguments alone; our stages decide by content what to repeat.
        task.set_caching_options(False)
        if not self.cluster:
            return task
        task.set_retry(3, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        task.set_cpu_request(size.cpu).set_memory_request(size.memory).set_memory_limit(size.memory)
        kubernetes.set_timeout(task, seconds=round(size.hours * 3600))
        kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
        kubernetes.use_config_map_as_env(task, self.config_map, {name: name for name in SETTINGS})
        kubernetes.use_secret_as_env(task, self.secret, {name: name for name in SECRETS})
        task.set_env_variable("ONEREC_HOME", "/data").set_env_variable("HOME", "/tmp")
        for volume, path in (("tmp", "/tmp"), ("data", "/data")):
            kubernetes.empty_dir_mount(task, volume_name=volume, mount_path=path)
        return task

    def _on_gpu(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        task.set_accelerator_type(self.accelerator).set_accelerator_limit(self.gpus)
        for key, value in self.node_selector.items():
            kubernetes.add_node_selector(task, key, value)
        kubernetes.add_toleration(task, key=self.accelerator, operator="Exists", effect="NoSchedule")
        # Torch's data and NCCL's transport between processes want more shared memory than a container's 64 MB.
        kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit="8Gi")
        return task


LOCAL = Profile(name="local", cluster=False)
PROFILES = {
    "cpu": Profile(name="cpu"),
    "gpu": Profile(
        name="gpu",
        gpus=1,
        rayjob="onerec-rayjob",
        node_selector={"nvidia.com/gpu.present": "true"},
        train=Size(cpu="8", memory="64Gi", hours=48),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A profile by name, and what of it is changed; None leaves it."""

    profile: str = "cpu"
    gpus: int | None = None
    rayjob: str | None = None
    config_map: str | None = None
    secret: str | None = None


def chosen(choice: Choice) -> Profile:
    """The profile with what is given changed; raises BadProfile."""
    name, gpus = choice.profile, choice.gpus
    if name not in PROFILES:
        raise BadProfile(f"profile {name!r} is unknown; give one of {', '.join(PROFILES)}")
    if gpus is not None:
        if name == "cpu" and gpus:
            raise BadProfile(f"profile cpu has no GPUs, {gpus} were asked for; give profile gpu")
        if name == "gpu" and gpus < 1:
            raise BadProfile(f"profile gpu needs at least 1 GPU, {gpus} were asked for; give profile cpu to do without")
    changes = {each: getattr(choice, each) for each in ("gpus", "rayjob", "config_map", "secret")}
    return replace(PROFILES[name], **{each: value for each, value in changes.items() if value is not None})
