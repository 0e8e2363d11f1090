"""``dsl.If`` on a component's single bool, nested as ``pipelines.retraining`` nests it, really run by ``kfp.local``."""

import sys
from collections.abc import Iterator
from pathlib import Path

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


@dsl.pipeline(name="gated")
def gated(folder: str, outer: str, inner: str) -> None:
    go = decide(answer=outer)
    with dsl.If(go.output == True, name="outer"):  # noqa: E712 - kfp builds the condition from the comparison
        trace = leave_trace(folder=folder, name="outer")
        blessed = decide(answer=inner).after(trace)
        with dsl.If(blessed.output == True, name="inner"):  # noqa: E712
            leave_trace(folder=folder, name="inner")


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
    gated(folder=str(traces), outer=outer, inner=inner)
    assert {path.name for path in traces.iterdir()} == expected


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
