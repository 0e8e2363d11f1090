"""The trigger: from a drift verdict to "retrain or not", deterministic and audited.

A retraining starts when the policy asks for it (``nightly``: always, ``on_drift``: on the verdict drift, and again
until a model is published, since the next day is compared with the drifted one and looks stable) and nothing speaks
against it: data gate, too few new rows, cooldown, another retraining in flight, a canary, the budget. Every decision
is stored under ``trigger/`` with its reasons and what it was made from, and is made once a run: a resumed run gets it
back. Cooldown, new rows and budget are counted in the log's own time, which a replayed log has too; "in flight" is a
matter of the wall's clock. Left out: a budget in money; cost is recorded with each run's outcome.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from features.storage import ObjectMissing, Storage
from monitoring import trial

ROOT = "trigger"
NIGHTLY, ON_DRIFT = "nightly", "on_drift"
DRIFT, STABLE, INSUFFICIENT = "drift", "stable", "insufficient data"
"""Verdicts of ``monitoring.drift``."""


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """When to retrain; the numbers are ours."""

    when: str = NIGHTLY
    minimum_rows: int = 500
    """New exposures since the last retraining that ended well."""
    cooldown_hours: float = 0.0
    """Between the ends of two windows that were trained on."""
    budget_runs: int = 200
    budget_days: float = 7.0
    """At most so many retrainings in so many days, failed ones too: they cost as much."""
    in_flight_hours: float = 3.0
    """A run that has stored nothing for so long is not waited for."""

    def __post_init__(self) -> None:
        if self.when not in (NIGHTLY, ON_DRIFT):
            raise ValueError(f"policy {self.when!r} is unknown; give {NIGHTLY!r} or {ON_DRIFT!r}")
        for name in ("minimum_rows", "cooldown_hours", "budget_runs", "budget_days", "in_flight_hours"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} of the policy is {value!r}; give a number, 0 or more")


def parse(policy: str) -> Trigger:
    """``nightly``, ``on_drift`` (a day's cooldown), or a JSON object of Trigger's fields; raises ValueError."""
    if not policy.lstrip().startswith("{"):
        return Trigger(when=policy, cooldown_hours=20.0 if policy == ON_DRIFT else 0.0)
    try:
        given = json.loads(policy)
    except json.JSONDecodeError as error:
        raise ValueError(f"policy {policy!r} is no JSON object: {error}") from error
    known = [field.name for field in fields(Trigger)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"policy has {', '.join(unknown)}, which nobody reads; it may have {', '.join(known)}")
    return replace(parse(str(given.get("when", NIGHTLY))), **given)


@dataclass(frozen=True, kw_only=True)
class Past:
    """A decision to retrain that was made before."""

    run_id: str
    window_end: datetime
    state: str
    """Of its outcome; empty while it has none."""
    moved: datetime
    """When it last stored anything."""
    verdict: str = STABLE
    """Of its drift stage."""
    published: bool = True
    """Whether its model went to the users; not when the gate refused it or a canary of it was not promoted."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a decision is made from."""

    verdict: str
    reason: str
    invalid: Sequence[str]
    """What the data gate objects to."""
    window_end: datetime
    rows_by_hour: Mapping[str, int]
    """Exposures of the newest window by the hour they began in, ISO 8601."""
    past: Sequence[Past]
    now: datetime
    canary: str = ""
    """The version that is being tried on users; a second candidate has to wait for its end."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Retrain or not, the reason, and a sentence for each check that was made."""

    retrain: bool
    reason: str
    checks: tuple[str, ...]


def decide(trigger: Trigger, situation: Situation) -> Decision:
    """A pure function: equal arguments give equal decisions. The first check that fails gives the reason."""
    checks = list(_checks(trigger, situation))
    against = next((sentence for passed, sentence in checks if not passed), "")
    asked = f"policy {trigger.when}, {situation.verdict}: {situation.reason}"
    if situation.verdict != DRIFT and (run_id := unanswered(situation.past)):
        asked += f"; no model has been published since the drift that {run_id} saw"
    return Decision(retrain=not against, reason=against or asked, checks=tuple(sentence for _, sentence in checks))


def _checks(trigger: Trigger, situation: Situation) -> Iterator[tuple[bool, str]]:
    yield not situation.invalid, "data gate: " + ("; ".join(situation.invalid) or "nothing is wrong with the window")
    wanted = situation.verdict == DRIFT or trigger.when == NIGHTLY or bool(unanswered(situation.past))
    yield wanted, f"{situation.verdict} ({situation.reason}) and policy {trigger.when}"
    last = max((each.window_end for each in situation.past if each.state == "SUCCEEDED"), default=None)
    new = sum(n for hour, n in situation.rows_by_hour.items() if last is None or datetime.fromisoformat(hour) >= last)
    since = f"since {last.isoformat()}" if last else "in the window"
    yield new >= trigger.minimum_rows, f"{new} new exposures {since}, {trigger.minimum_rows} are wanted"
    if last is not None:
        hours = (situation.window_end - last) / timedelta(hours=1)
        yield (
            hours >= trigger.cooldown_hours,
            (f"{hours:.1f} hours after the last retraining's window, {trigger.cooldown_hours:g} are the cooldown"),
        )
    silent = situation.now - timedelta(hours=trigger.in_flight_hours)
    flying = sorted(each.run_id for each in situation.past if not each.state and each.moved > silent)
    yield not flying, f"in flight: {', '.join(flying) or 'nothing'}" + ("; wait, or resume it by its id" * bool(flying))
    trying = f"a canary is under way: {situation.canary}" if situation.canary else "no canary is under way"
    yield not situation.canary, trying
    first = situation.window_end - timedelta(days=trigger.budget_days)
    spent = sum(first < each.window_end for each in situation.past)
    yield (
        spent < trigger.budget_runs,
        (f"{spent} retrainings in {trigger.budget_days:g} days, the budget is {trigger.budget_runs}"),
    )


def unanswered(past: Sequence[Past]) -> str:
    """The newest run that ended after it had seen drift and since whose window no model was published; empty: none."""
    ended = [each for each in past if each.state]
    answered = max((each.window_end for each in ended if each.published), default=datetime.min.replace(tzinfo=UTC))
    drifts = [each for each in ended if each.verdict == DRIFT and each.window_end > answered]
    return max(drifts, key=lambda each: each.window_end).run_id if drifts else ""


# The audit -----------------------------------------------------------------------------------------------------------


def decide_once(storage: Storage, run_id: str, trigger: Trigger, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The decision of a run on its drift ``summary``, made at the first call and stored; returns the record.

    Of runs that decide at the same moment at most one retrains: each writes down that it wants to before it looks
    for others, and steps back when it sees one.
    """
    end = datetime.fromisoformat(summary["window_end"])
    key, inputs = f"{_folder(end)}{run_id}.json", {"trigger": asdict(trigger), **_said(summary)}
    stored = _stored(storage, key)
    if stored and stored["inputs"] == inputs and "retrain" in stored:
        return stored
    now, canary = datetime.now(UTC), trial.read(storage)
    claim = {"run_id": run_id, "window_end": end.isoformat(), "at": now.isoformat(), "inputs": inputs}
    storage.put_json(key, {**claim, "claims": True})
    situation = Situation(
        verdict=summary["verdict"],
        reason=summary["reason"],
        invalid=summary["validation"]["failed"],
        window_end=end,
        rows_by_hour=summary["rows_by_hour"],
        past=tuple(past(storage, end, trigger.budget_days, without=run_id)),
        now=now,
        canary=canary.version if canary else "",
    )
    record = {**claim, **asdict(decide(trigger, situation))}
    storage.put_json(key, record)
    return dict(json.loads(json.dumps(record)))


def past(storage: Storage, end: datetime, days: float, *, without: str = "") -> Iterator[Past]:
    """The decisions to retrain, and the claims still open, of windows that ended in the ``days`` up to ``end``."""
    lost = {each.version for each in trial.ended(storage) if each.status != trial.PROMOTED}
    for record in decisions(storage, end, days):
        if record["run_id"] == without or not record.get("retrain", record.get("claims")):
            continue
        prefix = f"runs/{record['run_id']}/"
        outcome = _stored(storage, f"{prefix}outcome.json")
        times = [time for _, _, time in storage.objects(prefix)] if outcome is None else []
        yield Past(
            run_id=record["run_id"],
            window_end=datetime.fromisoformat(record["window_end"]),
            state=str(outcome["state"]) if outcome else "",
            moved=max([*times, datetime.fromisoformat(record["at"])]),
            verdict=record["inputs"]["verdict"],
            published=bool(outcome and outcome.get("version") and outcome["version"] not in lost),
        )


def decisions(storage: Storage, end: datetime, days: float) -> Iterator[dict[str, Any]]:
    """Every stored decision on windows that ended in the ``days`` up to ``end``, by window and run."""
    first = end - timedelta(days=days)
    for number in range((end.date() - first.date()).days + 1):
        for key in storage.keys(_folder(first + timedelta(days=number))):
            record = _stored(storage, key)
            if record and first < datetime.fromisoformat(record["window_end"]) <= end:
                yield record


def _folder(end: datetime) -> str:
    return f"{ROOT}/date={end.astimezone(UTC).date()}/"


def _said(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {"verdict": summary["verdict"], "reason": summary["reason"], "rows": summary["rows_current"]}


def _stored(storage: Storage, key: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = storage.get_json(key)
    except ObjectMissing:
        return None
    return record
