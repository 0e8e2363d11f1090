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
app(["compile", "--profile", "gpu", "--output", sys.argv[1]])
"""


def test_compiling_and_launching_need_no_training_libraries(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "retraining.yaml",
        "tokenizer_refresh.yaml",
        "training.yaml",
    ]
