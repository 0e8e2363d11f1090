"""A canary through its looks, on real object storage: what it saw, what was done, and that a kill does no harm."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.intake import exposures as exposure_store
from features.schema import EXPOSURE, FLAGS, conform
from features.storage import Storage
from monitoring import trial as trials
from monitoring.canary import Verdict
from monitoring.trial import CanaryUnderWay, Superseded, Trial, TrialConfig, arms_of, begin, config_of, look, read

START = datetime(2026, 1, 2, tzinfo=UTC)
OLD, NEW = "20260101T000000-aaaaaaaa", "20260102T000000-bbbbbbbb"
CONFIG = TrialConfig(share=0.5, looks=2, hours=24, minimum_users=30)
TRIAL = Trial(version=NEW, stable=OLD, started=START.isoformat(), unit="user", config=CONFIG)
USERS = [f"u{number}" for number in range(400)]


@dataclass
class Told:
    """A steer that writes down what it is told."""

    serving: str = OLD
    unit: str = "user"
    done: list[str] = field(default_factory=list)

    def production(self) -> str:
        return self.serving

    def start(self, trial: Trial) -> None:
        self.done.append("start")

    def promote(self, trial: Trial) -> None:
        if self.serving not in (trial.stable, trial.version):
            raise Superseded("somebody else")
        self.serving = trial.version
        self.done.append("promote")

    def drop(self, trial: Trial) -> None:
        self.done.append("drop")


def day(number: int, seconds: dict[str, float], *, trial: Trial = TRIAL, spread: float = 0.3) -> pa.Table:
    """A day's exposures, one a user: the split's model answers, ``seconds`` is each arm's mean stay."""
    rng = np.random.default_rng(number)
    arms = [trial.split.arm(user) for user in USERS]
    play = [1000 * seconds[arm] * rng.lognormal(0, spread) for arm in arms]
    time = START + timedelta(days=number)
    return rows(USERS, [NEW if arm == "canary" else OLD for arm in arms], play, time)


def rows(users: list[str], versions: list[str], play_ms: list[float], time: datetime) -> pa.Table:
    n = len(users)
    columns = {
        "exposure_id": [f"{time:%d%H}-{k}" for k in range(n)],
        "request_id": [f"r{time:%d%H}-{k}" for k in range(n)],
        "user_id": users,
        "item_id": ["i"] * n,
        "position": np.zeros(n, np.int32),
        "event_time": np.full(n, int(time.timestamp() * 1000)) + np.arange(n),
        "source": ["onerec"] * n,
        "model_version": versions,
        "duration_ms": [60_000] * n,
        "play_ms": np.asarray(play_ms, np.int64),
        **{flag: [False] * n for flag in FLAGS},
    }
    return conform(pa.table(columns), EXPOSURE)


def after(days: float) -> datetime:
    return START + timedelta(days=days)


def play(s3: Storage, *days: dict[str, float]) -> Told:
    """Begins a canary and plays days of it, one look a day."""
    steer = Told()
    begin(s3, TRIAL, steer)
    for number, seconds in enumerate(days):
        exposure_store.write(s3, day(number, seconds))
        look(s3, after(number + 1), steer)
    return steer


def test_a_better_candidate_is_promoted_and_a_worse_one_is_not(s3: Storage) -> None:
    assert play(s3, {"stable": 20, "canary": 26}, {"stable": 20, "canary": 26}).done == ["start", "promote"]
    (won,) = trials.ended(s3)
    assert (won.status, read(s3)) == (trials.PROMOTED, None)
    page = s3.get(f"models/onerec/{NEW}/records/canary.html").decode()
    assert "promoted" in page
    assert "stay_seconds" in page
    assert trials.parse(s3.get_json(f"models/onerec/{NEW}/records/canary.json")) == won


def test_a_worse_candidate_goes_at_the_first_look(s3: Storage) -> None:
    assert play(s3, {"stable": 20, "canary": 14}).done == ["start", "drop"]
    (lost,) = trials.ended(s3)
    assert lost.status == trials.ROLLED_BACK
    assert "stay_seconds" in lost.reason


def test_undecided_is_rolled_back_at_the_last_look(s3: Storage) -> None:
    """Equal arms of few users: the first look goes on, the last one has no more to wait for."""
    steer = play(s3, {"stable": 20, "canary": 20})
    assert [each["action"] for each in read(s3).looks] == ["continue"]
    assert look(s3, after(1.5), steer).looked == 1, "not due yet"
    exposure_store.write(s3, day(1, {"stable": 20, "canary": 20}, spread=2.0))
    assert look(s3, after(2), steer).status == trials.ROLLED_BACK
    assert steer.done == ["start", "drop"]


def test_missed_looks_are_not_made_up_for(s3: Storage) -> None:
    steer = Told()
    begin(s3, TRIAL, steer)
    exposure_store.write(s3, day(0, {"stable": 20, "canary": 26}))
    assert look(s3, after(9), steer).looks[0]["look"] == CONFIG.looks


@pytest.mark.parametrize("moment", ["promote", "records"])
def test_a_kill_between_decision_and_deed_is_resumed(s3: Storage, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    steer = Told()
    begin(s3, TRIAL, steer)
    exposure_store.write(s3, day(0, {"stable": 20, "canary": 30}))
    exposure_store.write(s3, day(1, {"stable": 20, "canary": 30}))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((Told, "promote", killed) if moment == "promote" else (trials, "render", killed)))
        with pytest.raises(KeyboardInterrupt):
            look(s3, after(2), steer)
    decided = read(s3)
    assert decided.looks[-1]["action"] == "promote"
    found = look(s3, after(2), steer)
    assert (found.status, found.looks, read(s3)) == (trials.PROMOTED, decided.looks, None)
    assert steer.serving == NEW


