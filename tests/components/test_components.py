"""Components as KFP sees them: sources that stand alone, and bodies that call what exists."""

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import components.base

FOLDER = Path(components.__file__).parent
MODULES = sorted(FOLDER.glob("*.py"))
ALLOWED = {*sys.stdlib_module_names, "kfp", "components"}


def functions(path: Path) -> list[ast.FunctionDef]:
    """The component functions of one module."""
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


EVERY = [
    pytest.param(function, id=function.name) for path in MODULES if path.stem != "base" for function in functions(path)
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_only_stdlib_and_kfp_at_module_level(path: Path) -> None:
    """Compiling a pipeline must not need torch, nor whatever else the bodies use."""
    imported = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            imported.add(str(node.module).split(".")[0])
    assert imported <= ALLOWED


@pytest.mark.parametrize("function", EVERY)
def test_bodies_use_nothing_of_their_module(function: ast.FunctionDef) -> None:
    """KFP copies the function's source alone into the pod; there only ``kfp`` and ``dsl`` are imported for it."""
    here = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom):
            here |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            here.add(node.id)
    read = {n.id for body in function.body for n in ast.walk(body) if isinstance(n, ast.Name)}
    assert read - here <= {"dsl", "open"}


@pytest.mark.parametrize("function", EVERY)
def test_bodies_call_functions_that_take_their_arguments(function: ast.FunctionDef) -> None:
    imported = {}
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
    assert imported, "a component calls code of the platform"
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            names = [keyword.arg for keyword in node.keywords]
            assert None not in names
            given = dict.fromkeys(map(str, names))
            inspect.signature(imported.pop(node.func.id)).bind(*[None] * len(node.args), **given)
    assert not imported, "imported and not called"


def test_images_are_those_of_this_version() -> None:
    """Unless the environment says otherwise, which no test does."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == components.base.TAG


def test_the_executor_that_pods_start_can_be_imported() -> None:
    """``install_kfp_package=False`` relies on the image's own kfp."""
    done = subprocess.run([sys.executable, "-c", "import kfp.dsl.executor_main"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
