"""The pipelines as files: YAML for Kubeflow Pipelines, and Pipeline and PipelineVersion resources for GitOps.

``kfp run create -f FILE`` takes the former; ``kubectl apply`` or a GitOps controller the latter, when KFP keeps its
pipelines in Kubernetes (its ``kubernetes`` pipeline store).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from kfp import compiler
from kfp.compiler import KubernetesManifestOptions
from kfp.dsl.base_component import BaseComponent

from components.base import TAG
from pipelines.profiles import Profile
from pipelines.retraining import retraining
from pipelines.tokenizer_refresh import tokenizer_refresh
from pipelines.training import training

PIPELINES: dict[str, Callable[..., BaseComponent]] = {
    "training": training,
    "retraining": retraining,
    "tokenizer_refresh": tokenizer_refresh,
}


def compile_all(folder: Path, on: Profile) -> list[Path]:
    """Writes ``folder/<pipeline>.yaml`` for each pipeline; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [compile_one(name, folder / f"{name}.yaml", on) for name in PIPELINES]


def compile_one(name: str, path: Path, on: Profile) -> Path:
    """Writes one pipeline as YAML; the same arguments and images give the same bytes."""
    compiler.Compiler().compile(PIPELINES[name](on), str(path))
    return path


def manifests(folder: Path, on: Profile, namespace: str) -> list[Path]:
    """Writes ``folder/<pipeline>.yaml`` with a Pipeline and a PipelineVersion; returns the paths.

    A version's name holds the images' tag and a digest of the specification: versions are immutable, so another content
    must be another object.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_manifest(name, folder, on, namespace) for name in PIPELINES]


def _manifest(name: str, folder: Path, on: Profile, namespace: str) -> Path:
    path, traced = folder / f"{name}.yaml", PIPELINES[name](on)
    specification = [
        each.SerializeToString(deterministic=True) for each in (traced.pipeline_spec, traced.platform_spec)
    ]
    digest = hashlib.sha256(b"".join(specification)).hexdigest()[:8]
    pipeline = f"onerec-{name.replace('_', '-')}"
    options = KubernetesManifestOptions(
        pipeline_name=pipeline,
        pipeline_display_name=pipeline,
        pipeline_version_name=f"{pipeline}-{TAG}-{on.name}-{digest}".lower().replace("_", "-").replace("+", "-"),
        namespace=namespace,
        include_pipeline_manifest=True,
    )
    compiler.Compiler().compile(
        traced,
        str(path),
        kubernetes_manifest_format=True,
        kubernetes_manifest_options=options,
    )
    return path


def parameters(name: str) -> list[str]:
    """What arguments a pipeline declares."""
    return list(PIPELINES[name]().pipeline_spec.root.input_definitions.parameters)
