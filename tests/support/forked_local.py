"""``python -m forked_local PIPELINE ARGUMENTS ROOT``: ``pipelines.local`` whose tasks are forked, not started anew.

The same pipeline, runner and executor; only Python and torch are imported once a run instead of once a task, which is
most of a small run's time. For tests that run one pipeline a dozen times.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import kfp.dsl.executor_main
from kfp.local import subprocess_task_handler

from pipelines.local import main

WARM = ("models.release", "models.stages", "models.steering", "models.window", "monitoring.drift")
"""What tasks import, once for all of them."""
CODE = 3
"""Where a light-weight component's command (sh -ec SCRIPT CODE ARGUMENTS) holds its source."""


def forked(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
    """What kfp's ``run_local_subprocess`` does: runs the command, returns its exit code."""
    module = Path(tempfile.mkdtemp()) / "ephemeral_component.py"
    module.write_text(full_command[CODE])
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.environ.update(env_vars or {})
        sys.argv = ["executor_main", "--component_module_path", str(module), *full_command[CODE + 1 :]]
        kfp.dsl.executor_main.executor_main()
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in WARM:
        importlib.import_module(name)
    subprocess_task_handler.run_local_subprocess = forked
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
