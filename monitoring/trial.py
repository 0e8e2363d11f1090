"""A canary from its start to its end: an object in storage that every run of the retraining pipeline looks at once.

``begin`` names the candidate and the share of the users (or requests) that meet it; ``look`` does the next planned look
when it is due, on the exposures since the candidate's first, and ends the canary as ``monitoring.canary`` says: that is
the one decision, whoever steers the traffic (``Steer``: aliases and a router by user on one machine, a KServe
InferenceService on the cluster). Time is the log's own. What is decided is written before it is done, and doing it
twice does no harm: whoever is killed in between is resumed by the next look. Of those who begin or look at the same
moment one writes, by comparison and swap. Left out: several canaries at a time.
"""

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from features.intake import exposures as exposure_store
from features.storage import ObjectChanged, ObjectMissing, Storage, json_bytes
from monitoring.canary import CONTINUE, PROMOTE, Arm, Plan, Verdict, compare, compare_requests, judge
from monitoring.experiment import Split
from monitoring.page import page

OPEN = "trials/open.json"
RUNNING, PROMOTED, ROLLED_BACK, SUPERSEDED = "running", "promoted", "rolled back", "superseded"
OWN = "onerec"
COLUMNS = ("user_id", "request_id", "event_time", "source", "model_version", "play_ms", "dislike")


class CanaryUnderWay(RuntimeError):
    """Another candidate is being tried; the message says which."""


class Superseded(RuntimeError):
    """Production is no longer the model that the candidate is compared with."""


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """How a candidate is tried."""

    share: float = 0.1
    """Of the users, or of the requests, that meet the candidate."""
    looks: int = 3
    hours: float = 24
    """Between two looks."""
    minimum_users: int = 100
    error_rate: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.hours <= 0:
            raise ValueError(
                f"a canary of share {self.share} with a look every {self.hours} hours cannot be; give a share between "
                'nobody (0) and everybody (1) and hours above 0, such as {"share": 0.1, "hours": 24}'
            )
        self.plan()

    def plan(self) -> Plan:
        """The statistical plan."""
        return Plan(looks=self.looks, error_rate=self.error_rate, minimum_users=self.minimum_users)


def config_of(text: str) -> TrialConfig | None:
    """From a pipeline's parameter: empty for no canary, a share, or a JSON object of the fields; raises ValueError."""
    if not text.strip():
        return None
    names = ", ".join(field.name for field in fields(TrialConfig))
    try:
        given = json.loads(text)
        return TrialConfig(**given) if isinstance(given, dict) else TrialConfig(share=float(given))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"canary {text!r} is neither a share nor a JSON object of {names} ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One canary; ``looks`` holds what each look saw and decided."""

    version: str
    stable: str
    """What it is compared with: the version in production when it began."""
    started: str
    """ISO 8601, in the log's time."""
    unit: str
    """user: a person meets one model (``split``); request: each request is drawn anew, as KServe's weights do."""
    config: TrialConfig
    looks: tuple[Mapping[str, Any], ...] = ()
    status: str = RUNNING
    reason: str = ""

    @property
    def split(self) -> Split:
        """Who meets the candidate; other people for every version."""
        return Split(share=self.config.share, salt=self.version)

    def due(self, now: datetime) -> int:
        """The number of the look that is due at ``now``, 0 when none is; looks that were missed are not made up for."""
        passed = (now - datetime.fromisoformat(self.started)) / timedelta(hours=self.config.hours)
        number = min(int(passed), self.config.looks)
        return number if number > self.looked else 0

    @property
    def looked(self) -> int:
        """The number of the last look."""
        return int(self.looks[-1]["look"]) if self.looks else 0


class Steer(Protocol):
    """Who sends requests to the candidate. Each method may be repeated."""

    @property
    def unit(self) -> str:
        """What is drawn into an arm: user or request."""

    def production(self) -> str | None:
        """The version everybody else meets now."""

    def start(self, trial: Trial) -> None:
        """Sends the share to the candidate."""

    def promote(self, trial: Trial) -> None:
        """Sends everybody to the candidate; raises Superseded when production is neither of the two."""

    def drop(self, trial: Trial) -> None:
        """Sends everybody to production."""


def read(storage: Storage) -> Trial | None:
    """The canary under way."""
    try:
        return parse(storage.get_json(OPEN))
    except ObjectMissing:
        return None


def parse(record: Mapping[str, Any]) -> Trial:
    """A trial from its record."""
    return Trial(**{**record, "config": TrialConfig(**record["config"]), "looks": tuple(record["looks"])})


def ended(storage: Storage) -> list[Trial]:
    """Every canary that has ended, oldest first."""
    return [parse(storage.get_json(key)) for key in storage.keys("trials/ended/")]


def begin(storage: Storage, trial: Trial, steer: Steer) -> Trial:
    """Starts ``trial``, or takes up the same one; raises CanaryUnderWay when another candidate is being tried."""
    known = read(storage)
    if known is None:
        try:
            storage.swap(OPEN, json_bytes(asdict(trial)), None)
        except ObjectChanged:  # another run was faster by a moment
            return begin(storage, trial, steer)
    elif known.version != trial.version:
        raise CanaryUnderWay(
            f"{known.version} is being tried since {known.started}; {trial.version} has to wait for its end "
            "(`onerec canary show`; `onerec canary end` ends it now)"
        )
    trial = known or trial
    try:
        steer.start(trial)
    except Exception:  # nobody meets the candidate: there is no canary to look at
        storage.remove(OPEN)
        raise
    return trial


