"""The alignment benchmark reports what it measured, all of it, and nothing that it did not measure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import alignment
from benchmarks.alignment_arms import ARMS, Budget
from benchmarks.alignment_judge import MEASURES
from benchmarks.alignment_report import SELECTION, draw, summary
from benchmarks.alignment_world import Sizes

KEYS = {
    "gap_closed_gbpo",
    "gap_closed_gbpo_low",
    "gap_closed_ecpo",
    "gap_closed_ecpo_low",
    "legality_pretrained",
    "legality_without_format",
    "legality_random_k",
    "legality_top_k",
    "duration_rho",
    "duration_rho_raw",
    "max_gradient_grpo",
    "max_gradient_ecpo",
    "max_gradient_gbpo",
    "cold_start_change",
    "density_change",
    "world_hash",
}
"""Of the JSON line, beside the table of arms."""


def record(seed: int) -> dict[str, Any]:
    """What ``alignment.world`` returns, invented."""
    rng = np.random.default_rng(seed)
    base, rails = rng.gamma(4.0, 100.0, 25), ("cold_start_share", "density", "distinct", "long_share", "duration_s")
    gains = {"pretrained": 0.0, "oracle": 1.0, "chance": -0.5, "cascade": 0.1, SELECTION: 0.2}
    gains |= {f"{arm.name}{end}": gain for arm in ARMS for end, gain in (("", 0.3), (", selected", 0.4))}
    arms = {
        name: {
            "users": {measure: (base + gain * (300 + base)).tolist() for measure in MEASURES},
            "recall50": [0.1 + 0.01 * gain, 0.2],
            "legality": 0.5,
            **dict.fromkeys(rails, 1.0 + gain),
        }
        for name, gain in gains.items()
    }
    return {"seed": seed, "arms": arms, "reward_auc": {}, "duration": {"raw": 0.2, "advantage": 0.01}}


def test_the_summary_says_what_the_records_hold(tmp_path: Path) -> None:
    records = [record(seed) for seed in range(3)]
    rows = summary(records)
    gaps = {row["arm"]: row["gap_closed"]["value"] for row in rows}
    assert gaps["pretrained"] == 0
    assert gaps["oracle"] == 1
    assert gaps["rsft+ecpo"] == pytest.approx(0.3)
    studies = {"legality": {"after": {"random_k": 0.97}, "curves": {"random_k": [0.5, 0.97]}}}
    found = alignment.headline(rows, records, studies)
    assert found.keys() >= KEYS
    assert found["gap_closed_gbpo"] == found["guarded_gap_closed_ecpo"] == pytest.approx(0.3)
    assert found["gap_closed_ecpo_selected"] == pytest.approx(0.4)
    assert found["density_change"] == pytest.approx(0.3)
    assert found["recall_change"] == found["recall_change_ecpo"] == pytest.approx(0.01)
    assert found["recall_change_low"] <= found["recall_change"] <= found["recall_change_high"]
    assert found["ecpo_over_selection_low"] > 0
    assert (found["guard_rails_of"], found["guarded_guard_rails_of"]) == ("rsft+ecpo", "guarded rsft+gbpo")
    assert found["legality_random_k"] == 0.97
    assert found["max_gradient_ecpo"] is None, "what was not measured is not invented"
    draw(rows, studies, tmp_path / "plot.html")
    assert "rsft+ecpo" in (tmp_path / "plot.html").read_text()


@pytest.mark.long
def test_the_command_reports_every_figure_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(users=150, items=300, held=40, pretrain_steps=6, reward_steps=6)
    monkeypatch.setattr(alignment, "QUICK_SIZES", sizes)
    monkeypatch.setattr(alignment, "QUICK", Budget(days=1, visitors=15, steps=2, requests=3, group=12, learned=6))
    app = typer.Typer()
    app.command()(alignment.main)
    lines = [CliRunner().invoke(app, ["--quick", "--output", str(tmp_path)]) for _ in range(2)]
    assert lines[0].exit_code == 0, lines[0].output
    first, again = (json.loads(line.stdout.strip().splitlines()[-1]) for line in lines)
    assert first == again, "the second run only reads"
    assert first.keys() >= KEYS
    assert first["quick"] is True
    rows = {row["arm"]: row for row in first["arms"]}
    assert {arm.name for arm in ARMS} | {"pretrained, selected", "oracle", "cascade"} <= rows.keys()
    assert max(row["play_s"] for row in rows.values()) == rows["oracle"]["play_s"]
    assert Path(first["plot"]).exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--arms", "rsft,rlhf"], "no arm is called rlhf"),
        (["--arms", "rsft"], "give --no-studies"),
    ],
)
def test_what_cannot_be_run_is_refused(given: list[str], said: str) -> None:
    app = typer.Typer()
    app.command()(alignment.main)
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_arms_can_be_chosen_and_what_was_left_out_is_no_figure() -> None:
    assert alignment.wanted("", True) == ARMS
    assert [arm.name for arm in alignment.wanted("rsft+gbpo, rsft", False)] == ["rsft+gbpo", "rsft"]
    records = [record(seed) for seed in range(2)]
    for each in records:
        each["arms"] = {name: found for name, found in each["arms"].items() if "ecpo" not in name}
    found = alignment.headline(summary(records), records, {})
    assert found.keys() >= KEYS
    assert found["gap_closed_gbpo"] == pytest.approx(0.3)
    assert found["gap_closed_ecpo"] is found["cold_start_change"] is None
