"""Components: pre-training by next-token prediction, then alignment (RSFT and a policy objective).

Each runs in its own pod, or, when the pod is given a template of a RayJob, launches one and watches it.
"""

from components.base import component


@component
def pretrain(run_id: str, tokens: str, preset: str, overrides: str, base: str) -> str:
    """Trains from scratch when ``base`` is empty, else goes on from that bundle's weights; returns the digest."""
    from models.cluster.stages import run_stage

    arguments = {"run_id": run_id, "tokens": tokens, "preset": preset, "overrides": overrides, "base": base}
    return run_stage("pretrain", arguments)


@component
def align(run_id: str, pretrained: str, preset: str, overrides: str) -> str:
    """RSFT on the better half of the sessions together with the recipe's policy objective; returns the digest."""
    from models.cluster.stages import run_stage

    arguments = {"run_id": run_id, "pretrained": pretrained, "preset": preset, "overrides": overrides}
    return run_stage("align", arguments)