def look(storage: Storage, now: datetime, steer: Steer) -> Trial | None:
    """The trial after the look that is due at ``now``, ended if it decided; None when nothing is being tried."""
    found = storage.tagged(OPEN)
    if found is None:
        return None
    trial = parse(json.loads(found[0]))
    if _decided(trial) is None:
        if steer.production() not in (trial.stable, trial.version):
            return finish(storage, trial, SUPERSEDED, f"{steer.production()} went into production meanwhile", steer)
        number = trial.due(now)
        if not number:
            return trial
        verdict, figures = _judge(storage, trial, number, now)
        seen = {**asdict(verdict), "at": now.isoformat(), "figures": figures}
        trial = replace(trial, looks=(*trial.looks, seen))
        try:
            storage.swap(OPEN, json_bytes(asdict(trial)), found[1])
        except ObjectChanged:  # somebody else looked meanwhile: what they wrote counts
            return look(storage, now, steer)
    action = _decided(trial)
    if action is None:
        return trial
    status = PROMOTED if action == PROMOTE else ROLLED_BACK
    return finish(storage, trial, status, "; ".join(trial.looks[-1]["reasons"]), steer)


def _decided(trial: Trial) -> str | None:
    """What the last look decided, None when it was to go on."""
    action = trial.looks[-1]["action"] if trial.looks else CONTINUE
    return None if action == CONTINUE else str(action)


def finish(storage: Storage, trial: Trial, status: str, reason: str, steer: Steer) -> Trial:
    """Ends the canary: traffic first, then the records, then the object that says it is open."""
    if status == PROMOTED:
        try:
            steer.promote(trial)
        except Superseded as error:
            status, reason = SUPERSEDED, str(error)
    if status != PROMOTED:
        steer.drop(trial)
    trial = replace(trial, status=status, reason=reason)
    began = datetime.fromisoformat(trial.started)
    storage.put_json(f"trials/ended/{began:%Y%m%dT%H%M%S}-{trial.version}.json", asdict(trial))
    beside = f"models/onerec/{trial.version}/records"
    storage.put_json(f"{beside}/canary.json", asdict(trial))
    storage.put(f"{beside}/canary.html", render(trial).encode(), "text/html")
    storage.remove(OPEN)
    print(f"canary {trial.version}: {status}; {reason}")
    return trial


def _judge(storage: Storage, trial: Trial, number: int, now: datetime) -> tuple[Verdict, dict[str, Any]]:
    started = datetime.fromisoformat(trial.started)
    joined = datetime.fromisoformat(trial.looks[-1]["at"]) if trial.looks else started
    exposure_store.compact(storage, joined, now)  # what is older was joined for the look before
    seen = exposure_store.read(storage, started, now, COLUMNS)
    before = exposure_store.read(storage, started - (now - started), started, COLUMNS)
    arms = arms_of(trial, seen, before)
    figures = {name: {"stable": asdict(pair[0]), "canary": asdict(pair[1])} for name, pair in arms.items()}
    return judge(number, arms, trial.config.plan()), figures


def arms_of(trial: Trial, exposures: pa.Table, before: pa.Table | None = None) -> dict[str, tuple[Arm, Arm]]:
    """(stable, canary) of every measure, from the exposures since the candidate answered first.

    By user: who is in an arm is the split's, of those whom that arm's model has answered since; a person whom neither
    answered is in neither. By request: each counts for the model that answered it.
    """
    own = exposures.filter(pc.equal(exposures["source"], OWN))
    first = pc.min(own.filter(pc.equal(own["model_version"], trial.version))["event_time"])
    since = (
        exposures.filter(pc.greater_equal(exposures["event_time"], first)) if first.is_valid else exposures.slice(0, 0)
    )
    own = since.filter(pc.equal(since["source"], OWN))
    answered = {
        arm: own.filter(pc.equal(own["model_version"], version))
        for arm, version in (("stable", trial.stable), ("canary", trial.version))
    }
    if trial.unit == "request":
        return compare_requests(answered["stable"], answered["canary"])
    users = {
        arm: [user for user in pc.unique(rows["user_id"]).to_pylist() if trial.split.arm(user) == arm]
        for arm, rows in answered.items()
    }
    return compare(since, users, before)


def render(trial: Trial) -> str:
    """The canary as a page a person can read."""
    rows = "".join(
        f"<tr><td>{each['look']}</td><td class=text>{html.escape(each['at'])}</td>"
        f"<td class=text>{html.escape(each['action'])}</td>"
        f"<td class=text>{'<br>'.join(html.escape(reason) for reason in each['reasons'])}</td></tr>"
        for each in trial.looks
    )
    config = ", ".join(f"{name} {value}" for name, value in asdict(trial.config).items())
    return page(
        f"Canary {trial.version}",
        f"<h1>Canary {html.escape(trial.version)}: {html.escape(trial.status)}</h1>"
        f"<p class=note>against {html.escape(trial.stable)} since {html.escape(trial.started)}, by {trial.unit}; "
        f"{html.escape(config)}</p><p>{html.escape(trial.reason)}</p>"
        f"<table><tr><th>look</th><th>at</th><th>verdict</th><th>why</th></tr>{rows}</table>",
        script=False,
    )
