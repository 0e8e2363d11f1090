"""The operational scenarios that run end to end: what happens, what must come of it, and what is measured.

Each plays a ``Session`` and returns figures with ``end``: "passed", or "failed: " and why. Stay time is compared
between worlds that share people, luck and history (``features.world.chance``): without drift, with drift and a model
that is never retrained, with drift and the platform's own retraining. Only users whom OneRec answers count.
"""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc

from benchmarks.operations_plant import Blur, Tampered, spoil
from benchmarks.operations_platform import Platform, Session
from features.intake import exposures as exposure_store
from features.storage import connect
from models.bundle import list_versions, read_alias
from models.release import publish_run
from models.steering import follow_canary
from monitoring import trial
from monitoring.quality import GATE, Decision, keep
from pipelines import stack
from pipelines.client import Client
from pipelines.local import PipelineFailed
from pipelines.progress import Progress

SETTLED = 4
"""The first days of a model in service are no quiet ones: people use up the best it knows. From this day on it is."""
DRIFT_DAY = SETTLED
AGAIN = '{"when": "nightly", "minimum_rows": 0, "cooldown_hours": 0}'
"""A policy for a window that was trained on before."""
LOOKS = 3
RUINOUS = 4.0
"""Noise, in deviations of each tensor, that leaves little of what a model has learned."""


def outcome(checks: Sequence[tuple[bool, str]]) -> str:
    """ "passed", or what went wrong."""
    wrong = [sentence for passed, sentence in checks if not passed]
    return f"failed: {'; '.join(wrong)}" if wrong else "passed"


def quiet(platform: Platform, progress: Progress, days: int) -> dict[str, Any]:
    """Nothing happens for ``days`` once the first model has settled: drift and trigger look every night, and wait."""
    nights = []
    with platform.session("quiet", progress) as session:
        for day in range(SETTLED + days):
            session.play(day)
            report, decision = session.look(day, "on_drift")
            worst = max(
                ((c["score"] / c["threshold"], n) for n, c in report.columns.items() if c["decides"]), default=None
            )
            nights.append(
                {
                    "stay": session.stay(day),
                    "verdict": report.verdict,
                    "retrain": decision["retrain"],
                    "reason": decision["reason"],
                    "nearest": worst,
                    "rows": report.rows_current,
                }
            )
    false = sum(night["retrain"] for night in nights[SETTLED:])
    judged = sum(night["verdict"] != "insufficient data" for night in nights[SETTLED:])
    end = outcome([(false == 0, f"{false} false triggers"), (judged == days, f"only {judged} nights were judged")])
    launch = sum(night["retrain"] for night in nights[:SETTLED])
    figures = {"false_triggers": false, "nights_judged": judged, "triggers_while_settling": launch}
    return {"end": end, **figures, "nights": nights}


def drift_frozen(platform: Platform, progress: Progress, days: int) -> dict[str, Any]:
    """Tastes change and nobody retrains: what is lost."""
    with platform.session("frozen", progress, drift_day=DRIFT_DAY) as session:
        return {"stay": [_played(session, day) for day in range(days)]}


def _played(session: Session, day: int) -> float:
    session.play(day)
    return session.stay(day)


def drift_retrained(platform: Platform, progress: Progress, days: int) -> dict[str, Any]:
    """Tastes change and the platform does what it does: measure, trigger, train, gate, swap."""
    nights, stays = [], []
    with platform.session("drift", progress, drift_day=DRIFT_DAY) as session:
        for day in range(days):
            stays.append(_played(session, day))
            if DRIFT_DAY <= day < days - 1:
                session.refit_cascade(day)
                nights.append(session.night(day, '{"when": "on_drift", "cooldown_hours": 0}'))
    return {"stay": stays, "nights": [_told(night) for night in nights]}


