"""Runs a pipeline on this machine through ``kfp.local``: the same components, one subprocess a task, no containers.

``run`` starts ``python -m pipelines.local`` as a child of its own, so that a failing pipeline cannot take its
caller along, keeps everything it prints in a log, and reports each task as it begins.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASK = re.compile(r"Executing task \S*?'([\w-]+)'")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class PipelineFailed(RuntimeError):
    """A pipeline did not succeed; the message holds the end of its log and where the whole log is."""


def run(name: str, arguments: dict[str, str], log: Path, on_task: Callable[[str], None] = lambda task: None) -> None:
    """Runs pipeline ``name`` (``training`` or ``retraining``) and waits; raises PipelineFailed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipelines.local", name, json.dumps(arguments)]
    tail: deque[str] = deque(maxlen=25)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                line = COLOUR.sub("", line)
                file.write(line)
                file.flush()
                tail.append(line.rstrip())
                if found := TASK.search(line):
                    on_task(found.group(1))
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise PipelineFailed(f"pipeline {name!r} failed; the end of {log}:\n" + "\n".join(tail))


def main(name: str, arguments: dict[str, Any]) -> None:
    """The child: executes the pipeline in ``kfp.local`` and raises when a task fails."""
    from kfp import local

    from pipelines.retraining import retraining
    from pipelines.training import training

    pipelines = {"training": training, "retraining": retraining}
    with tempfile.TemporaryDirectory(prefix="onerec-kfp-") as root:
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=f"{root}/outputs",
            workspace_root=f"{root}/workspace",
            raise_on_error=True,
        )
        pipelines[name](**arguments)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
