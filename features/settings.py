"""Addresses and credentials of the services, from ``ONEREC_*`` environment variables, read once.

The same code runs on one machine and in a cluster; only these values differ. On one machine
``pipelines.stack`` exports them; in a cluster the chart does. Nothing else reads the environment.
"""

from functools import cache
from pathlib import Path

from pydantic import SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where each service listens and how to authenticate; defaults are loopback, without credentials."""

    model_config = SettingsConfigDict(env_prefix="ONEREC_", extra="ignore")

    home: Path = Path(".onerec")
    s3_endpoint: str = "127.0.0.1:8333"
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    s3_secure: bool = False
    bucket: str = "onerec"
    redis: str = "127.0.0.1:6379"
    redis_password: SecretStr = SecretStr("")
    collector_url: str = "http://127.0.0.1:8090"
    client_token: SecretStr = SecretStr("")
    server_token: SecretStr = SecretStr("")
    admin_token: SecretStr = SecretStr("")
    """Who may tell a model server to load, or to take a trainer's weights; empty: nobody."""
    server_url: str = "http://127.0.0.1:8080"
    rollout_url: str = ""
    """A model server of role rollout that alignment asks for samples; empty: it draws them in its own process."""
    ray_address: str = ""
    ray_workers: int = 1
    """How many workers train together on Ray, each on a GPU where the cluster has them."""
    rayjob_template: str = ""
    """A file with a RayJob: training steps launch it and watch, instead of training in their own pod."""
    pod_name: str = ""
    pod_uid: str = ""
    pod_namespace: str = ""
    kfp_endpoint: str = ""
    """The API of Kubeflow Pipelines, such as http://ml-pipeline.kubeflow.svc:8888; empty: there is none."""
    kfp_namespace: str = "kubeflow"
    """Where runs go; of a multi-user Kubeflow the profile's namespace."""
    inference_service: str = ""
    """namespace/name of the InferenceService whose canary the pipelines drive; empty: a canary is aliases alone."""
    late_hours: float = 24
    """How much later than its impression feedback may happen and still be joined."""
    retention_days: float = 90
    """How long events and exposures are kept."""
    evidently_url: str = ""
    pathways: str = "tiny"
    """How many events the pathways keep: a name of ``features.histories.windows.LENGTHS``, or three numbers."""

    @field_validator("s3_endpoint", "redis")
    @classmethod
    def _no_url(cls, address: str) -> str:
        if "://" in address:
            raise ValueError("expected host:port, such as 127.0.0.1:8333, without a scheme")
        return address


class BadSetting(ValueError):
    """An environment variable has a value of the wrong kind; the message names it, ``hint`` says what to do."""

    hint = "set the variable anew, or unset it for its default; then repeat the command"


@cache
def settings() -> Settings:
    """The process-wide settings; call ``settings.cache_clear()`` after changing the environment.

    Raises BadSetting.
    """
    try:
        return Settings()
    except ValidationError as error:
        wrong = [(f"ONEREC_{'_'.join(map(str, each['loc']))}".upper(), each) for each in error.errors()]
        said = "; ".join(f"{name}={each['input']!r}: {each['msg']}" for name, each in wrong)
        raise BadSetting(f"the environment has {said}") from error