def taste_drift(quiet_stay: list[float], frozen_stay: list[float], retrained: dict[str, Any]) -> dict[str, Any]:
    """How soon the drift was seen, and what share of the lost stay time came back on each of the days after."""
    seen = [night for night, told in enumerate(retrained["nights"]) if told["verdict"] == "drift"]
    detected = seen[0] if seen else None
    recovered = {}
    for day in range(DRIFT_DAY + 1, len(retrained["stay"])):
        loss = quiet_stay[day] - frozen_stay[day]
        recovered[str(day - DRIFT_DAY)] = (retrained["stay"][day] - frozen_stay[day]) / loss if loss > 0 else None
    best = max((share for share in recovered.values() if share is not None), default=0.0)
    checks = [
        (detected is not None and detected <= 1, f"the drift was seen after {detected} days"),
        (best >= 0.8, f"at most {best:.0%} of the lost stay time came back within {len(recovered)} days"),
    ]
    return {
        "end": outcome(checks),
        "detected_within_days": detected,
        "recovered_by_day_after": recovered,
        "stay_recovered": best,
        "stay": {"no_drift": quiet_stay, "frozen": frozen_stay, "retrained": retrained["stay"]},
        "nights": retrained["nights"],
    }


def poisoned(platform: Platform, progress: Progress) -> dict[str, Any]:
    """A tenth of the accounts become bots: the data gate holds the day back, and nothing learns from it."""
    with platform.session("poisoned", progress, bots=0.1, bot_day=1) as session:
        before = session.production()
        for day in range(2):
            session.play(day)
        night = session.night(1, "nightly")
        after = session.production()
    reason = night["decision"]["reason"]
    checks = [
        (not night["retrained"], "a model learned from the bots"),
        (reason.startswith("data gate") and "bot_share" in reason, f"the reason was {reason!r}"),
        (before == after, f"{after} went into production"),
    ]
    return {"end": outcome(checks), "reason": reason, "night": _told(night)}


def week(platform: Platform, progress: Progress) -> dict[str, Any]:
    """Feedback that comes a day late, an S3 outage while a bundle is published, then spoilt candidates.

    The first of these is let through by overruling the gate, so that people meet it and the canary alone is left.
    """
    with platform.session("week", progress) as session:
        session.play(0)
        session.refit_cascade(0)
        late = LateFeedback(session.client)
        session.client = late  # type: ignore[assignment]
        session.play(1)
        waits = session.night(1, "nightly")
        late.deliver()
        session.client = late.client
        session.play(2)
        session.refit_cascade(2)
        cut = _publish_without_storage(session)
        kept = _nothing_lost(session)
        overruled = _let_through(session)
        spoilt = [_spoilt(session, number) for number in (1, 2)]
    waited = outcome(
        [
            (not waits["retrained"], "a model learned from days without feedback"),
            ("silent" in waits["decision"]["reason"], f"the reason was {waits['decision']['reason']!r}"),
            (kept["missing"] == 0, f"{kept['missing']} of {kept['shown']} exposures, or their feedback, were lost"),
            (cut["resumed"]["retrained"], "training did not go on when the feedback was there"),
        ]
    )
    return {
        "feedback_outage": {"end": waited, "night": _told(waits), **kept},
        "s3_outage": cut,
        "bad_candidate": spoilt,
        "canary_rollback": overruled,
    }


