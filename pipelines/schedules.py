"""Schedules, declared in a YAML file: which pipeline runs when, with what. One owner: whatever is not in the file ends.

In a cluster a schedule is a recurring run of KFP. Those cannot be edited and keep the images they were made with, so a
changed one is created anew and the old one disabled. On one machine the file is kept in the platform's folder and
``pipelines.scheduler`` runs it. Times are UTC; missed times are not caught up, the newest window holds their data.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from croniter import CroniterError, croniter

from pipelines.kubeflow import Kubeflow, Recurring

KEPT = "schedules.json"
FIELDS = "second minute hour day-of-month month day-of-week"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
PIPELINES = ("training", "retraining", "tokenizer_refresh")


class BadSchedule(ValueError):
    """A schedule cannot be kept; the message says which and what to change."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A pipeline, when it runs and with what; whatever is not given the pipeline chooses itself."""

    name: str
    pipeline: str
    cron: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise BadSchedule(f"schedule {self.name!r}: give a name of lower-case letters, digits and dashes")
        if self.pipeline not in PIPELINES:
            raise BadSchedule(f"schedule {self.name!r}: pipeline {self.pipeline!r} is none of {', '.join(PIPELINES)}")
        if not isinstance(self.parameters, Mapping):
            raise BadSchedule(f"schedule {self.name!r}: parameters are {self.parameters!r}; expected name: value pairs")
        wrong = [f"{key}={value!r}" for key, value in self.parameters.items() if not isinstance(value, str)]
        if wrong:
            raise BadSchedule(f"schedule {self.name!r}: {', '.join(wrong)} is no text; put the value in quotes")
        check_cron(self.name, self.cron)

    def following(self, after: datetime) -> datetime:
        """The first time after ``after``."""
        return _next(self.cron, after)


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """A whole file."""

    schedules: tuple[Schedule, ...]
    profile: str = "cpu"
    experiment: str = "onerec"
    objects: Mapping[str, str] = field(default_factory=dict)
    """Names other than the profile's own for its config_map, secret and rayjob."""


def check_cron(name: str, cron: str) -> None:
    """Raises BadSchedule unless ``cron`` has the six fields that KFP reads."""
    count = len(str(cron).split())
    if count == 5:
        raise BadSchedule(
            f"schedule {name!r}: cron {cron!r} has 5 fields; Kubeflow wants 6, seconds first: write {f'0 {cron}'!r}"
        )
    if count != 6:
        raise BadSchedule(f"schedule {name!r}: cron {cron!r} has {count} fields; expected 6: {FIELDS}")
    try:
        _next(cron, datetime(2026, 1, 1, tzinfo=UTC))
    except (CroniterError, ValueError) as error:
        raise BadSchedule(f"schedule {name!r}: cron {cron!r} cannot be kept ({error}); fields are {FIELDS}") from error


def next_of(cron: str) -> str:
    """When it is due next, ISO 8601."""
    return _next(cron, datetime.now(UTC)).isoformat()


def _next(cron: str, after: datetime) -> datetime:
    found: datetime = croniter(cron, after.astimezone(UTC), second_at_beginning=True).get_next(datetime)
    return found


