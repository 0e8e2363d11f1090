"""Runs a pipeline on this machine through ``kfp.local``: the same components, one subprocess a task, no containers.

``run`` starts ``python -m pipelines.local`` as a child of its own, so that a failing pipeline cannot take its
caller along, keeps everything it prints in a log, and reports each task as it begins.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASK = re.compile(r"Executing task \S*?'([\w-]+)'")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CAUSE = re.compile(r"^ {4}(?:\w+\.)*(?:[A-Z][a-z]+[A-Z]\w*|OSError): .+")
"""The last line of a task's own traceback: the local runner indents what tasks print."""


class PipelineFailed(RuntimeError):
    """A pipeline did not succeed; the message names the task, its error and where the whole log is."""


def run(name: str, arguments: dict[str, str], log: Path, on_task: Callable[[str], None] = lambda task: None) -> None:
    """Runs pipeline ``name`` (``training`` or ``retraining``) and waits; raises PipelineFailed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipelines.local", name, json.dumps(arguments)]
    task, cause, last = "none", "", "it printed no error"
    with (
        tempfile.TemporaryDirectory(prefix="onerec-kfp-", ignore_cleanup_errors=True) as root,
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [*command, root],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                line = COLOUR.sub("", line)
                file.write(line)
                file.flush()
                last = line.strip() or last
                if found := TASK.search(line):
                    task, cause = found.group(1), ""
                    on_task(task)
                elif CAUSE.match(line):
                    cause = line.strip()
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)  # the task under way is a child of the child
            raise
    if child.returncode:
        raise PipelineFailed(f"pipeline {name!r} failed in task {task!r}: {cause or last}; the whole log is {log}")


def main(name: str, arguments: dict[str, Any], root: str) -> None:
    """The child: executes the pipeline in ``kfp.local`` inside folder ``root`` and raises when a task fails."""
    from kfp import local

    from pipelines.retraining import retraining
    from pipelines.training import training

    pipelines = {"training": training, "retraining": retraining}
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=f"{root}/outputs",
        workspace_root=f"{root}/workspace",
        raise_on_error=True,
    )
    pipelines[name](**arguments)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
