"""The image that compiles, submits, schedules, launches and judges carries no torch, Ray or kserve."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "ray", "kserve"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import models.cluster.inference, models.cluster.stages, monitoring.canary, monitoring.drift, monitoring.outcome
import monitoring.quality, pipelines.kubeflow, pipelines.schedules
from pipelines.__main__ import app

folder = sys.argv[1]
app(["compile", "--profile", "gpu", "--output", folder + "/compiled"], standalone_mode=False)
app(["schedule", "apply", folder + "/good.yaml", "--home", folder + "/home"], standalone_mode=False)
app(["schedule", "apply", folder + "/bad.yaml", "--home", folder + "/home"])
"""
SCHEDULE = """
schedules:
- {name: hourly, pipeline: retraining, cron: "0 0 * * * *", parameters: {preset: tiny, overrides: '%s'}}
"""


def test_compiling_scheduling_and_launching_need_no_training_libraries(tmp_path: Path) -> None:
    """Without torch a recipe cannot be looked up, and that is said; what is no JSON is refused all the same."""
    (tmp_path / "good.yaml").write_text(SCHEDULE % '{"pretrain.epochs": 2}')
    (tmp_path / "bad.yaml").write_text(SCHEDULE % "{x")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert sorted(path.name for path in (tmp_path / "compiled").iterdir()) == [
        "retraining.yaml",
        "tokenizer_refresh.yaml",
        "training.yaml",
    ], done.stderr
    assert "hourly: kept" in done.stdout
    said = " ".join(done.stderr.split())
    assert "warning: schedule 'hourly', parameter preset: not looked up: the presets need torch" in said
    assert "error: schedule 'hourly', parameter overrides: overrides '{x' are not a JSON object" in said
    assert done.returncode == 2
