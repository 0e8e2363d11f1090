"""Components: pre-training by next-token prediction, then alignment (RSFT and GBPO), each one Ray Train job."""

from components.base import component


@component
def pretrain(run_id: str, tokens: str, preset: str, overrides: str, base: str) -> str:
    """Trains from scratch when ``base`` is empty, else goes on from that bundle's weights; returns the digest."""
    from models.stages import pretrain_run

    return pretrain_run(run_id, tokens=tokens, preset=preset, overrides=overrides, base=base)


@component
def align(run_id: str, pretrained: str, preset: str, overrides: str) -> str:
    """RSFT on the better half of the sessions together with GBPO on logged exposures; returns the digest."""
    from models.stages import align_run

    return align_run(run_id, pretrained=pretrained, preset=preset, overrides=overrides)
