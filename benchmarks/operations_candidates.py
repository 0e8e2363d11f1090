"""Candidates before gate and canary, end to end: production's twins, blurred, tried on the people of a session.

The gate keeps the spoilt ones out. Where it is overruled the canary has to see by what people do that a model is worse,
and likewise that one is better; what the gate lets through is no matter of chance then. Each is tried on three days,
one after the other.
"""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.operations_plant import Blur, Tampered, spoil
from benchmarks.operations_platform import Session, outcome
from models.bundle import read_alias, set_alias
from models.release import publish_run
from models.steering import follow_canary
from monitoring import trial
from monitoring.quality import GATE, Decision, keep

SOURCE = "week-night2"
"""The run whose model is in production when the candidates come."""
AGAIN = '{"when": "nightly", "minimum_rows": 0, "cooldown_hours": 0}'
"""A policy for a window that was trained on before."""
LOOKS = 3
RUINOUS = 0.5
"""Share of the recall that is lost. Who loses more recommends by chance, and no good successor is near enough to him in
what the gate bounds on both sides (cold start, density).
"""
HARMLESS = 0.01
"""Noise that makes another model of nobody's notice."""


def let_through(session: Session) -> dict[str, Any]:
    """A twin that has forgotten half: the gate refuses, is overruled, and people's stay time is to end it."""
    before, run_id = session.production(), "let-through"
    made = spoil(session.storage, SOURCE, run_id, base=before, blur=Blur(seed=0, loss=RUINOUS))
    night = session.night(2, AGAIN, run_id=run_id, canary=_canary(0))
    refused = session.storage.get_json(f"runs/{run_id}/{GATE}")
    about = {name: refused[name] for name in ("version", "digest", "against")}
    keep(session.storage, f"runs/{run_id}", Decision(blessed=True, passed=("overruled",), failed=(), **about))
    publish_run(run_id, alias="production", base=before, canary=_canary(0))
    tried, looks = _tried(session, about["version"], 0)
    checks = [
        (night["blessed"] is False, "the gate blessed it"),
        ([each.status for each in tried] == [trial.ROLLED_BACK], f"the canary ended {tried or 'never'}"),
        (not any("undecided" in each.reason for each in tried), "the canary found no difference"),
        (session.production() == before, f"{session.production()} went into production"),
        (read_alias(session.storage, "candidate") is None, "people still meet it"),
    ]
    made_of = {"planted_loss": made.loss, "noise": made.noise, "refused_because": night["reasons"]}
    return {"end": outcome(checks), "version": about["version"], **made_of, **_seen(tried, looks)}


def better(session: Session, ruined: str) -> dict[str, Any]:
    """Production is ruined by hand; its successor passes the gate, meets people, and is promoted for what they do."""
    before, run_id = session.production(), "better"
    set_alias(session.storage, "production", ruined)
    session.client.wait_for_version("onerec", ruined)
    made = spoil(session.storage, SOURCE, run_id, base=ruined, blur=Blur(seed=1, noise=HARMLESS))
    night = session.night(2, AGAIN, run_id=run_id, canary=_canary(1))
    while_tried = session.production()
    tried, looks = _tried(session, night["version"], 1)
    checks = [
        (night["blessed"] is True, f"the gate refused it: {night['reasons']}"),
        (while_tried == ruined, "it went into production before its canary"),
        ([each.status for each in tried] == [trial.PROMOTED], f"the canary ended {tried or 'never'}"),
        (session.production() == night["version"], f"{session.production()} is in production"),
        (read_alias(session.storage, "candidate") is None, "it is still a candidate"),
    ]
    if session.production() == ruined:  # what comes next is about other candidates
        set_alias(session.storage, "production", before)
    session.client.wait_for_version("onerec", session.production())
    return {
        "end": outcome(checks),
        "planted_loss": made.loss,
        "noise": made.noise,
        "refused_because": night["reasons"],
        **_seen(tried, looks),
    }


def _seen(tried: Sequence[trial.Trial], looks: int) -> dict[str, Any]:
    """What a record keeps of a canary that met people."""
    last = tried[-1].looks[-1] if tried else {"reasons": (), "figures": {}}
    return {"canary": [each.status for each in tried], "looks": looks, "why": last["reasons"], **last["figures"]}


def spoilt(session: Session, number: int) -> dict[str, Any]:
    """Production's twin, its recall spoilt by a tenth, goes through evaluation, gate and canary on real users."""
    before, run_id = session.production(), f"spoilt-{number}"
    made: Tampered = spoil(session.storage, SOURCE, run_id, base=before, blur=Blur(seed=number, loss=0.1))
    night = session.night(2, AGAIN, run_id=made.run_id, canary=_canary(number))
    tried, looks = _tried(session, night["version"], number)
    now = session.production()
    promoted = now != before or any(each.status == trial.PROMOTED for each in tried)
    checks = [
        (not promoted, f"{now} went into production"),
        (trial.read(session.storage) is None, "the canary did not end"),
        (night["evaluation"] is not None, "the candidate was not evaluated"),
    ]
    return {
        "end": outcome(checks),
        "planted_loss": made.loss,
        "noise": made.noise,
        "blessed": night["blessed"],
        "refused_because": night["reasons"],
        "canary": [each.status for each in tried],
        "looks": looks,
    }


def _canary(number: int) -> str:
    """How candidate ``number`` is tried: three days each, one after the other.

    All were trained up to the same evening, so a later one's plan has looks that were missed.
    """
    return json.dumps({"share": 0.5, "looks": LOOKS * (number + 1), "hours": 24, "minimum_users": 50})


def _tried(session: Session, version: str, number: int) -> tuple[list[trial.Trial], int]:
    """Days are played and looked at until the canary under way has ended: how it did, and after how many looks."""
    looks = 0
    while trial.read(session.storage) is not None and looks < LOOKS:
        day = 3 + LOOKS * number + looks
        session.play(day)
        follow_canary(session.midnight(day + 1).isoformat())
        looks += 1
    return [each for each in trial.ended(session.storage) if each.version == version], looks