class LateFeedback:
    """A client whose feedback events are held back until ``deliver``; what was shown is reported at once."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.held: list[dict[str, Any]] = []

    def report(self, events: list[dict[str, Any]]) -> int:
        """Sends the impressions and keeps the rest."""
        self.held += [event for event in events if event["kind"] == "feedback"]
        return self.client.report([event for event in events if event["kind"] != "feedback"])

    def deliver(self) -> None:
        """Sends what was held back."""
        self.client.report(self.held)
        self.client.flush()
        self.held = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


def _nothing_lost(session: Session) -> dict[str, Any]:
    """Impressions and watched seconds that people know of against those that are stored."""
    exposure_store.compact(session.storage, session.midnight(0), session.midnight(4))
    stored = exposure_store.read(session.storage, session.midnight(0), session.midnight(4))
    views = [view for day in session.days.values() for arm in day.views.values() for view in arm]
    watched = sum(view.play_ms for view in views)
    return {
        "shown": len(views),
        "missing": len(views) - stored.num_rows + int(watched != pc.sum(stored["play_ms"]).as_py()),
        "watched_hours": watched / 3_600_000,
    }


def _publish_without_storage(session: Session) -> dict[str, Any]:
    """Night 2, whose publication meets a dead S3; then S3 is back and the same run goes on."""
    before, run_id = session.production(), "week-night2"
    with _cut_when_publishing(session.home, run_id) as cut:
        try:
            session.night(2, "nightly", run_id=run_id)
            failed = ""
        except PipelineFailed as error:
            failed = str(error)
    answered = len(
        session.client.recommend("onerec", ["u00001"], [_ms(session, 3)], ["during-outage"], num_items=5)[0].item_ids
    )
    serving = session.client.version("onerec")
    stack.up(session.home, ["s3"])
    half = sorted(set(list_versions(session.storage)) - {before})
    resumed = session.night(2, "nightly", run_id=run_id)
    checks = [
        (cut.is_set(), "S3 was not cut: the run never began to publish"),
        (bool(failed), "the run did not notice"),
        (serving == before and answered == 5, f"meanwhile {serving} answered {answered} of 5 items"),
        (not half, f"{half} was complete without its publication"),
        (session.production() != before, f"after the outage the run ended with {resumed['state'] or 'no outcome'}"),
    ]
    return {"end": outcome(checks), "failed_with": failed[:300], "resumed": _told(resumed)}


@contextmanager
def _cut_when_publishing(home: Path, run_id: str) -> Iterator[threading.Event]:
    """Kills the local S3 as soon as a new bundle's first file is stored; the event says that it did."""
    storage, stopped, cut = connect(), threading.Event(), threading.Event()
    known = {key.split("/")[2] for key in storage.keys("models/onerec/")}

    def watch() -> None:
        while not storage.exists(f"runs/{run_id}/{GATE}"):
            if stopped.wait(0.5):
                return
        while not stopped.wait(0.01):
            if {key.split("/")[2] for key in storage.keys("models/onerec/2")} - known:
                process = psutil.Process(stack.entries(home)["s3"].pid)
                for each in [*process.children(recursive=True), process]:
                    each.send_signal(signal.SIGKILL)
                cut.set()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield cut
    finally:
        stopped.set()
        thread.join()


def _let_through(session: Session) -> dict[str, Any]:
    """A twin that has forgotten nearly all: the gate refuses, is overruled, and people's stay time is to end it."""
    before, run_id = session.production(), "let-through"
    blur = Blur(seed=0, noise=RUINOUS)
    made = spoil(session.storage, "week-night2", run_id, base=before, blur=blur)
    night = session.night(2, AGAIN, run_id=run_id, canary=_canary(0))
    refused = session.storage.get_json(f"runs/{run_id}/{GATE}")
    about = {name: refused[name] for name in ("version", "digest", "against")}
    keep(session.storage, f"runs/{run_id}", Decision(blessed=True, passed=("overruled",), failed=(), **about))
    publish_run(run_id, alias="production", base=before, canary=_canary(0))
    tried, looks = _tried(session, about["version"], 0)
    last = tried[-1].looks[-1] if tried else {"reasons": (), "figures": {}}
    checks = [
        (night["blessed"] is False, "the gate blessed it"),
        ([each.status for each in tried] == [trial.ROLLED_BACK], f"the canary ended {tried or 'never'}"),
        ("undecided" not in " ".join(last["reasons"]), "the canary found no difference"),
        (session.production() == before, f"{session.production()} went into production"),
        (read_alias(session.storage, "candidate") is None, "people still meet it"),
    ]
    return {
        "end": outcome(checks),
        "planted_loss": made.loss,
        "noise": made.noise,
        "refused_because": night["reasons"],
        "looks": looks,
        "why": last["reasons"],
        "figures": last["figures"],
    }


def _spoilt(session: Session, number: int) -> dict[str, Any]:
    """Production's twin, its recall spoilt by a tenth, goes through evaluation, gate and canary on real users."""
    before, run_id = session.production(), f"spoilt-{number}"
    made: Tampered = spoil(session.storage, "week-night2", run_id, base=before, blur=Blur(seed=number, loss=0.1))
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


def _told(night: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of a night."""
    return {
        "verdict": night["drift"],
        "retrained": night["retrained"],
        "blessed": night["blessed"],
        "version": night["version"],
        "reasons": night["reasons"],
        "decision": night["decision"]["reason"],
    }


def _ms(session: Session, day: int) -> int:
    return int(session.midnight(day).timestamp() * 1000)
