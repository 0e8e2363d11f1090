"""A canary that an InferenceService of KServe divides by weights: the same decisions, carried out on its objects.

KServe draws for each request, so requests are compared and not people (``monitoring.trial``). The alias ``candidate``
moves before the second predictor appears and ``production`` before it goes, so that no pod ever follows nothing.
"""

from dataclasses import dataclass

from features.storage import Storage
from models.cluster import inference
from models.cluster.api import connect
from models.cluster.inference import Canary, Object
from models.steering import Aliases, record_change
from monitoring.trial import Trial


@dataclass(frozen=True, kw_only=True)
class OnKServe(Aliases):
    """Traffic that an InferenceService divides by weights."""

    canary: Canary
    unit: str = "request"

    def start(self, trial: Trial) -> None:
        """Adds the canary's predictor; raises CanaryRefused, before any alias moves, when KServe would refuse it."""
        percent = max(1, round(100 * trial.config.share))

        def edit(found: Object) -> Object:
            return inference.start(found, percent, trial.version)

        if self._holds(trial):
            return
        self.canary.check("start", edit)
        super().start(trial)
        self.canary.change("start", edit)

    def promote(self, trial: Trial) -> None:
        """As for aliases, whereupon the stable pods swap their model; then the canary's predictor goes."""
        super().promote(trial)
        if self._holds(trial):
            self.canary.change("promote", lambda found: inference.drop(found, hold=False))

    def drop(self, trial: Trial) -> None:
        """Takes the canary's predictor out before its alias."""
        if self._holds(trial):
            self.canary.change("rollback", lambda found: inference.drop(found, hold=True))
        super().drop(trial)

    def _holds(self, trial: Trial) -> bool:
        """Whether the service has this trial's canary."""
        found = self.canary.get()
        return inference.share(found) is not None and inference.version(found) == trial.version


def on_kserve(storage: Storage, service: str) -> OnKServe:
    """Steers ``service``, "namespace/name"; raises ValueError, NoCluster."""
    namespace, _, name = service.rpartition("/")
    if not namespace or not name:
        raise ValueError(f"ONEREC_INFERENCE_SERVICE is {service!r}; give namespace/name of the InferenceService")
    canary = Canary(api=connect(), namespace=namespace, name=name, record=lambda change: record_change(storage, change))
    return OnKServe(storage=storage, canary=canary)
