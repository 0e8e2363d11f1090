"""The gate: each threshold alone refuses and names its figure; server and evaluation must speak of one content."""

import json

import pytest

from features.runs import Run
from features.storage import connect
from monitoring.outcome import keep_records
from monitoring.quality import THRESHOLDS, Threshold, bless_run, blessing, decide

GOOD = {
    "requests": 200.0,
    "recall@50": 0.2,
    "reward": 0.3,
    "reward_lift": 1.1,
    "legality": 0.95,
    "illegal_items": 0.0,
    "coverage": 0.3,
    "calibration_error": 0.02,
    "cold_start_share": 0.1,
    "density": 0.2,
    "latency_ms": 12.0,
}
ABOUT = {"version": "20260102T000000-aaaaaaaa", "digest": "a" * 64, "against": "20260101T000000-bbbbbbbb"}
SERVED = {"passed": ["ready after 3.0 s"], "failed": [], "bundle": ABOUT}
VALUES = [threshold for threshold in THRESHOLDS if threshold.of == "value"]
CHANGES = [threshold for threshold in THRESHOLDS if threshold.of in ("ratio", "difference")]


def against(**changes: float) -> dict[str, float]:
    """A candidate compared with GOOD."""
    return {**GOOD, "over_production_high": 0.01, **changes}


def test_a_good_candidate_is_blessed_alone_and_against_its_equal() -> None:
    assert decide(GOOD, None).blessed
    assert decide(against(), GOOD).blessed


def test_what_the_gate_looks_at() -> None:
    """All of it alone and against the blessed model, but for cold start: in a young log nearly all items are cold."""
    asked = {"recall@50", "legality", "calibration_error", "density", "latency_ms"}
    assert {*asked, "reward_lift"} <= {threshold.metric for threshold in VALUES}
    assert {*asked, "reward", "cold_start_share"} <= {threshold.metric for threshold in CHANGES}


def test_a_young_log_whose_items_are_nearly_all_cold_may_have_a_first_model() -> None:
    assert decide({**GOOD, "cold_start_share": 1.0}, None).blessed


@pytest.mark.parametrize("threshold", VALUES, ids=lambda threshold: threshold.metric)
def test_each_value_threshold_refuses_and_names_the_figure(threshold: Threshold) -> None:
    beyond = threshold.bound + (0.001 if threshold.operator == "<=" else -0.001)
    assert decide({**GOOD, threshold.metric: threshold.bound}, None).blessed
    decision = decide({**GOOD, threshold.metric: beyond}, None)
    assert [sentence.split(" = ")[0] for sentence in decision.failed] == [threshold.metric]


@pytest.mark.parametrize("threshold", CHANGES, ids=lambda threshold: threshold.metric)
def test_each_change_threshold_refuses_what_value_thresholds_let_through(threshold: Threshold) -> None:
    worse = 0.01 if threshold.operator == "<=" else -0.01
    rival = GOOD[threshold.metric]
    value = rival * (threshold.bound + worse) if threshold.of == "ratio" else rival + threshold.bound + worse
    candidate = against(**{threshold.metric: value})
    decision = decide(candidate, GOOD, CHANGES)
    assert len(decision.failed) == 1
    assert f"{threshold.metric} = {value:.4g}" in decision.failed[0]
    assert f"{rival:.4g}, must be {threshold.operator} {threshold.bound:g}" in decision.failed[0]
    assert decide(candidate, None, CHANGES).blessed, "alone there is nothing to compare with"


def test_a_candidate_worse_beyond_doubt_is_refused() -> None:
    decision = decide(against(over_production_high=-0.001), GOOD)
    assert [sentence for sentence in decision.failed if "over_production_high" in sentence]


@pytest.mark.parametrize("name", GOOD)
def test_an_unmeasured_metric_is_refused(name: str) -> None:
    decision = decide({other: value for other, value in GOOD.items() if other != name}, None)
    assert not decision.blessed
    assert f"{name} was not measured" in decision.failed[0]


def test_a_blessed_model_without_the_metric_fails_nobody() -> None:
    """Bundles of before there was one, and ratios to 0."""
    old = {name: value for name, value in GOOD.items() if name not in ("reward", "latency_ms")}
    assert decide(against(), {**old, "cold_start_share": 0.0}).blessed


def test_every_threshold_leaves_one_sentence() -> None:
    decision = decide(GOOD, GOOD)
    assert len(decision.passed) + len(decision.failed) == len(THRESHOLDS)


def test_a_blessing_says_what_it_is_about() -> None:
    decision = blessing({"candidate": against(), "production": GOOD, "bundle": ABOUT}, SERVED)
    assert decision.blessed
    assert (decision.version, decision.digest, decision.against) == tuple(ABOUT.values())
    assert "server: ready after 3.0 s" in decision.passed


@pytest.mark.parametrize(
    ("infra", "words"),
    [
        (None, "the real server was not started"),
        ({**SERVED, "failed": ["a request was answered 500"]}, "server: a request was answered 500"),
        ({**SERVED, "bundle": {**ABOUT, "digest": "b" * 64}}, "what was evaluated is"),
    ],
)
def test_without_the_real_server_nothing_is_blessed(infra: dict | None, words: str) -> None:
    decision = blessing({"candidate": against(), "production": GOOD, "bundle": ABOUT}, infra)
    assert not decision.blessed
    assert words in " ".join(decision.failed)


def test_the_decision_is_kept_for_people_and_machines(environment) -> None:
    """A validation of an earlier evaluation does not count for a later one."""
    storage = connect()
    run = Run(storage, "r")
    evaluated = run.stage("evaluate", {}, lambda folder: {"candidate": {**GOOD, "density": 0.99}, "bundle": ABOUT})
    run.stage("infra", {"evaluated": evaluated}, lambda folder: SERVED)
    assert not bless_run("r")
    page = storage.get("runs/r/gate/decision.html").decode()
    assert page.index("✗") < page.index("density = 0.99") < page.index("✓") < page.index("server: ready")
    assert ABOUT["version"] in page
    keep_records(storage, "r", "v")
    assert storage.get_json("models/onerec/v/records/decision.json")["failed"] == ["density = 0.99, must be <= 0.9"]
    assert storage.get("models/onerec/v/records/decision.html").decode() == page

    def again(folder):
        (folder / "bundle.json").write_text(json.dumps(ABOUT))
        return {"candidate": GOOD, "bundle": ABOUT}

    run.stage("evaluate", {"aligned": "another"}, again)
    assert not bless_run("r")
    run.stage("infra", {"evaluated": run.done("evaluate")["digest"]}, lambda folder: SERVED)
    assert bless_run("r")
