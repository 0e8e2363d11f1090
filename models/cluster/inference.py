"""A canary on a KServe InferenceService (serving.kserve.io/v1beta1): start, advance, promote, roll back.

*Standard* mode (controller >= 0.20) has ``spec.canary[]``: named predictors with a share of the traffic, each merged
over the stable predictor. *Knative* mode has ``canaryTrafficPercent``: the newest revision's share, which Standard
ignores in silence. KServe keeps the rules of both in its webhook, not in the CRD, so ``problems`` checks them before
anything is sent. The canary runs the same pods on another alias (``--model=onerec=candidate``). Promotion moves the
alias, after which the stable pods swap their model by themselves and the canary is dropped; ``retarget`` is KServe's
own way, for a canary of another image. Left out: more than one canary at a time.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException

from models.cluster.api import CONFLICT, custom, explain, patiently

Object = dict[str, Any]

MODE = "serving.kserve.io/deploymentMode"
AUTOSCALER = "serving.kserve.io/autoscalerClass"
MODES = {"Standard": "Standard", "RawDeployment": "Standard", "Knative": "Knative", "Serverless": "Knative"}
SCALING = ("autoScaling", "scaleTarget", "scaleMetric", "scaleMetricType")
CANARY = "candidate"
VERSION = "onerec.dev/version"
"""On the canary's pods: which version they were started for."""
STABLE_MODEL, CANARY_MODEL = "--model=onerec=production", "--model=onerec=candidate"
ATTEMPTS = 5


class CanaryRefused(ValueError):
    """The change would be refused by KServe, or ignored by it; the message says what to change."""


def mode(service: Object) -> str:
    """Standard or Knative; raises CanaryRefused unless the service says which: KServe's defaults differ."""
    given = (service["metadata"].get("annotations") or {}).get(MODE, "")
    if given not in MODES:
        raise CanaryRefused(
            f"the annotation {MODE} is {given!r}; set it to Standard or Knative, a canary differs in them"
        )
    return MODES[given]


def problems(service: Object) -> list[str]:
    """What KServe's webhook would refuse of the canaries in ``service``, or its controller ignore."""
    canaries = service["spec"].get("canary") or []
    predictor = service["spec"]["predictor"]
    percent = predictor.get("canaryTrafficPercent")
    if mode(service) == "Knative":
        found = ["spec.canary works in Standard mode only; use canaryTrafficPercent"] if canaries else []
        outside = percent is not None and not 0 <= percent <= 100
        return found + ([f"canaryTrafficPercent is {percent}; it must be between 0 and 100"] if outside else [])
    found = []
    if percent is not None:
        found.append("canaryTrafficPercent is ignored in Standard mode; use spec.canary")
    if not canaries:
        return found
    if "transformer" in service["spec"]:
        found.append(
            "the weights split what reaches the predictor by KServe's route, and spec.transformer calls the stable "
            "predictor past it; serve without a transformer (--role=all) while a canary runs"
        )
    names = [each["predictor"].get("name", "") for each in canaries]
    found += ["every canary needs predictor.name"] if "" in names else []
    if len({*names, predictor.get("name", "")}) <= len(names):
        found.append(f"the names {[predictor.get('name', ''), *names]} of predictor and canaries must differ")
    shares = [each["trafficPercent"] for each in canaries]
    found += [
        f"a canary asks for {share} % of the traffic; 0 to 100 can be" for share in shares if not 0 <= share <= 100
    ]
    if sum(shares) > 100:
        found.append(f"the canaries ask for {sum(shares)} % of the traffic together; at most 100 can be")
    return found + list(_scaling(service))


def _scaling(service: Object) -> Iterator[str]:
    """A canary wants fixed replicas: an autoscaler would move what the weights were set for."""
    scaler = (service["metadata"].get("annotations") or {}).get(AUTOSCALER, "none")
    if scaler in ("keda", "hpa"):
        yield f"a canary cannot be combined with autoscaling by {scaler}; set the annotation {AUTOSCALER}: none"
    parts = [("the predictor", service["spec"]["predictor"])]
    parts += [
        (f"canary {each['predictor'].get('name', '')!r}", each["predictor"]) for each in service["spec"]["canary"]
    ]
    for part, predictor in parts:
        yield from (
            f"{part} sets {key}; a canary wants fixed replicas: remove it" for key in SCALING if key in predictor
        )
        least, most = predictor.get("minReplicas"), predictor.get("maxReplicas")
        if most is not None and least != most:
            yield f"{part} scales from {least} to {most} replicas; a canary wants fixed ones: set both to one number"


# Changes: each takes an InferenceService and returns another ---------------------------------------------------------


def start(service: Object, percent: int, version: str) -> Object:
    """With a canary that serves the candidate, which is ``version``, to ``percent`` of the requests."""
    changed = deepcopy(service)
    predictor = {**changed["spec"]["predictor"]}
    predictor["annotations"] = {**predictor.get("annotations", {}), VERSION: version}
    if mode(service) == "Knative":
        if predictor.get("canaryTrafficPercent") and not _holds(predictor, STABLE_MODEL):
            raise CanaryRefused("a canary is running; promote it or roll it back before starting another")
        changed["spec"]["predictor"] = {**_swap(predictor, STABLE_MODEL, CANARY_MODEL), "canaryTrafficPercent": percent}
        return changed
    if changed["spec"].get("canary"):
        raise CanaryRefused("a canary is running; promote it or roll it back before starting another")
    copy = {key: value for key, value in predictor.items() if key not in ("minReplicas", "maxReplicas")}
    canary = {**_swap(copy, STABLE_MODEL, CANARY_MODEL), "name": CANARY}
    changed["spec"]["canary"] = [{"predictor": canary, "trafficPercent": percent}]
    return changed