def test_production_moved_by_hand_ends_the_canary(s3: Storage) -> None:
    steer = Told()
    begin(s3, TRIAL, steer)
    steer.serving = "20260103T000000-cccccccc"
    found = look(s3, after(1), steer)
    assert (found.status, found.looks) == (trials.SUPERSEDED, ())
    assert "20260103T000000-cccccccc went into production meanwhile" in found.reason
    assert steer.done == ["start", "drop"]


def test_one_canary_at_a_time_and_the_same_one_twice(s3: Storage) -> None:
    steer = Told()
    first = begin(s3, TRIAL, steer)
    assert begin(s3, replace(TRIAL, started=after(1).isoformat()), steer) == first, "a resumed run begins it again"
    with pytest.raises(CanaryUnderWay, match=f"{NEW} is being tried since"):
        begin(s3, replace(TRIAL, version="20260103T000000-cccccccc"), steer)
    assert read(s3) == first


def test_of_those_who_begin_at_once_one_is_tried(s3: Storage) -> None:
    """A retraining and a refresh of the tokenizer may publish at the same moment."""
    rivals = [replace(TRIAL, version=f"20260103T000000-{letter * 8}") for letter in "abcd"]
    together = threading.Barrier(len(rivals))

    def one(trial: Trial) -> list[str]:
        steer = Told()
        together.wait()
        with suppress(CanaryUnderWay):
            begin(s3, trial, steer)
        return steer.done

    with ThreadPoolExecutor(len(rivals)) as pool:
        done = list(pool.map(one, rivals))
    tried = read(s3)
    assert done == [["start"] if trial == tried else [] for trial in rivals]


def test_a_look_that_somebody_else_took_meanwhile_is_theirs(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended the canary; to write what this one saw would bring it back, with nobody behind it."""
    steer = Told()
    begin(s3, TRIAL, steer)
    exposure_store.write(s3, day(0, {"stable": 20, "canary": 14}))
    judged = trials.judge

    def meanwhile(*given: Any) -> Verdict:
        monkeypatch.setattr(trials, "judge", judged)
        assert look(s3, after(1), steer).status == trials.ROLLED_BACK
        return Verdict(action="continue", look=1, reasons=("it saw less",))

    monkeypatch.setattr(trials, "judge", meanwhile)
    assert look(s3, after(1), steer) is None
    assert read(s3) is None
    assert steer.done == ["start", "drop"]
    assert len(trials.ended(s3)) == 1


def test_a_canary_that_cannot_start_leaves_nothing(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise ValueError("the service scales by itself")

    monkeypatch.setattr(Told, "start", refused)
    with pytest.raises(ValueError, match="scales by itself"):
        begin(s3, TRIAL, Told())
    assert read(s3) is None


def test_nothing_to_look_at(s3: Storage) -> None:
    assert look(s3, after(1), Told()) is None


# Who is in which arm --------------------------------------------------------------------------------------------------


def test_people_whom_neither_model_answered_are_in_neither_arm() -> None:
    """Other models' users, the cascade's, and those who only came before the candidate's first answer."""
    members = {arm: [user for user in USERS if TRIAL.split.arm(user) == arm][:3] for arm in ("stable", "canary")}
    early = rows(members["stable"][:1], [OLD], [9000.0], START)
    own = rows([members["canary"][0], *members["stable"][1:3]], [NEW, OLD, OLD], [4000.0] * 3, after(0.1))
    frozen = rows([members["canary"][1]], ["frozen"], [50_000.0], after(0.2))
    wrong = rows([members["canary"][2]], [OLD], [50_000.0], after(0.3))
    found = arms_of(TRIAL, pa.concat_tables([early, own, frozen, wrong]))["stay_seconds"]
    assert [(arm.users, arm.mean) for arm in found] == [(2, 4.0), (1, 4.0)]


def test_requests_count_for_the_model_that_answered() -> None:
    """KServe's weights: one person meets both models."""
    table = rows(["u"] * 6, [OLD, NEW, OLD, NEW, NEW, OLD], [1000.0, 3000, 1000, 3000, 3000, 1000], START)
    stable, canary = arms_of(replace(TRIAL, unit="request"), table)["stay_seconds"]
    assert (stable.users, stable.mean, canary.users, canary.mean) == (2, 1.0, 3, 3.0), "the first came before"


def test_before_anybody_met_the_candidate_there_is_nobody() -> None:
    found = arms_of(TRIAL, rows(USERS[:9], [OLD] * 9, [1.0] * 9, START))
    assert [arm.users for arm in found["stay_seconds"]] == [0, 0]


# Bad input -----------------------------------------------------------------------------------------------------------


def test_a_canary_is_said_in_few_words() -> None:
    assert config_of("") is None
    assert config_of(" 0.2 ") == TrialConfig(share=0.2)
    assert config_of('{"share": 0.3, "looks": 4, "hours": 1}') == TrialConfig(share=0.3, looks=4, hours=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ten percent", "neither a share nor a JSON object of share, looks, hours"),
        ('{"percent": 10}', "unexpected keyword argument 'percent'"),
        ("0", "give a share between"),
        ("1", "give a share between"),
        ('{"hours": 0}', "hours above 0"),
        ('{"looks": 0}', "at least 1 look"),
        ("[0.1]", "neither a share"),
    ],
)
def test_other_words_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(text)