def parse(text: str, where: str) -> Schedules:
    """The schedules of a YAML document; raises BadSchedule."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadSchedule(f"{where} is no YAML: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("schedules"), list):
        raise BadSchedule(f"{where} holds no list `schedules`; see docs/kubeflow.md")
    _known(document, {"schedules", "profile", "experiment", "objects"}, where)
    objects = document.get("objects") or {}
    if not isinstance(objects, dict) or not all(isinstance(name, str) for name in objects.values()):
        raise BadSchedule(f"objects of {where} are {objects!r}; expected names, such as {{secret: onerec-pipelines}}")
    _known(objects, {"config_map", "secret", "rayjob"}, f"objects of {where}")
    found = []
    for number, each in enumerate(document["schedules"], 1):
        place = f"schedule {number} of {where}"
        if not isinstance(each, dict):
            raise BadSchedule(f"{place} is {each!r}; expected name, pipeline, cron and parameters")
        _known(each, {"name", "pipeline", "cron", "parameters"}, place)
        missing = {"name", "pipeline", "cron"} - set(each)
        if missing:
            raise BadSchedule(f"{place} lacks {', '.join(sorted(missing))}")
        found.append(Schedule(**{**each, "parameters": each.get("parameters") or {}}))
    names = [each.name for each in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadSchedule(f"{where} names {', '.join(twice)} twice")
    rest = {key: str(document[key]) for key in ("profile", "experiment") if key in document}
    return Schedules(schedules=tuple(found), objects=objects, **rest)


def _known(given: Mapping[str, Any], keys: set[str], where: str) -> None:
    unknown = sorted(map(str, set(given) - keys))
    if unknown:
        raise BadSchedule(
            f"{where} has {', '.join(unknown)}, which nobody reads; it may have {', '.join(sorted(keys))}"
        )


# In a cluster --------------------------------------------------------------------------------------------------------


def apply(kubeflow: Kubeflow, wanted: Schedules, compile_: Callable[[str, Path], Path]) -> list[tuple[str, str]]:
    """Makes KFP's recurring runs what the file says; returns (name, what was done).

    ``compile_(pipeline, path)`` writes the pipeline. The new one is made before the old one ends, so a failure in
    between leaves the old schedule running.
    """
    existing = [run for run in kubeflow.recurring(wanted.experiment) if name_of(run) and run.status == "ENABLED"]
    done, kept_ids = [], set()
    for each in wanted.schedules:
        same, what = _ensure(kubeflow, wanted.experiment, each, compile_, existing)
        kept_ids |= same
        done.append((each.name, what))
    for run in existing:
        if run.recurring_run_id not in kept_ids:
            kubeflow.disable(run.recurring_run_id)
            if name_of(run) not in dict(done):
                done.append((name_of(run), "disabled"))
    return done


def _ensure(
    kubeflow: Kubeflow, experiment: str, schedule: Schedule, compile_: Callable[[str, Path], Path], existing: list[Any]
) -> tuple[set[str], str]:
    """Makes the recurring run unless one like it is enabled; returns (the ids to keep, what was done)."""
    with tempfile.TemporaryDirectory(prefix="onerec-schedule-") as folder:
        package = compile_(schedule.pipeline, Path(folder) / f"{schedule.pipeline}.yaml")
        digest = _digest(schedule, package)
        enabled = [run for run in existing if name_of(run) == schedule.name]
        same = sorted(run.recurring_run_id for run in enabled if run.display_name.endswith(digest))
        if same:
            return {same[0]}, "unchanged"
        request = Recurring(
            name=f"onerec/{schedule.name}/{digest}",
            description=f"{schedule.pipeline} at {schedule.cron} (UTC), by onerec schedule apply",
            cron=schedule.cron,
            package=package,
            arguments=schedule.parameters,
        )
        kubeflow.repeat(experiment, request)
    return set(), "replaced" if enabled else "created"


def remove(kubeflow: Kubeflow, experiment: str, name: str) -> int:
    """Deletes the recurring runs of a schedule, the disabled ones too; returns how many there were."""
    found = [run for run in kubeflow.recurring(experiment) if name_of(run) == name]
    for run in found:
        kubeflow.delete(run.recurring_run_id)
    return len(found)


def name_of(run: Any) -> str:
    """The schedule a recurring run was made from; empty when it is not ours."""
    found = re.fullmatch(r"onerec/([a-z0-9-]+)/[0-9a-f]{8}", run.display_name or "")
    return found[1] if found else ""


def _digest(schedule: Schedule, package: Path) -> str:
    text = json.dumps(asdict(schedule), sort_keys=True).encode() + package.read_bytes()
    return hashlib.sha256(text).hexdigest()[:8]


# On one machine ------------------------------------------------------------------------------------------------------


def keep(home: Path, wanted: Schedules) -> None:
    """Stores the schedules for ``pipelines.scheduler``, at once or not at all."""
    home.mkdir(parents=True, exist_ok=True)
    scratch = home / f"{KEPT}.part"
    scratch.write_text(json.dumps(asdict(wanted), indent=1), encoding="utf-8")
    scratch.replace(home / KEPT)


def kept(home: Path) -> Schedules:
    """What was stored; nothing when nothing was; raises BadSchedule when it cannot be read."""
    path = home / KEPT
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Schedules(**{**stored, "schedules": tuple(Schedule(**each) for each in stored["schedules"])})
    except FileNotFoundError:
        return Schedules(schedules=())
    except (ValueError, TypeError, KeyError) as error:
        raise BadSchedule(f"{path} is damaged ({error}); remove it, then `onerec schedule apply FILE` again") from error
