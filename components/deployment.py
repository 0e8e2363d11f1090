"""Component: publish a blessed candidate as an immutable bundle and swap the alias."""

from components.base import component


@component
def publish(run_id: str, alias: str, base: str) -> str:
    """Uploads the bundle (manifest last) and points ``alias`` at it; returns the version. Refuses the unblessed."""
    from models.stages import publish_run

    return publish_run(run_id, alias=alias, base=base)
