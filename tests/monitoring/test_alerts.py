"""The alert rules, by promtool: each fires on its trouble, keeps silent without it, and says what it should."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.metrics import METRICS, series

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "monitoring" / "alerts.yaml"

CASES: dict[str, list[dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("alert_cases.yaml").read_text())
SLOW = (
    "OnerecDailyFeaturesStale",
    "OnerecRetrainingOverdue",
    "OnerecCandidatesRefused",
    "OnerecCanaryForgotten",
    "OnerecModelOld",
    "OnerecDrift",
)
"""Alerts whose cases take hours to days: their series are constant."""

RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool", path=str(Path(sys.executable).parent)) or shutil.which("promtool")
    if found is None:
        pytest.skip("there is no promtool; `make promtool` takes it from Debian's package prometheus")
    return found


def expected(alert: str, case: dict[str, Any]) -> dict[str, Any]:
    """promtool's test of one case; texts without a template are the rule's own."""
    rule, alerts = RULES[alert], []
    if "says" in case:
        labels = {**case.get("labels", {}), **rule["labels"]}
        alerts.append({"exp_labels": labels, "exp_annotations": {**rule["annotations"], "summary": case["says"]}})
    check = {"eval_time": f"{case['at']}m", "alertname": alert, "exp_alerts": alerts}
    inputs = [{"series": name, "values": values} for name, values in case["series"].items()]
    return {"interval": f"{step(alert)}m", "input_series": inputs, "alert_rule_test": [check]}


def step(alert: str) -> int:
    """Minutes between two samples: half an hour where a case takes days."""
    return 30 if alert in SLOW else 1


def unit_test(promtool: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """promtool's verdict on all cases, each alert's with its rule alone: a file of all takes minutes."""
    files = []
    for alert, rule in RULES.items():
        rules, tests = folder / f"{alert}.yaml", folder / f"{alert}.test.yaml"
        rules.write_text(yaml.safe_dump({"groups": [{"name": alert, "rules": [{**rule, **changes}]}]}))
        cases = [expected(alert, case) for case in CASES[alert]]
        of = {"rule_files": [str(rules)], "evaluation_interval": f"{step(alert)}m", "tests": cases}
        tests.write_text(yaml.safe_dump(of))
        files.append(str(tests))
    return subprocess.run([promtool, "test", "rules", *files], capture_output=True, text=True, check=False)


def test_rules_are_valid(promtool: str) -> None:
    checked = subprocess.run([promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_fires_on_its_trouble_and_else_keeps_silent(promtool: str, tmp_path: Path) -> None:
    outcome = unit_test(promtool, tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("broken", ["vector(1)", "vector(0) > 1"])
def test_a_rule_that_always_or_never_fires_fails_its_cases(promtool: str, tmp_path: Path, broken: str) -> None:
    outcome = unit_test(promtool, tmp_path, expr=broken)
    assert outcome.returncode != 0
    for alert in RULES:
        assert re.search(rf"\balertname: ?{alert}\b", outcome.stdout + outcome.stderr), alert


@pytest.mark.parametrize("alert", RULES)
def test_every_alert_has_a_case_that_fires_and_one_that_does_not(alert: str) -> None:
    assert {"says" in case for case in CASES[alert]} == {True, False}


@pytest.mark.parametrize("alert", RULES)
def test_every_alert_has_a_severity_and_a_section_in_the_runbook(alert: str) -> None:
    rule = RULES[alert]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page, anchor = rule["annotations"]["runbook_url"].split("#")
    assert anchor == alert.lower()
    assert alert in re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)


def test_the_runbook_has_no_section_of_an_alert_that_is_gone() -> None:
    sections = re.findall(r"^## (Onerec\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert sections == list(RULES)


@pytest.mark.parametrize("alert", RULES)
def test_expressions_use_known_metrics_and_labels_only(alert: str) -> None:
    expression = RULES[alert]["expr"]
    used = set(re.findall(r"\bonerec_\w+", expression))
    assert used <= set(series())
    for name, selector in re.findall(r"\b(onerec_\w+)\{([^}]*)\}", expression):
        known = next(metric.labels for metric in METRICS.values() if name in metric.series)
        assert set(re.findall(r"(\w+)=", selector)) <= {*known}
