"""`onerec compile`, `submit`: the pipelines as files for Kubeflow, and runs of them in a cluster."""

import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli import Json, app, check_folder, checked_parameters, emit, err, fail, out

if TYPE_CHECKING:
    from pipelines.profiles import Profile

OnProfile = Annotated[str, typer.Option("--profile", help="What steps ask of the cluster: cpu or gpu.")]
Gpus = Annotated[int | None, typer.Option(help="GPUs of each pod that computes; the profile's unless given.")]
RayJob = Annotated[
    str | None,
    typer.Option("--rayjob", help="ConfigMap with the RayJob that trains; empty: the step's own pod does."),
]

ConfigMap = Annotated[str | None, typer.Option(help="ConfigMap with the addresses, such as <release>-pipelines.")]
Secret = Annotated[str | None, typer.Option(help="Secret with the credentials.")]

NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option(help="Folder for the YAML files.")] = Path("pipelines/compiled"),
    profile: OnProfile = "cpu",
    gpus: Gpus = None,
    rayjob: RayJob = None,
    config_map: ConfigMap = None,
    secret: Secret = None,
    gitops: Annotated[bool, typer.Option(help="Write Pipeline and PipelineVersion resources instead.")] = False,
    namespace: Annotated[str, typer.Option(help="Where KFP keeps them (with --gitops).")] = "kubeflow",
) -> None:
    """Compiles the pipelines to YAML for Kubeflow Pipelines (`kfp run create -e EXPERIMENT -f FILE name=value ...`)."""
    from pipelines.compilation import compile_all, manifests

    chosen = chosen_profile(profile, gpus=gpus, rayjob=rayjob, config_map=config_map, secret=secret)
    if not NAMESPACE.fullmatch(namespace):
        said = f"--namespace {namespace!r} is no name; expected at most 63 lower-case letters, digits and dashes"
        fail(said, "give the namespace KFP runs in, such as --namespace kubeflow", code=2)
    check_folder(output, "--output")
    written = manifests(output, chosen, namespace) if gitops else compile_all(output, chosen)
    for path in written:
        out.print(f"wrote {path}")


@app.command()
def submit(
    pipeline: Annotated[str, typer.Argument(help="training, retraining or tokenizer_refresh.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="name=value, as the pipeline declares them.")] = None,
    profile: OnProfile = "cpu",
    gpus: Gpus = None,
    rayjob: RayJob = None,
    config_map: ConfigMap = None,
    secret: Secret = None,
    experiment: Annotated[str, typer.Option(help="The experiment the run belongs to.")] = "onerec",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end; exit code 1 unless it succeeds.")] = False,
    timeout: Annotated[float, typer.Option(help="How many seconds to wait.", min=1)] = 172_800,
    json_: Json = False,
) -> None:
    """Runs a pipeline on the cluster that ONEREC_KFP_ENDPOINT names; exit code 1 unless submitted (succeeded)."""
    from pipelines.compilation import PIPELINES, compile_one
    from pipelines.kubeflow import SUCCEEDED, Kubeflow

    if pipeline not in PIPELINES:
        fail(f"there is no pipeline {pipeline!r}", f"give one of {', '.join(PIPELINES)}", code=2)
    chosen = chosen_profile(profile, gpus=gpus, rayjob=rayjob, config_map=config_map, secret=secret)
    values = _arguments(pipeline, arguments or [])
    kubeflow = Kubeflow.connect()
    with tempfile.TemporaryDirectory(prefix="onerec-submit-") as folder:
        package = compile_one(pipeline, Path(folder) / f"{pipeline}.yaml", chosen)
        run_id = kubeflow.submit(experiment, f"{pipeline} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}", package, values)
    if not wait:
        emit({"run_id": run_id}) if json_ else out.print(f"submitted run {run_id}")
        return
    err.print(f"run {run_id}: submitted")
    ended = kubeflow.wait(run_id, timeout=timeout, on_state=lambda state: err.print(f"run {run_id}: {state}"))
    if json_:
        emit({"run_id": run_id, "state": ended.state, "reasons": ended.reasons})
    if ended.state != SUCCEEDED:
        hint = "the same command with run_id=ID of a stored run repeats nothing that is done; logs are in KFP's UI"
        fail(f"run {run_id} ended as {ended.state}: {'; '.join(ended.reasons) or 'KFP gives no reason'}", hint)
    if not json_:
        out.print(f"run {run_id} succeeded")


def chosen_profile(name: str, **changes: Any) -> "Profile":
    """The profile; ends the command, with code 2, when it cannot be."""
    from pipelines.profiles import BadProfile, Choice, chosen

    try:
        return chosen(Choice(profile=name, **changes))
    except BadProfile as error:
        fail(str(error), code=2)


def _arguments(pipeline: str, given: list[str]) -> dict[str, str]:
    """name=value pairs; ends the command, with code 2, at what the pipeline does not declare."""
    from pipelines.compilation import parameters

    pairs = [each.partition("=") for each in given]
    bad = [name for name, equals, _ in pairs if not equals]
    if bad:
        fail(f"{', '.join(bad)} is no argument", "write name=value, such as policy=on_drift", code=2)
    declared = parameters(pipeline)
    unknown = [name for name, _, _ in pairs if name not in declared]
    if unknown:
        fail(f"pipeline {pipeline} has no {', '.join(unknown)}", f"it has {', '.join(declared)}", code=2)
    return checked_parameters({name: value for name, _, value in pairs}, "")
