"""`make bench` runs every benchmark in a form that it has: quick, and on a log where it wants one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = {"results", "serving_hf", "serving_load"}
"""Writes a page from kept runs; the other two are programs that `benchmarks.serving` starts."""


def listed(variable: str) -> list[str]:
    found = re.search(rf"^{variable} := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found, variable
    return found[1].split()


def main_of(name: str) -> ast.arguments:
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
    return next(node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")


def test_every_benchmark_is_run_once() -> None:
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert sorted(listed("BENCHES") + listed("BENCHES_OF_LOGS")) == sorted(programs - BESIDE)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(name, set()) for name in listed("BENCHES")] + [(name, {"data"}) for name in listed("BENCHES_OF_LOGS")],
)
def test_it_takes_what_it_is_given_and_wants_no_more(name: str, wanted: set[str]) -> None:
    names = [each.arg for each in main_of(name).args]
    assert "quick" in names
    assert set(names[: len(names) - len(main_of(name).defaults)]) - {"context"} == wanted
