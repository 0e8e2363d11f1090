"""A training stage in this pod, or as a RayJob that this pod launches, watches and takes the outcome of.

Either way the outcome lies in object storage and the stage's digest is what its caller gets.
"""

from pathlib import Path

import yaml

from features.runs import Run
from features.settings import settings
from features.storage import connect as connect_storage
from models.cluster.api import connect
from models.cluster.rayjob import BadTemplate, Launcher, Owner, RayJobFailed, Work, manifest


def run_stage(stage: str, arguments: dict[str, str]) -> str:
    """Runs ``models.stages.<stage>_run(**arguments)`` where the settings say; returns its digest."""
    if not settings().rayjob_template:
        from models.stages import run

        return run(stage, arguments)
    return launch(Work(stage=stage, arguments=arguments))


def launch(work: Work) -> str:
    """As a RayJob of the template; raises BadTemplate, RayJobFailed, RayJobCancelled, NoCluster."""
    config = settings()
    if not config.pod_namespace:
        raise BadTemplate("ONEREC_POD_NAMESPACE is not set: a RayJob goes where the pod that launches it runs")
    owner = Owner(name=config.pod_name, uid=config.pod_uid) if config.pod_name and config.pod_uid else None
    job = manifest(_template(Path(config.rayjob_template)), work, owner)
    Launcher(api=connect(), namespace=config.pod_namespace).run(job)
    done = Run(connect_storage(), work.arguments["run_id"]).done(work.stage)
    if done is None:
        raise RayJobFailed(
            f"RayJob {work.name} succeeded, but stage {work.stage!r} of run {work.arguments['run_id']!r} is not in the "
            f"bucket; do its pods have the same ONEREC_S3_ENDPOINT and ONEREC_BUCKET as this one?"
        )
    return str(done["digest"])


def _template(path: Path) -> dict[str, object]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadTemplate(f"the RayJob template {path} cannot be read ({error}); is its ConfigMap mounted?") from error
    except yaml.YAMLError as error:
        raise BadTemplate(f"the RayJob template {path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise BadTemplate(f"the RayJob template {path} holds {type(found).__name__}; expected one RayJob")
    return found
