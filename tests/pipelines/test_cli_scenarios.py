"""`onerec loop --scenario`: names are checked before anything starts, and the scenario's world is the one played."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from features.world.simulator import SimulatorConfig
from pipelines.__main__ import app
from pipelines.cli_loop import _check_scenario
from pipelines.loop import simulated
from pipelines.result import LoopConfig


def test_an_unknown_scenario_ends_with_2_and_names_those_there_are(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["loop", "--scenario", "flood", "--home", str(tmp_path / "home")])
    assert result.exit_code == 2
    assert "no scenario 'flood'; the scenarios are bots, duration-drift" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "home").exists()


def test_a_scenario_is_for_the_simulator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        _check_scenario("bots", tmp_path, 1)
    assert "not for the users of --data" in capsys.readouterr().err


def test_the_world_of_a_loop() -> None:
    config = LoopConfig(scenario="duration-drift", users=50, seed=3)
    assert simulated(config) == SimulatorConfig.scenario("duration-drift", users=50, seed=3)
    assert simulated(LoopConfig(drift_day=4)) == SimulatorConfig(drift_day=4)
    assert _check_scenario("duration-drift", None, 7) == 1
    assert _check_scenario("bots", None, 7) == 7
