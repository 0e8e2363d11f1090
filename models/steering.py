"""How a share of the traffic meets a candidate on one machine, and the look that every run takes at it.

The model server serves the aliases ``production`` and ``candidate`` under a name each, and a router sends users by
their hash (``pipelines.arms``). On a cluster the InferenceService that the settings name divides requests as well
(``models.cluster.canary``). Either carries out what ``monitoring.trial`` decides; every method may be repeated.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from features.settings import Settings, settings
from features.storage import Storage, connect
from models.bundle import AliasMoved, move_alias, read_alias, remove_alias, set_alias
from monitoring import trial
from monitoring.trial import Superseded, Trial

PRODUCTION, CANDIDATE = "production", "candidate"


@dataclass(frozen=True, kw_only=True)
class Aliases:
    """Traffic that follows the aliases by itself."""

    storage: Storage
    unit: str = "user"

    def production(self) -> str | None:
        """The version behind the alias."""
        return read_alias(self.storage, PRODUCTION)

    def start(self, trial: Trial) -> None:
        """Points ``candidate`` at the trial's version."""
        set_alias(self.storage, CANDIDATE, trial.version)

    def promote(self, trial: Trial) -> None:
        """Moves ``production`` from the version that was compared to the trial's; raises Superseded."""
        try:
            move_alias(self.storage, PRODUCTION, trial.version, only_from=[trial.stable])
        except AliasMoved as error:
            raise Superseded(
                f"{error.now} went into production meanwhile; {trial.version} was compared with {trial.stable}"
            ) from error
        remove_alias(self.storage, CANDIDATE, trial.version)

    def drop(self, trial: Trial) -> None:
        """Takes the alias ``candidate`` away; production was never touched."""
        remove_alias(self.storage, CANDIDATE, trial.version)


def steer_of(storage: Storage, config: Settings) -> Aliases:
    """The InferenceService that the settings name, "namespace/name", or aliases alone."""
    if not config.inference_service:
        return Aliases(storage=storage)
    from models.cluster.canary import on_kserve

    return on_kserve(storage, config.inference_service)


def follow_canary(end: str) -> Trial | None:
    """The planned look at the canary under way, if it is due at ``end`` (ISO 8601; empty: the newest stored hour)."""
    storage = connect()
    if trial.read(storage) is None:
        return None
    from models.window import stored_hours  # brings Feast along, which publishing can do without

    now = datetime.fromisoformat(end) if end else stored_hours(storage)[1]
    return trial.look(storage, now, steer_of(storage, settings()))


def record_change(storage: Storage, change: dict[str, Any]) -> None:
    """Keeps who was served what when, beside the bundles."""
    now = datetime.now(UTC)
    aliases = {alias: read_alias(storage, alias) for alias in (PRODUCTION, CANDIDATE)}
    key = f"canary/{change['service']}/{now:%Y%m%dT%H%M%S%f}-{change['action']}.json"
    storage.put_json(key, {**change, **aliases, "at": now})
