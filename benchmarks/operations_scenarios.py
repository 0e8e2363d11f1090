"""The operational scenarios that run end to end: what happens, what must come of it, and what is measured.

Each plays a ``Session`` and returns figures with ``end``: "passed", or "failed: " and why. Stay time is compared
between worlds that share people, luck and history (``features.world.chance``): without drift, with drift and a model
that is never retrained, with drift and the platform's own retraining. Only users whom OneRec answers count.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc

from benchmarks import operations_candidates as candidates
from benchmarks.operations_platform import Platform, Session, outcome
from features.intake import exposures as exposure_store
from features.storage import connect
from models.bundle import list_versions
from monitoring.quality import GATE
from pipelines import stack
from pipelines.client import Client
from pipelines.local import PipelineFailed
from pipelines.progress import Progress

SETTLED = 4
"""The first days of a model in service are no quiet ones: people use up the best it knows. From this day on it is."""
DRIFT_DAY = SETTLED


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

    The first of these is let through by overruling the gate, so that people meet it and the canary alone is left. Then
    somebody puts it into production by hand, and a candidate that is as good as the model before comes along.
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
        overruled = candidates.let_through(session)
        better = candidates.better(session, overruled["version"])
        spoilt = [candidates.spoilt(session, number) for number in (2, 3)]
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
        "canary_promotion": better,
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
    before, run_id = session.production(), candidates.SOURCE
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
