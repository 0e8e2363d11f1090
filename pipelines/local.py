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
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK = re.compile(r"Executing task \S*?'([\w-]+)'")
FAILED = re.compile(r"Task '[\w-]+' finished with status FAILURE")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CAUSE = re.compile(r"^ {4}(?:\w+\.)*(?:[A-Z][a-z]+[A-Z]\w*|OSError): .+")
"""The last line of a task's own traceback: the local runner indents what tasks print."""


class PipelineFailed(RuntimeError):
    """A pipeline did not succeed; the message names the task, its error and where the whole log is."""


@dataclass
class _Story:
    """What a run's log has told so far: the task under way, why it fails, and the first failure."""

    task: str = "none"
    cause: str = ""
    last: str = "it printed no error"
    failure: str = ""

    def read(self, line: str) -> str | None:
        """Takes a line; returns the task that begins with it, if one does."""
        if found := TASK.search(line):
            self.task, self.cause = found.group(1), ""
            return self.task
        if CAUSE.match(line):
            self.cause = line.strip()
        elif FAILED.search(line):  # the first to fail: the exit handler runs all the same
            self.failure = self.failure or self.why()
        self.last = line.strip() or self.last
        return None

    def why(self) -> str:
        """Which task failed with what."""
        return self.failure or f"in task {self.task!r}: {self.cause or self.last}"


def run(name: str, arguments: dict[str, str], log: Path, on_task: Callable[[str], None] = lambda task: None) -> None:
    """Runs pipeline ``name`` (of ``pipelines.compilation``) and waits; raises PipelineFailed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipelines.local", name, json.dumps(arguments)]
    story = _Story()
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
            for coloured in child.stdout:
                line = COLOUR.sub("", coloured)
                file.write(line)
                file.flush()
                if task := story.read(line):
                    on_task(task)
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)  # the task under way is a child of the child
            raise
    if child.returncode:
        raise PipelineFailed(f"pipeline {name!r} failed {story.why()}; the whole log is {log}")


def main(name: str, arguments: dict[str, Any], root: str) -> None:
    """The child: executes the pipeline in ``kfp.local`` inside folder ``root`` and raises when a task fails."""
    from kfp import local

    warnings.filterwarnings("ignore", message=".*non-Python base image.*")  # ours hold Python under other names
    from pipelines.compilation import PIPELINES

    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=f"{root}/outputs",
        workspace_root=f"{root}/workspace",
        raise_on_error=True,
    )
    PIPELINES[name]()(**arguments)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
