"""Component: publish a blessed candidate as an immutable bundle, and swap the alias or begin a canary."""

from components.base import component


@component
def publish(run_id: str, alias: str, base: str, canary: str) -> str:
    """Uploads the bundle (manifest last) and points ``alias`` at it; returns the version. Refuses the unblessed.

    ``canary``, a share of the users or a JSON object, first tries it on them beside what ``alias`` points at, which is
    ``base`` or nobody's; later runs look at how it does (``prepare_window``).
    """
    from models.release import publish_run

    return publish_run(run_id, alias=alias, base=base, canary=canary)
