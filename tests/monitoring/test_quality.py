import pytest

from monitoring.quality import THRESHOLDS, Threshold, decide

GOOD = {"requests": 200.0, "recall@50": 0.2, "legality": 0.95, "illegal_items": 0.0, "coverage": 0.3}


def test_a_good_candidate_is_blessed_alone_and_against_its_equal() -> None:
    assert decide(GOOD, None).blessed
    assert decide({**GOOD, "over_production_high": 0.01}, GOOD).blessed


@pytest.mark.parametrize(
    ("metric", "value"),
    [("recall@50", 0.001), ("legality", 0.05), ("illegal_items", 1.0), ("coverage", 0.0), ("requests", 3.0)],
)
def test_each_value_threshold_refuses_and_names_the_figure(metric: str, value: float) -> None:
    decision = decide({**GOOD, metric: value}, None)
    assert not decision.blessed
    assert any(metric in sentence for sentence in decision.failed)


def test_a_fall_against_production_is_refused() -> None:
    decision = decide({**GOOD, "recall@50": 0.1, "over_production_high": 0.01}, GOOD)
    assert not decision.blessed
    assert "0.500 of production's 0.2" in decision.failed[0]


def test_a_candidate_worse_beyond_doubt_is_refused() -> None:
    decision = decide({**GOOD, "over_production_high": -0.001}, GOOD)
    assert [sentence for sentence in decision.failed if "over_production_high" in sentence]


def test_an_unmeasured_metric_is_refused() -> None:
    decision = decide({name: value for name, value in GOOD.items() if name != "legality"}, None)
    assert any("legality was not measured" in sentence for sentence in decision.failed)


def test_every_threshold_leaves_one_sentence() -> None:
    decision = decide(GOOD, GOOD)
    assert len(decision.passed) + len(decision.failed) == len(THRESHOLDS)


def test_thresholds_compare_as_they_read() -> None:
    assert Threshold(metric="x", operator="<=", bound=1.0).check({"x": 1.0}, None)[0]
    assert not Threshold(metric="x", operator="<=", bound=1.0).check({"x": 1.1}, None)[0]
