"""``dsl.If`` on one bool under an exit handler, nested as ``pipelines.retraining`` has it, run by ``kfp.local``."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from kfp import dsl, local
from kfp.local import config

from components.base import component


@component
def decide(answer: str) -> bool:
    return answer == "yes"


@component
def leave_trace(folder: str, name: str) -> None:
    import pathlib

    (pathlib.Path(folder) / name).touch()


@component
def choose(folder: str) -> NamedTuple("Chosen", [("where", str), ("name", str)]):  # type: ignore[valid-type]
    if not folder:
        raise ValueError("nothing to choose from")
    return (folder, "inner")


@component
def finish(folder: str, status: dsl.PipelineTaskFinalStatus) -> None:
    import pathlib

    (pathlib.Path(folder) / status.state).touch()


@dsl.pipeline(name="gated")
def gated(folder: str, outer: str, inner: str, chosen: str = "") -> None:
    with dsl.ExitHandler(finish(folder=folder), name="run"):
        found = choose(folder=chosen).outputs
        go = decide(answer=outer)
        with dsl.If(go.output == True, name="outer"):  # noqa: E712 - kfp builds the condition from the comparison
            trace = leave_trace(folder=found["where"], name="outer")
            blessed = decide(answer=inner).after(trace)
            with dsl.If(blessed.output == True, name="inner"):  # noqa: E712
                leave_trace(folder=found["where"], name=found["name"])


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[None]:
    """As ``pipelines.local`` sets the runner up."""
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(tmp_path / "outputs"),
        workspace_root=str(tmp_path / "workspace"),
        raise_on_error=True,
    )
    yield
    config.LocalExecutionConfig.instance = None


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("yes", "yes", {"outer", "inner"}),
        ("yes", "no", {"outer"}),
        ("no", "yes", set()),
    ],
)
@pytest.mark.usefixtures("runner")
def test_branches_are_taken_on_true_and_only_then(tmp_path: Path, outer: str, inner: str, expected: set[str]) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    gated(folder=str(traces), outer=outer, inner=inner, chosen=str(traces))
    assert {path.name for path in traces.iterdir()} == {*expected, "SUCCEEDED"}


@pytest.mark.usefixtures("runner")
def test_a_failure_reaches_the_exit_handler_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="FAILURE"):
        gated(folder=str(tmp_path), outer="yes", inner="yes")
    assert {path.name for path in tmp_path.iterdir()} & {"outer", "inner", "SUCCEEDED", "FAILED"} == {"FAILED"}


@component
def is_my_python(executable: str) -> bool:
    import sys

    if not executable:
        raise ValueError("no interpreter is named")
    return sys.executable == executable


@pytest.mark.usefixtures("runner")
def test_a_task_runs_this_interpreter_and_its_failure_is_raised() -> None:
    assert is_my_python(executable=sys.executable).output is True
    with pytest.raises(RuntimeError, match="FAILURE"):
        is_my_python(executable="")