def advance(service: Object, percent: int) -> Object:
    """With another share for the running canary."""
    changed = _running(service)
    if mode(service) == "Knative":
        changed["spec"]["predictor"]["canaryTrafficPercent"] = percent
    else:
        changed["spec"]["canary"][0]["trafficPercent"] = percent
    return changed


def drop(service: Object, *, hold: bool) -> Object:
    """Without the canary, the stable predictor as it was.

    Knative makes another revision of it: ``hold`` keeps that at 0 %, so that all traffic leaves the canary at once for
    the revision before it; the next canary sets the share anew.
    """
    changed = _running(service)
    if mode(service) == "Standard":
        del changed["spec"]["canary"]
        return changed
    predictor = _swap(changed["spec"]["predictor"], CANARY_MODEL, STABLE_MODEL)
    del predictor["canaryTrafficPercent"], predictor["annotations"][VERSION]
    changed["spec"]["predictor"] = {**predictor, "canaryTrafficPercent": 0} if hold else predictor
    return changed


def retarget(service: Object) -> Object:
    """The canary's pods as the stable ones, none restarted: KServe's promotion, for a canary of another image."""
    changed = _running(service)
    if mode(service) == "Knative":
        del changed["spec"]["predictor"]["canaryTrafficPercent"]
        return changed
    stable = service["spec"]["predictor"]
    replicas = {key: stable[key] for key in ("minReplicas", "maxReplicas") if key in stable}
    changed["spec"]["predictor"] = {**changed["spec"].pop("canary")[0]["predictor"], **replicas}
    return changed


def share(service: Object) -> int | None:
    """The canary's share of the traffic in percent, None without a canary."""
    if mode(service) == "Knative":
        percent: int | None = service["spec"]["predictor"].get("canaryTrafficPercent")
        return percent
    canaries = service["spec"].get("canary") or []
    return int(canaries[0]["trafficPercent"]) if canaries else None


def version(service: Object) -> str:
    """The version the running canary was started for."""
    spec = _running(service)["spec"]
    predictor = spec["predictor"] if mode(service) == "Knative" else spec["canary"][0]["predictor"]
    return str((predictor.get("annotations") or {}).get(VERSION, ""))


def _running(service: Object) -> Object:
    if share(service) is None:
        raise CanaryRefused("no canary is running; start one first")
    return deepcopy(service)


def _containers(predictor: Object) -> list[Object]:
    return [*predictor.get("containers", []), *([predictor["model"]] if "model" in predictor else [])]


def _holds(predictor: Object, argument: str) -> bool:
    return any(argument in container.get("args", []) for container in _containers(predictor))


def _swap(predictor: Object, old: str, new: str) -> Object:
    """``predictor`` with one argument replaced; raises CanaryRefused when no container has it."""
    if not _holds(predictor, old):
        raise CanaryRefused(f"no container of the predictor has the argument {old}; its model would stay the same")
    changed = deepcopy(predictor)
    for container in _containers(changed):
        container["args"] = [new if argument == old else argument for argument in container.get("args", [])]
    return changed


# On the cluster ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Canary:
    """The canary of one InferenceService; ``record`` is given every change that was made."""

    api: ApiClient
    namespace: str
    name: str
    record: Callable[[Object], None]
    patience: float = 60.0

    def get(self) -> Object:
        """The service; raises CanaryRefused when there is none."""
        try:
            found = patiently(lambda: self._objects.get(self.name), patience=self.patience)
        except ApiException as error:
            raise explain(error, f"reading InferenceService {self.namespace}/{self.name}") from error
        if found is None:
            raise CanaryRefused(f"there is no InferenceService {self.namespace}/{self.name}")
        return found

    def check(self, action: str, edit: Callable[[Object], Object]) -> tuple[Object, Object]:
        """The service before and after ``edit``, which nobody is told of; raises CanaryRefused."""
        before = self.get()
        after = edit(before)
        wrong = [problem for problem in problems(after) if problem not in problems(before)]
        if wrong:
            raise CanaryRefused(f"{action} of {self.namespace}/{self.name}: {'; '.join(wrong)}")
        return before, after

    def change(self, action: str, edit: Callable[[Object], Object]) -> Object:
        """Applies ``edit`` to what is there, anew when somebody else was faster; raises CanaryRefused."""
        for attempt in range(ATTEMPTS):
            before, after = self.check(action, edit)
            try:
                # The resourceVersion read before goes along: a change in between answers 409.
                made = patiently(lambda: self._objects.replace(after), patience=self.patience)  # noqa: B023 - called here
            except ApiException as error:
                if error.status == CONFLICT and attempt + 1 < ATTEMPTS:
                    continue
                raise explain(error, f"{action} of InferenceService {self.namespace}/{self.name}") from error
            self.record({"action": action, "before": share(before), "after": share(after), "service": self.name})
            return made
        raise AssertionError("the last attempt returns or raises")

    @property
    def _objects(self) -> Any:
        return custom(self.api, "serving.kserve.io", "v1beta1", "inferenceservices", self.namespace)
